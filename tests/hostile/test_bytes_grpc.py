"""On the gRPC port: bytes that are no HTTP/2, frames that are not as they should be, messages that are no requests."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import cast

import grpc
import pytest
from hostile_http2 import CALL, GENERATE, PREFACE, STREAM, frame, headers
from hostile_stage import MODEL, Stage, examples
from hostile_wire import shout, talk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.v1 import inference_pb2 as pb

WITHIN_S = 10.0
PATHS = {
    f"/tandem.v1.Inference/{name}": kind
    for name, kind in (
        ("Generate", pb.GenerateRequest),
        ("GenerateOnce", pb.GenerateOnceRequest),
        ("Chat", pb.ChatRequest),
        ("ChatOnce", pb.ChatOnceRequest),
    )
}
OURS = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""Statuses that put the blame on the server."""


FRAMES = st.builds(
    frame,
    st.integers(0, 12),
    st.integers(0, 255) | st.sampled_from([0, 1, 4, 5]),
    st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1, 2**31]),
    st.one_of(
        st.binary(max_size=60),
        st.just(headers(b"/tandem.v1.Inference/ChatOnce", (b"grpc-timeout", b"1n"))),
        st.just(headers(b"/\xff", (b"grpc-encoding", b"gzip"), (b"x-request-id", b"\xff"))),
        st.just(headers(b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")),
        st.sampled_from([b"\0\0\0\0\x05abc", b"\x01\xff\xff\xff\xff", b"\0" * 8, b"\x7f\xff\xff\xff", b"\0" * 70_000]),
    ),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """A call with frames put in, left out, repeated, cut or changed."""
    frames = list(draw(st.sampled_from([CALL, STREAM])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frames) - 1))
        kind = draw(st.integers(0, 5))
        if kind <= 2:
            frames.insert(at + 1, draw(FRAMES))
        elif kind == 3:
            one = frames[at]
            place = draw(st.integers(0, len(one)))
            frames[at] = one[:place] + draw(st.binary(max_size=3)) + one[place + draw(st.integers(0, 3)) :]
        elif kind == 4 and len(frames) > 1:
            del frames[at]
        else:
            frames.insert(at, frames[at])
    return frames


@pytest.fixture
def channel(gateway: Stage) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(gateway.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as made:
        yield made
        # The server serves another client still.
        assert generate(made).usage.completion_tokens == 2


def generate(channel: grpc.Channel) -> pb.GenerateOnceResponse:
    call = channel.unary_unary(
        "/tandem.v1.Inference/GenerateOnce",
        request_serializer=pb.GenerateOnceRequest.SerializeToString,
        response_deserializer=pb.GenerateOnceResponse.FromString,
    )
    found: pb.GenerateOnceResponse = call(GENERATE, timeout=WITHIN_S)
    return found


def test_frames_written_by_hand_make_a_call(gateway: Stage) -> None:
    """Or else the mutations of them would prove little."""
    answer, _ = talk(gateway.grpc_address, CALL, 1.0)
    assert b"cmpl-" in answer


def test_a_path_that_is_not_utf8_ends_no_server(gateway: Stage, channel: grpc.Channel) -> None:
    """The loop of grpcio's asyncio server decodes it, and the error there ends the whole server."""
    talk(gateway.grpc_address, [*CALL[:2], frame(1, 5, 1, headers(b"/\xff"))], 0.5)
    assert generate(channel).usage.completion_tokens == 2


def test_an_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    for method in ("/tandem.v1.Inference/Nothing", "/a", "/a/b"):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(method)(b"", timeout=WITHIN_S)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@given(said=st.lists(conversations(), min_size=1, max_size=16))
@settings(max_examples=examples(60), suppress_health_check=list(HealthCheck), database=None)
def test_mutated_frames_break_nothing(gateway: Stage, channel: grpc.Channel, said: list[list[bytes]]) -> None:
    shout(gateway.grpc_address, said, 0.05)
    generate(channel)


@given(said=st.lists(st.lists(st.binary(min_size=1, max_size=300), max_size=3), min_size=1, max_size=16))
@settings(max_examples=examples(20), suppress_health_check=list(HealthCheck), database=None)
def test_random_bytes_break_nothing(gateway: Stage, channel: grpc.Channel, said: list[list[bytes]]) -> None:
    shout(gateway.grpc_address, [[*one, *([PREFACE] if n % 2 else [])] for n, one in enumerate(said)], 0.03)
    generate(channel)


def full_chat() -> pb.ChatOnceRequest:
    request = pb.ChatOnceRequest(model=MODEL)
    request.messages.add(role=pb.MESSAGE_ROLE_SYSTEM, content="s")
    request.messages.add(role=pb.MESSAGE_ROLE_USER, content="hi", name="n")
    calls = request.messages.add(role=pb.MESSAGE_ROLE_ASSISTANT, reasoning_content="r").tool_calls
    calls.add(id="c1", name="f", arguments="{}")
    request.messages.add(role=pb.MESSAGE_ROLE_TOOL, content="out", tool_call_id="c1")
    function = request.tools.add().function
    function.name, function.parameters = "f", '{"type":"object"}'
    options = request.options
    options.sampling.temperature = 0.5
    options.sampling.logit_bias[5] = 1.0
    options.max_tokens = 4
    options.n = 2
    options.logprobs = 2
    options.stop.append("x")
    options.metadata["a"] = "b"
    options.response_format.json_schema.name = "n"
    options.response_format.json_schema.schema = '{"type":"object"}'
    request.thinking.enabled = True
    return request


REQUESTS = [GENERATE.SerializeToString(), full_chat().SerializeToString()]
JUNK = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"\xff" * 10, b"\x0a" * 200, b"\x0b" * 200, b"\x0a\xff\xff\xff\xff\x0f", b"\x80", b"\x7a\x00"]),
    # Numbers that are not finite, and that are too large.
    st.sampled_from([struct.pack("<d", value) for value in (float("nan"), float("inf"), -float("inf"), 1e308)]),
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A valid request with bytes changed; protobuf takes much of it for another request."""
    data = bytearray(draw(st.sampled_from(REQUESTS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == 1:
            data[at:at] = draw(JUNK)
        elif kind == 2:
            del data[at : at + draw(st.integers(1, 10))]
        else:
            data += data[at:]
    return bytes(data)


@given(path=st.sampled_from(sorted(PATHS)), data=messages() | st.binary(max_size=100))
@settings(max_examples=examples(600), suppress_health_check=list(HealthCheck), database=None)
def test_mutated_messages_are_answered_and_never_as_a_fault_of_the_server(
    channel: grpc.Channel, path: str, data: bytes
) -> None:
    error = refusal(channel, path, data)
    if error is not None:
        assert error.code() not in OURS, error
        assert error.details()


def refusal(channel: grpc.Channel, path: str, data: bytes) -> grpc.Call | None:
    """The error that a call ends with; None if it ends well."""
    try:
        # Read as a stream, which fits the methods that do not stream as well.
        list(channel.unary_stream(path)(data, timeout=WITHIN_S))
    except grpc.RpcError as error:
        return cast(grpc.Call, error)
    return None


@pytest.mark.parametrize("depth", [80, 110, 300, 900, 1100, 100_000])
@pytest.mark.parametrize("piece", ["[]", "{}"])
def test_json_of_any_depth_in_a_string_is_answered(channel: grpc.Channel, piece: str, depth: int) -> None:
    schema = "[" * depth + "]" * depth if piece == "[]" else '{"a":' * depth + "1" + "}" * depth
    request = full_chat()
    request.options.response_format.json_schema.schema = schema
    request.tools[0].function.parameters = json.dumps({"type": "object"})
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.unary_stream("/tandem.v1.Inference/ChatOnce")(request.SerializeToString(), timeout=WITHIN_S))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("metadata", [(("x-request-id", "a b"),), (("a-bin", b"\xff" * 500),), (("x", "y" * 9000),)])
def test_odd_metadata_is_no_fault_of_the_server(channel: grpc.Channel, metadata: tuple[tuple[str, str]]) -> None:
    call = channel.unary_unary("/tandem.v1.Inference/GenerateOnce")
    assert call(GENERATE.SerializeToString(), timeout=WITHIN_S, metadata=metadata)


def test_a_message_beyond_the_limit_is_refused(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/tandem.v1.Inference/GenerateOnce")(bytes(17 * 2**20), timeout=WITHIN_S)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
