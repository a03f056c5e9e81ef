"""/tokenize, /detokenize, /health, /ready, /metrics, and the OpenAPI document."""

import re
import threading
import time

import httpx
import msgspec
import pytest

from pomona.core.output import EngineStats
from pomona.core.request import FinishReason
from pomona.metrics.registry import LEDGER_METRICS, METRICS, RESIDENCY_METRICS
from pomona.server import responses
from pomona.server.config import ServerConfig
from support.driver import make_adapter
from support.server import BASE, Connection, ScriptedClient, Served, output, scripted_app, serve


async def test_a_text_can_be_tokenized_and_back(served: Served):
    text = "The quick 你好 <|im_end|>"
    answer = (await served.http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    assert answer["tokens"] == served.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 512)
    assert answer["token_strs"][-1] == "<|im_end|>"
    back = await served.http.post("/detokenize", json={"model": BASE, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}


async def test_a_conversation_can_be_tokenized(served: Served):
    messages = [{"role": "user", "content": "hi"}]
    answer = (await served.http.post("/tokenize", json={"messages": messages})).json()
    await served.chat("hi")
    assert tuple(answer["tokens"]) == served.executor.seen[0].token_ids
    assert answer["token_strs"] is None


async def test_many_token_texts_are_made_beside_the_event_loop(served: Served, monkeypatch) -> None:
    text_of, makers = served.tokenizer.token_text, set()

    def noted(_, token_id: int) -> str:
        makers.add(threading.current_thread())
        return text_of(token_id)

    monkeypatch.setattr(type(served.tokenizer), "token_text", noted)
    body = {"prompt": "one " * 5000, "return_token_strs": True}
    answer = (await served.http.post("/tokenize", json=body)).json()
    assert len(answer["token_strs"]) == answer["count"] > 4096
    assert threading.main_thread() not in makers


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [99999]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nope"}, 404, "model"),
    ],
)
async def test_wrong_tokenization_requests_are_refused(served: Served, path, body, status, param):
    response = await served.http.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_health_follows_the_engine(tmp_path):
    client = ScriptedClient([])
    app = scripted_app(client, tmp_path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        for path in ("/health", "/ready"):
            client.is_ready = True
            response = await http.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok", "engine": "ready"})
            client.is_ready = False
            response = await http.get(path)
            assert response.status_code == 503
            assert response.json() == {"status": "unavailable", "engine": "restarting: it died"}


async def test_strangers_do_not_learn_why_an_engine_failed(tmp_path):
    client = ScriptedClient([])
    client.is_ready = False
    app = scripted_app(client, tmp_path, ServerConfig(api_key="sk"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "unavailable", "engine": "restarting"})


def _value(text: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert found is not None, series
    return float(found[1])


async def test_every_metric_of_the_registry_is_exported_as_defined(served: Served):
    expected = [metric for metric in METRICS if metric not in LEDGER_METRICS]
    await served.complete("one two")
    text = (await served.http.get("/metrics")).text
    for metric in expected:
        assert f"# TYPE {metric.name} {metric.kind}" in text
        assert f"# HELP {metric.name} {metric.help}" in text
    exported = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    assert exported == {metric.name for metric in expected}


def test_the_registry_keeps_its_own_rules():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("pomona_")
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.unit != "seconds" or metric.name.removesuffix("_total").endswith("_seconds")
    engine_stats = {metric.stat for metric in METRICS if metric not in RESIDENCY_METRICS + LEDGER_METRICS} - {None}
    assert engine_stats == set(EngineStats.__dataclass_fields__)


async def test_requests_are_counted_and_measured_by_adapter_name(served: Served):
    await served.adapters.load("legal", make_adapter(served.folder / "one"))
    answer = await served.complete("one two three", model="legal")
    await served.complete("one two", n=2, stop="tw")
    text = (await served.http.get("/metrics")).text
    assert _value(text, 'pomona_requests_total{adapter="legal",finish_reason="stop"}') == 1
    assert _value(text, 'pomona_requests_total{adapter="base",finish_reason="stop"}') == 2
    usage = answer["usage"]
    assert _value(text, 'pomona_prompt_tokens_total{adapter="legal"}') == usage["prompt_tokens"]
    assert _value(text, 'pomona_output_tokens_total{adapter="legal"}') == usage["completion_tokens"]
    for name in ("time_to_first_token", "e2e_latency", "queue_time", "time_per_output_token"):
        assert _value(text, f'pomona_{name}_seconds_count{{adapter="legal"}}') == 1
    num_gaps = usage["completion_tokens"] - 1
    assert _value(text, 'pomona_inter_token_latency_seconds_count{adapter="legal"}') == num_gaps
    assert _value(text, "pomona_loaded_adapters") == 1
    assert _value(text, "pomona_engine_ready") == 1
    route = 'pomona_http_requests_total{method="POST",route="/v1/completions",status="200"}'
    assert _value(text, route) == 2


async def test_rejected_and_failed_requests_are_counted_as_such(tmp_path):
    async with serve(tmp_path, max_waiting=1, max_num_seqs=1) as served:
        body = {"model": BASE, "prompt": "x", "n": 8, "max_tokens": 400, "ignore_eos": True}
        assert (await served.http.post("/v1/completions", json=body)).status_code == 429
        served.executor.fail_with = "it broke"
        assert (await served.http.post("/v1/completions", json={**body, "n": 1})).status_code == 500
        served.executor.fail_with = None
        ended, deadline_s = 0.0, time.monotonic() + 30
        while ended < 9 and time.monotonic() < deadline_s:  # who was aborted ends when the engine has let go of it
            text = (await served.http.get("/metrics")).text
            ended = sum(
                _value(text, f'pomona_requests_total{{adapter="base",finish_reason="{reason}"}}')
                for reason in ("reject", "fail", "abort")
                if f'finish_reason="{reason}"' in text
            )
        assert ended == 9
        assert _value(text, 'pomona_requests_total{adapter="base",finish_reason="reject"}') >= 1
        assert _value(text, 'pomona_requests_total{adapter="base",finish_reason="fail"}') == 1


async def test_labels_are_bounded_whatever_clients_ask(tmp_path):
    async with serve(tmp_path, ServerConfig(max_adapter_labels=2)) as served:
        for name in ("a", "b", "c", "d"):
            await served.adapters.load(name, make_adapter(served.folder / name, name))
            await served.complete("x", model=name)
        for number in range(5):
            await served.http.get(f"/nope/{number}")
            await served.http.request(f"METHOD{number}", "/health")
        text = (await served.http.get("/metrics")).text
        assert set(re.findall(r'pomona_requests_total{adapter="([^"]+)"', text)) == {"a", "b", "(other)"}
        assert _value(text, 'pomona_requests_total{adapter="(other)",finish_reason="stop"}') == 2
        assert _value(text, 'pomona_http_requests_total{method="GET",route="unmatched",status="404"}') == 5
        assert "METHOD" not in text


async def test_an_adapter_called_other_is_not_counted_with_those_past_the_cap(tmp_path):
    async with serve(tmp_path, ServerConfig(max_adapter_labels=2)) as served:
        for name in ("other", "b", "c"):
            await served.adapters.load(name, make_adapter(served.folder / name, name))
            await served.complete("x", model=name)
        text = (await served.http.get("/metrics")).text
        assert _value(text, 'pomona_requests_total{adapter="other",finish_reason="stop"}') == 1


async def test_a_gone_client_is_counted(tmp_path):
    app = scripted_app(ScriptedClient([[output(40), None]]), tmp_path)
    connection = Connection(app, "/v1/completions", {"model": BASE, "prompt": "x"})
    await connection.disconnect()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
        text = (await http.get("/metrics")).text
    assert _value(text, 'pomona_http_requests_total{method="POST",route="/v1/completions",status="499"}') == 1


async def test_every_answer_has_the_shape_that_the_document_promises(served: Served):
    document = (await served.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    text = msgspec.json.encode(document).decode()
    assert set(re.findall(r'"#/components/schemas/(\w+)"', text)) <= set(schemas)
    for path, route in document["paths"].items():
        for method, operation in route.items():
            parameters = operation.get("parameters", [])
            declared = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
            assert declared == re.findall(r"{(\w+)}", path)
            assert "200" in operation["responses"]
            for status, answer in operation["responses"].items():
                if int(status) >= 400 and status != "503":
                    content = answer["content"]["application/json"]
                    assert content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
            if method == "post":
                body = operation["requestBody"]["content"]["application/json"]
                name = body["schema"]["$ref"].rsplit("/", 1)[1]
                assert schemas[name].get("required") or name == "TokenizeRequest"
                assert body["example"]
    whole = await served.http.post("/v1/completions", json={"model": BASE, "prompt": "x", "logprobs": 1})
    msgspec.json.decode(whole.content, type=responses.Completion)
    models = await served.http.get("/v1/models")
    msgspec.json.decode(models.content, type=responses.ModelList)


async def test_the_examples_of_the_document_work(served: Served):
    document = (await served.http.get("/openapi.json")).json()
    num_tried = 0
    for path, route in document["paths"].items():
        if "post" in route and path != "/v1/adapters":
            example = route["post"]["requestBody"]["content"]["application/json"]["example"]
            response = await served.http.post(path, json=example)
            assert response.status_code == 200, response.text
            num_tried += 1
    assert num_tried == 4


async def test_the_document_names_the_key_if_there_is_one(tmp_path):
    async with serve(tmp_path, ServerConfig(api_key="sk")) as served:
        document = (await served.http.get("/openapi.json", headers={"authorization": "Bearer sk"})).json()
        assert document["components"]["securitySchemes"] == {"api_key": {"type": "http", "scheme": "bearer"}}


async def test_a_finished_answer_ends_its_request_once(tmp_path):
    client = ScriptedClient([[output(40, finish_reason=FinishReason.LENGTH)]])
    connection = Connection(scripted_app(client, tmp_path), "/v1/completions", {"model": BASE, "prompt": "x"})
    await connection.done
    assert client.aborted == []
    assert client.num_open == 0
