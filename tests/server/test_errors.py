"""What goes wrong around a request, over a real socket where the socket matters."""

import asyncio
import json

import httpx
import pytest

from pomona.core.errors import (
    AccountConflictError,
    AdapterFailedError,
    EngineDiedError,
    EngineUnavailableError,
    PomonaError,
    QueueFullError,
    QuotaExceededError,
    RateLimitError,
)
from pomona.core.request import FinishReason
from pomona.server.config import ServerConfig
from pomona.server.errors import error_response
from pomona.text.tokenizer import Tokenizer
from support.server import BASE, Connection, ScriptedClient, Served, listen, output, scripted_app, serve
from support.tokenizers import make_tokenizer_files

COMPLETIONS = "/v1/completions"
GOOD = {"model": BASE, "prompt": "still there", "max_tokens": 64, "temperature": 0}


async def _is_well(http: httpx.AsyncClient) -> None:
    response = await http.post(COMPLETIONS, json=GOOD)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "still there"


@pytest.mark.parametrize(
    ("content", "status", "code", "message"),
    [
        (b"", 400, "invalid_json", "not valid JSON"),
        (b"{", 400, "invalid_json", "not valid JSON"),
        (b"\xff\xfe", 400, "invalid_json", "not valid UTF-8"),
        (b'{"model": "base", "prompt": "\xe4\xbd"}', 400, "invalid_json", "not valid UTF-8"),
        (b'{"model": "base", "prompt": "\\ud800"}', 400, "invalid_json", "not valid JSON"),
        (b"[" * 50_000, 400, "invalid_json", "recursion limit"),
        (b"[" * 200_000, 400, "invalid_json", "more than 100000 lists and objects"),
        (b"[1]", 400, "invalid_json", "must be a JSON object"),
        (b'{"model": "base", "prompt": "x", "temperature": NaN}', 400, "invalid_value", "temperature is nan"),
        (b'{"model": "base", "prompt": "x", "temperature": 1e999}', 400, "invalid_value", "temperature is inf"),
        (b'{"model": "base", "prompt": "x", "top_p": -Infinity}', 400, "invalid_value", "top_p is -inf"),
        (b'{"model": "base", "prompt": "' + b"x" * 10 * 2**20 + b'"}', 413, "body_too_large", "4194304 bytes"),
    ],
)
async def test_a_bad_body_is_refused_and_the_server_goes_on(served: Served, content, status, code, message):
    paths = [COMPLETIONS]
    if code != "invalid_value":
        paths += ["/v1/chat/completions", "/v1/adapters", "/tokenize", "/detokenize"]
    for path in paths:
        response = await served.http.post(path, content=content)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert message in error["message"]
    await _is_well(served.http)


async def test_text_with_a_token_that_the_model_does_not_have_is_refused(tmp_path):
    """A tokenizer may have got tokens after the model was made; what the model would read for them is not its own."""
    files = make_tokenizer_files(tmp_path / "tokenizer")
    vocab_size = Tokenizer.load(files).vocab_size
    config = json.loads((files / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(vocab_size): {"content": "<new>"}}
    (files / "tokenizer_config.json").write_text(json.dumps(config))
    async with serve(tmp_path, vocab_size=vocab_size) as served:
        assert served.tokenizer.vocab_size == vocab_size + 1
        messages = [{"role": "user", "content": "a <new> b"}]
        long = "word " * 1000 + "<new>"
        for path, body, param in (
            (COMPLETIONS, {"prompt": "a <new> b"}, "prompt"),
            (COMPLETIONS, {"prompt": long}, "prompt"),
            (COMPLETIONS, {"prompt": ["a", "a <new> b"]}, "prompt[1]"),
            (COMPLETIONS, {"prompt": [vocab_size]}, "prompt"),
            ("/v1/chat/completions", {"messages": messages}, "messages"),
            ("/tokenize", {"prompt": "a <new> b"}, "prompt"),
            ("/tokenize", {"messages": messages}, "messages"),
        ):
            status, error = await served.refused(path, **body)
            assert (status, error["code"], error["param"]) == (400, "invalid_value", param)
            if body["messages" if "messages" in body else "prompt"] != [vocab_size]:
                assert error["message"] == (
                    f"{param} holds '<new>', token {vocab_size}: the model has tokens below {vocab_size}"
                )
        await _is_well(served.http)


async def test_whoever_sends_too_much_gets_to_see_the_answer(tmp_path):
    async with serve(tmp_path) as served, listen(served.app) as url, httpx.AsyncClient(base_url=url) as http:
        for _ in range(3):
            response = await http.post(COMPLETIONS, content=b"x" * 10 * 2**20)
            assert response.status_code == 413
        await _is_well(http)


async def test_the_limit_counts_bytes_as_they_come_also_without_a_length(tmp_path):
    async def chunks():
        for _ in range(40):
            yield b" " * 1000

    config = ServerConfig(max_body_bytes=20_000)
    async with serve(tmp_path, config) as served, listen(served.app) as url, httpx.AsyncClient(base_url=url) as http:
        response = await http.post(COMPLETIONS, content=chunks())
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "The request body is larger than the limit of 20000 bytes."
        await _is_well(http)


async def test_a_body_just_at_the_limit_is_taken(tmp_path):
    body = json.dumps(GOOD).encode()
    async with serve(tmp_path, ServerConfig(max_body_bytes=len(body))) as served:
        assert (await served.http.post(COMPLETIONS, content=body)).status_code == 200
        assert (await served.http.post(COMPLETIONS, content=body + b" ")).status_code == 413


async def test_a_client_that_goes_away_while_it_sends_is_no_error(served: Served):
    connection = Connection(served.app, COMPLETIONS, {})
    connection._inbox.get_nowait()
    connection._inbox.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    await connection.disconnect()
    assert "pomona_internal_errors_total 0.0" in (await served.http.get("/metrics")).text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", COMPLETIONS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
    ],
)
async def test_unknown_paths_and_methods_have_openais_shape(served: Served, method, path, status, code):
    response = await served.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [
        ([QueueFullError("1024 requests wait, the limit is 1024")], 429, "queue_full"),
        ([EngineUnavailableError("it is restarting")], 503, "engine_unavailable"),
        ([output(finish_reason=FinishReason.FAIL, error="logits are not finite")], 500, "request_failed"),
        ([output(40), output(finish_reason=FinishReason.ABORT)], 503, "request_aborted"),
        ([output(40)], 200, None),
    ],
)
async def test_an_end_without_an_answer_has_its_status(tmp_path, script, status, code):
    if code is None:
        script = [*script, output(finish_reason=FinishReason.LENGTH)]
    connection = Connection(scripted_app(ScriptedClient([script]), tmp_path), COMPLETIONS, GOOD)
    await connection.done
    assert connection.messages[0]["status"] == status
    if code is not None:
        error = json.loads(connection.body)["error"]
        assert error["code"] == code
        assert "retry-after" in {name.decode() for name, _ in connection.messages[0]["headers"]} or status == 500


