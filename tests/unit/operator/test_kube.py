"""What is asked of the API server, and what its refusals say."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_operator.kube import Kube, KubeError
from tandem_operator.names import FLEET, POD, SERVICE, STATEFUL_SET, Key


class Client:
    """Gives these answers, the last one to everything that comes after."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.asked: list[str] = []
        self.configuration = SimpleNamespace(host="https://kube")
        self.rest_client = self
        self._answers = list(answers)

    async def update_params_for_auth(self, *_: Any) -> None:
        return None

    async def request(self, method: str, url: str, **_: Any) -> Any:
        self.asked.append(f"{method} {url}")
        status, body = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

        async def read() -> bytes:
            return body if isinstance(body, bytes) else json.dumps(body).encode()

        return SimpleNamespace(status=status, read=read)


def page(*names: str, rest: str = "") -> tuple[int, Any]:
    return 200, {"metadata": {"resourceVersion": "7", "continue": rest}, "items": [{"name": name} for name in names]}


@pytest.mark.parametrize("items", [[{"metadata": {"name": "r1"}}], [], None])
async def test_an_object_of_a_name_is_found_by_the_right_to_list(items: list[Any] | None) -> None:
    client = Client((200, {"items": items}))
    assert await Kube(client).find(Key(SERVICE, "ai", "r1")) == (items[0] if items else None)
    assert client.asked == ["GET https://kube/api/v1/namespaces/ai/services?fieldSelector=metadata.name%3Dr1"]


async def test_a_listing_comes_in_pages() -> None:
    client = Client(page("a", "b", rest="to c"), page("c"))
    found = await Kube(client).list(FLEET, None)
    assert [one["name"] for one in found["items"]] == ["a", "b", "c"]
    assert found["metadata"]["resourceVersion"] == "7"
    where = "GET https://kube/apis/tandem.dev/v1alpha1/fleets"
    assert client.asked == [f"{where}?limit=500", f"{where}?limit=500&continue=to+c"]


async def test_a_listing_of_a_moment_that_the_server_has_forgotten_is_asked_for_as_a_whole() -> None:
    gone = (410, {"reason": "Expired", "message": "The provided continue parameter is too old"})
    client = Client(page("a", rest="to b"), gone, page("a", "b"))
    found = await Kube(client).list(POD, "ai")
    assert [one["name"] for one in found["items"]] == ["a", "b"]
    assert client.asked[-1] == "GET https://kube/api/v1/namespaces/ai/pods?labelSelector=tandem.dev%2Fgroup"


async def test_a_listing_that_is_gone_as_a_whole_too_is_an_error() -> None:
    with pytest.raises(KubeError, match="410"):
        await Kube(Client((410, {"reason": "Expired"}))).list(POD, "ai")


async def test_a_refusal_says_each_cause() -> None:
    causes = [{"reason": "FieldValueForbidden", "message": "Forbidden: no", "field": "spec"}, {"field": "x"}]
    said = {"kind": "Status", "reason": "Invalid", "message": "it is invalid", "details": {"causes": causes}}
    with pytest.raises(KubeError, match="422: it is invalid") as found:
        await Kube(Client((422, said))).apply(Key(STATEFUL_SET, "ai", "r1"), {})
    assert (found.value.said, found.value.causes) == ("it is invalid", ("Forbidden: no", ""))


@pytest.mark.parametrize("body", [b'{"kind": "Fle', b"<html>", b""])
async def test_an_answer_that_is_cut_short_or_a_proxys_is_as_if_the_server_were_away(body: bytes) -> None:
    with pytest.raises(KubeError, match="the answer is no JSON") as found:
        await Kube(Client((200, body))).get(Key(SERVICE, "ai", "r1"))
    assert found.value.status == 0
