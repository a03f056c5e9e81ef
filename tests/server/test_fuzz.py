"""Whatever JSON arrives, the answer is an answer or an error in OpenAI's shape, and never our own failure."""

import asyncio
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomona.server.protocol import (
    AdapterLoadRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from support.server import BASE, serve

_NUMBERS = st.integers() | st.integers(-3, 3) | st.sampled_from([2**31, 2**63, 2**64, 10**40]) | st.floats(width=32)
_SCALARS = st.none() | st.booleans() | _NUMBERS | st.text(st.characters(codec="utf-8"), max_size=8)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1", max_size=3), inner, max_size=3),
    max_leaves=5,
)
_LIKELY = {
    "model": st.just(BASE),
    "messages": st.just([{"role": "user", "content": "hi"}]),
    "prompt": st.sampled_from(["hi", ["a", "b"], [5, 6]]),
    "tokens": st.just([5, 6]),
    "n": st.integers(-1, 3),
    "stop": st.sampled_from(["a", ["b", "c"]]),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "500", "99999", "-1"]), _NUMBERS, max_size=2),
}
_ROUTES = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/adapters": AdapterLoadRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


@st.composite
def _bodies(draw, wire_type):
    required = [name for name, field in wire_type.model_fields.items() if field.is_required()]
    chosen = draw(st.sets(st.sampled_from(sorted(wire_type.model_fields)), max_size=4)) | set(required)
    body = {}
    for name in sorted(chosen):
        likely = _LIKELY.get(name, _NUMBERS)
        body[name] = draw(likely if draw(st.integers(0, 3)) else _JSON)
    return body


@pytest.mark.parametrize("path", _ROUTES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_json_makes_the_server_fail(tmp_path_factory, path, data):
    bodies = data.draw(st.lists(_bodies(_ROUTES[path]), min_size=5, max_size=5))

    async def send_all() -> None:
        async with serve(tmp_path_factory.getbasetemp() / "fuzz") as served:
            for body in bodies:
                response = await served.http.post(path, content=json.dumps(body).encode())
                assert response.status_code in (200, 400, 403, 404, 422), (body, response.text)
                if response.status_code != 200:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                elif response.headers["content-type"].startswith("text/event-stream"):
                    assert '"error"' not in response.text
            await served.until_idle()

    asyncio.run(send_all())