async def test_a_failure_while_the_engine_restarts_is_unavailability(tmp_path):
    client = ScriptedClient([[output(finish_reason=FinishReason.FAIL, error="the process died")]])
    client.is_ready = False
    connection = Connection(scripted_app(client, tmp_path), COMPLETIONS, GOOD)
    await connection.done
    assert connection.messages[0]["status"] == 503


async def test_a_stream_of_outputs_that_just_stops_is_not_taken_for_an_answer(tmp_path):
    for n, scripts in ((1, [[output(40)]]), (2, [[output(40)], [None]])):
        connection = Connection(scripted_app(ScriptedClient(scripts), tmp_path), COMPLETIONS, {**GOOD, "n": n})
        await connection.done
        assert connection.messages[0]["status"] == 503


async def test_a_full_queue_is_a_429_and_passes(tmp_path):
    async with serve(tmp_path, max_waiting=1, max_num_seqs=1) as served:
        served.executor.gate.clear()
        first = [asyncio.create_task(served.http.post(COMPLETIONS, json=GOOD)) for _ in range(6)]
        await asyncio.sleep(0.05)
        served.executor.gate.set()
        responses = await asyncio.gather(*first)
        statuses = sorted(response.status_code for response in responses)
        assert set(statuses) == {200, 429}
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        await _is_well(served.http)
        await served.until_idle()


@pytest.mark.parametrize(
    ("error", "can_pass"),
    [
        (AdapterFailedError("a"), False),
        (AccountConflictError("a"), False),
        (QuotaExceededError("a", 86_400.0), False),
        (RateLimitError("a", None), False),
        (RateLimitError("a", 0.5), True),
        (QueueFullError("a"), True),
        (EngineDiedError("a"), False),
        (EngineUnavailableError("a"), True),
    ],
)
def test_clients_are_told_not_to_repeat_what_cannot_pass(error: PomonaError, can_pass: bool):
    """OpenAI's clients repeat 409 and 429 unless that header says otherwise."""
    assert error_response(error).headers.get("x-should-retry") == (None if can_pass else "false")


async def test_a_bug_of_ours_is_a_500_that_tells_nothing_and_counts(tmp_path, caplog):
    class Broken(ScriptedClient):
        async def submit(self, request):
            raise ZeroDivisionError("the secret inside")
            yield

    app = scripted_app(Broken([]), tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        response = await http.post(COMPLETIONS, json=GOOD)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in caplog.text
        assert "the secret inside" in caplog.text
        metrics = (await http.get("/metrics")).text
        assert "pomona_internal_errors_total 1.0" in metrics
        assert 'pomona_http_requests_total{method="POST",route="/v1/completions",status="500"} 1.0' in metrics


class TestKey:
    @pytest.fixture
    async def http(self, tmp_path):
        async with serve(tmp_path, ServerConfig(api_key="sk-right")) as served:
            yield served.http

    @pytest.mark.parametrize(
        "header", [None, "", "sk-right", "Bearer", "Bearer sk-wrong", "Basic sk-right", "bearer é"]
    )
    async def test_without_the_key_there_is_nothing_but_health(self, http, header):
        headers = {} if header is None else {"authorization": header.encode("utf-8")}
        for method, path in (
            ("GET", "/v1/models"),
            ("POST", COMPLETIONS),
            ("POST", "/v1/adapters"),
            ("DELETE", "/v1/adapters/a"),
            ("POST", "/tokenize"),
            ("GET", "/metrics"),
            ("GET", "/openapi.json"),
            ("GET", "/docs"),
            ("GET", "/nope"),
        ):
            response = await http.request(method, path, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health", headers=headers)).status_code == 200
        assert (await http.get("/ready", headers=headers)).status_code == 200

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    async def test_with_the_key_everything_works(self, http, scheme):
        headers = {"authorization": f"{scheme} sk-right"}
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.post(COMPLETIONS, json=GOOD, headers=headers)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/admin/tenants", "/v1/files", "/v1/usage?group_by=day"])
async def test_what_only_servers_with_accounts_have_says_how_to_get_it(served: Served, path):
    error = (await served.http.get(path)).json()["error"]
    assert error["message"].endswith(" here. It needs a server with accounts: pomona serve --accounts.")
    assert "accounts" not in (await served.http.get("/v1/embeddings")).json()["error"]["message"]
