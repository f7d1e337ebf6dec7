"""What is asked of the API server, and what its refusals say."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tandem_operator.kube import Kube, KubeError
from tandem_operator.names import SERVICE, STATEFUL_SET, Key


class Client:
    """Gives one answer to everything."""

    def __init__(self, status: int, body: Any) -> None:
        self.asked = ""
        self.configuration = SimpleNamespace(host="https://kube")
        self.rest_client = self
        self._status, self._body = status, body

    async def update_params_for_auth(self, *_: Any) -> None:
        return None

    async def request(self, method: str, url: str, **_: Any) -> Any:
        self.asked = f"{method} {url}"

        async def read() -> bytes:
            return json.dumps(self._body).encode()

        return SimpleNamespace(status=self._status, read=read)


@pytest.mark.parametrize("items", [[{"metadata": {"name": "r1"}}], [], None])
async def test_an_object_of_a_name_is_found_by_the_right_to_list(items: list[Any] | None) -> None:
    client = Client(200, {"items": items})
    assert await Kube(client).find(Key(SERVICE, "ai", "r1")) == (items[0] if items else None)
    assert client.asked == "GET https://kube/api/v1/namespaces/ai/services?fieldSelector=metadata.name%3Dr1"


async def test_a_refusal_says_each_cause() -> None:
    causes = [{"reason": "FieldValueForbidden", "message": "Forbidden: no", "field": "spec"}, {"field": "x"}]
    said = {"kind": "Status", "reason": "Invalid", "message": "it is invalid", "details": {"causes": causes}}
    with pytest.raises(KubeError, match="422: it is invalid") as found:
        await Kube(Client(422, said)).apply(Key(STATEFUL_SET, "ai", "r1"), {})
    assert (found.value.said, found.value.causes) == ("it is invalid", ("Forbidden: no", ""))
