import asyncio
import threading
from pathlib import Path

import pytest

from support.driver import make_adapter, until
from support.server import BASE, Connection, Served, adapter_id_of

PROMPT = "abcdefghij"


async def _load(served: Served, name: str, content: str, **fields):
    source = make_adapter(served.folder / content, content, **fields)
    return await served.http.post("/v1/adapters", json={"name": name, "source": source})


async def _names(served: Served) -> list[str]:
    return [entry["name"] for entry in (await served.http.get("/v1/adapters")).json()["data"]]


async def _text(served: Served, model: str) -> str:
    return (await served.complete(PROMPT, model=model))["choices"][0]["text"]


async def test_a_loaded_adapter_is_there_at_once_and_says_what_it_is(served: Served):
    response = await _load(served, "team/summary", "one")
    assert response.status_code == 200, response.text
    card = response.json()
    assert card["object"] == "adapter"
    assert (card["name"], card["state"], card["version"], card["num_requests"]) == ("team/summary", "staged", 1, 0)
    assert (card["lora_rank"], card["num_pages"], card["num_host_bytes"]) == (8, 1, 3)
    assert len(card["id"]) == 64
    assert card["source"] == str(served.folder / "one")
    assert (await served.http.get("/v1/adapters")).json() == {
        "object": "list",
        "has_more": False,
        "data": [card],
    }
    assert (await served.http.get("/v1/adapters/team/summary")).json() == card
    assert await _text(served, "team/summary") != await _text(served, BASE)


async def test_an_adapter_that_no_thread_can_be_started_for_is_unavailable_for_now(served: Served, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        refused = await _load(served, "a", "one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert (await _load(served, "a", "one")).status_code == 200


async def test_adapters_are_listed_in_pages_by_name(served: Served):
    for name in ("c", "a/1", "b", "d"):
        assert (await _load(served, name, name.replace("/", "-"))).status_code == 200
    pages, after = [], {}
    while True:
        page = (await served.http.get("/v1/adapters", params={"limit": 2, **after})).json()
        pages.append([card["name"] for card in page["data"]])
        if not page["has_more"]:
            break
        after = {"after": pages[-1][-1]}
    assert pages == [["a/1", "b"], ["c", "d"]]
    gone = (await served.http.get("/v1/adapters", params={"after": "bb"})).json()
    assert [card["name"] for card in gone["data"]] == ["c", "d"], "a name that is no more still says where to go on"
    for limit in ("0", "1001", "-1", "x", "1e2"):
        response = await served.http.get("/v1/adapters", params={"limit": limit})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "limit"


async def test_an_adapter_is_a_model_with_a_parent(served: Served):
    adapter_id = adapter_id_of(await _load(served, "team/summary", "one"))
    base, adapter = (await served.http.get("/v1/models")).json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == (BASE, None, 512)
    assert (adapter["id"], adapter["parent"], adapter["root"]) == ("team/summary", BASE, adapter_id)
    assert (await served.http.get("/v1/models/team/summary")).json() == adapter
    assert (await served.http.get(f"/v1/models/{BASE}:team/summary")).json() == adapter
    assert (await served.http.get(f"/v1/models/{BASE}")).json() == base
    assert (await served.http.get("/v1/models/other")).status_code == 404


async def test_the_base_may_be_written_before_the_adapter(served: Served):
    await _load(served, "a", "one")
    assert await _text(served, f"{BASE}:a") == await _text(served, "a")


@pytest.mark.parametrize("model", ["nope", f"{BASE}:nope", f"{BASE}:", "", "a:b", "x" * 100_000])
async def test_an_unknown_model_is_a_404_in_openais_shape(served: Served, model):
    status, error = await served.refused("/v1/completions", prompt="x", model=model)
    assert status == 404
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")
    assert len(error["message"]) < 300


async def test_replacing_changes_the_answer_at_once_and_frees_the_old_version(served: Served):
    first = adapter_id_of(await _load(served, "a", "one"))
    before = await _text(served, "a")
    response = await _load(served, "a", "two")
    assert response.json()["version"] == 2
    assert adapter_id_of(response) != first
    assert await _text(served, "a") != before
    host = served.client._parts.adapter_host
    await until(lambda: host.staged == {adapter_id_of(response)}, "the old version is freed")


async def test_requests_in_flight_keep_the_version_they_were_accepted_with(served: Served):
    await _load(served, "a", "one")
    expected = await _text(served, "a")
    served.executor.gate.clear()
    old = asyncio.create_task(_text(served, "a"))
    await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the request is accepted")
    loading = asyncio.create_task(_load(served, "a", "two"))
    await asyncio.sleep(0.05)
    served.executor.gate.set()
    assert (await loading).status_code == 200
    assert await old == expected
    assert await _text(served, "a") != expected


async def test_loading_the_same_bytes_again_changes_nothing(served: Served):
    first = adapter_id_of(await _load(served, "a", "one"))
    again = await _load(served, "a", "one")
    assert adapter_id_of(again) == first
    assert again.json()["version"] == 2
    await served.complete(PROMPT, model="a")
    assert served.client._parts.adapter_host.staged == {first}


async def test_two_names_may_mean_the_same_bytes_and_one_may_go(served: Served):
    first = adapter_id_of(await _load(served, "a", "one"))
    assert adapter_id_of(await _load(served, "b", "one")) == first
    expected = await _text(served, "a")
    assert (await served.http.delete("/v1/adapters/a")).status_code == 200
    assert await _text(served, "b") == expected
    assert (await served.http.delete("/v1/adapters/b")).status_code == 200
    assert served.client._parts.adapter_host.staged == set()


async def test_bytes_that_one_name_leaves_and_another_takes_at_the_same_time_stay(served: Served, monkeypatch):
    first = adapter_id_of(await _load(served, "a", "one"))
    lanes, num_read, gate = served.adapters._loading.lanes, 0, asyncio.Event()
    run = lanes.run

    async def run_and_wait(lane, *args, **fields):
        nonlocal num_read
        result = await run(lane, *args, **fields)
        if lane == "release":
            num_read += 1
            await gate.wait()
        return result

    monkeypatch.setattr(lanes, "run", run_and_wait)
    leaving = asyncio.create_task(_load(served, "a", "two"))
    await until(lambda: num_read == 1, "the first is about to mean other bytes")
    taking = asyncio.create_task(_load(served, "b", "one"))
    await until(lambda: num_read == 2, "the second is about to mean those")
    gate.set()
    assert adapter_id_of(await taking) == first
    await leaving
    assert served.adapters.host.is_staged(first)


async def test_unloading_frees_and_forgets(served: Served):
    await _load(served, "team/a", "one")
    response = await served.http.delete("/v1/adapters/team/a")
    assert response.status_code == 200
    assert response.json() == {"object": "adapter.deleted", "name": "team/a", "deleted": True}
    assert served.client._parts.adapter_host.staged == set()
    assert await _names(served) == []
    status, error = await served.refused("/v1/completions", prompt="x", model="team/a")
    assert (status, error["code"]) == (404, "model_not_found")


async def test_unloading_waits_for_running_requests_and_takes_no_new_ones(served: Served):
    await _load(served, "a", "one")
    expected = await _text(served, "a")
    served.executor.gate.clear()
    running = asyncio.create_task(_text(served, "a"))
    await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the request is accepted")
    deleting = asyncio.create_task(served.http.delete("/v1/adapters/a"))
    await until(lambda: served.adapters.get("a").state == "draining", "the adapter drains")
    card = (await served.http.get("/v1/adapters/a")).json()
    assert (card["state"], card["num_requests"]) == ("draining", 1)
    assert (await served.refused("/v1/completions", prompt="x", model="a"))[0] == 404
    assert [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]] == [BASE]
    assert not deleting.done()
    served.executor.gate.set()
    assert await running == expected
    assert (await deleting).status_code == 200
    assert served.client._parts.adapter_host.staged == set()


async def test_a_name_that_drains_can_be_loaded_again_afterwards(served: Served):
    await _load(served, "a", "one")
    served.executor.gate.clear()
    running = asyncio.create_task(_text(served, "a"))
    await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the request is accepted")
    deleting = asyncio.create_task(served.http.delete("/v1/adapters/a"))
    await until(lambda: served.adapters.get("a").state == "draining", "the adapter drains")
    loading = asyncio.create_task(_load(served, "a", "one"))
    await asyncio.sleep(0.02)
    served.executor.gate.set()
    expected = await running
    assert (await deleting).status_code == 200
    assert (await loading).status_code == 200
    assert await _text(served, "a") == expected


async def test_a_first_load_shows_as_loading(served: Served):
    loading = asyncio.create_task(_load(served, "slow", "one", seconds=0.3))
    await until(lambda: served.adapters.record("slow").step == "verifying", "the load has begun")
    (card,) = (await served.http.get("/v1/adapters")).json()["data"]
    assert (card["state"], card["id"], card["version"]) == ("verifying", None, 0)
    assert (await served.refused("/v1/completions", prompt="x", model="slow"))[0] == 404
    assert (await loading).json()["state"] == "staged"


async def test_loads_of_one_name_happen_one_after_the_other(served: Served):
    loads = [_load(served, "a", content, seconds=seconds) for content, seconds in (("one", 0.2), ("two", 0.0))]
    first, second = await asyncio.gather(*loads)
    assert (first.json()["version"], second.json()["version"]) == (1, 2)
    assert (await served.http.get("/v1/adapters/a")).json()["id"] == second.json()["id"]


async def test_a_load_goes_on_when_its_client_goes_away(served: Served):
    source = make_adapter(served.folder / "one", "one", seconds=0.2)
    loading = asyncio.create_task(served.adapters.load("a", source))
    await until(lambda: bool(served.adapters.entries), "the load has begun")
    loading.cancel()
    await until(lambda: served.adapters.get("a").state == "ready", "the load ends")


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"name": "b", "source": "{folder}/missing"}, 404, "source", "adapter_source_not_found"),
        ({"name": "b", "source": "{folder}/empty"}, 404, "source", "adapter_source_not_found"),
        ({"name": "b", "source": "/etc"}, 403, "source", "adapter_source_forbidden"),
        ({"name": "b", "source": "{folder}/../.."}, 403, "source", "adapter_source_forbidden"),
        ({"name": "b", "source": ""}, 422, "source", "adapter_invalid"),
        ({"name": BASE, "source": "{folder}/one"}, 400, "name", "invalid_value"),
        ({"name": "", "source": "{folder}/one"}, 400, "name", "invalid_value"),
        ({"name": "a b", "source": "{folder}/one"}, 400, "name", "invalid_value"),
        ({"name": f"{BASE}:a", "source": "{folder}/one"}, 400, "name", "invalid_value"),
        ({"name": "b"}, 400, "source", "invalid_value"),
        ({"name": "b", "source": 5}, 400, "source", "invalid_value"),
        ({"name": "b", "source": "{folder}/one", "rank": 8}, 400, "rank", "invalid_value"),
    ],
)
async def test_a_refused_adapter_is_a_4xx_that_says_why_and_changes_nothing(served: Served, body, status, param, code):
    await _load(served, "a", "one")
    expected = await _text(served, "a")
    (served.folder / "empty").mkdir()
    if isinstance(body.get("source"), str):
        body["source"] = body["source"].replace("{folder}", str(served.folder))
    response = await served.http.post("/v1/adapters", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert await _names(served) == ["a"]
    assert await _text(served, "a") == expected


async def test_a_refused_replacement_leaves_the_old_version_served(served: Served):
    await _load(served, "a", "one")
    expected = await _text(served, "a")
    (served.folder / "empty").mkdir()
    response = await served.http.post("/v1/adapters", json={"name": "a", "source": str(served.folder / "empty")})
    assert response.status_code == 404
    assert await _text(served, "a") == expected
    assert (await served.http.get("/v1/adapters/a")).json()["version"] == 1


async def test_unknown_adapters_are_404(served: Served):
    for method in ("GET", "DELETE"):
        response = await served.http.request(method, "/v1/adapters/no/such")
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "adapter_not_found", "name")
        assert "'no/such'" in error["message"]


async def test_mixed_load_replace_unload_and_requests_leave_nothing_behind(served: Served):
    """Every answer comes from a version that was current while its request ran; in the end nothing is held."""
    contents = ["one", "two", "three"]
    expected = {}
    for content in contents:
        await _load(served, "probe", content)
        expected[content] = await _text(served, "probe")

    async def churn(name: str) -> None:
        for round_index in range(6):
            source = str(served.folder / contents[round_index % 3])
            await served.http.post("/v1/adapters", json={"name": name, "source": source})
            if round_index % 3 == 2:
                await served.http.delete(f"/v1/adapters/{name}")

    async def ask(name: str) -> None:
        for _ in range(25):
            response = await served.http.post(
                "/v1/completions", json={"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": 64}
            )
            if response.status_code == 404:
                await asyncio.sleep(0.002)
            else:
                assert response.status_code == 200, response.text
                assert response.json()["choices"][0]["text"] in expected.values()

    async def drop(name: str) -> None:
        for _ in range(10):
            body = {"model": name, "prompt": PROMPT, "stream": True}
            connection = Connection(served.app, "/v1/completions", body)
            await asyncio.sleep(0.003)
            await connection.disconnect()

    await asyncio.gather(*(work(name) for name in ("x", "y") for work in (churn, ask, drop, ask)))
    for entry in served.adapters.entries:
        await served.adapters.unload(entry.name)
    host = served.client._parts.adapter_host
    await until(lambda: not host.staged, "everything is freed")
    await served.until_idle()


async def test_a_symbolic_link_out_of_the_allowed_folder_is_forbidden(served: Served, tmp_path_factory):
    outside = Path(make_adapter(tmp_path_factory.mktemp("outside") / "x"))
    (served.folder / "link").symlink_to(outside)
    response = await served.http.post("/v1/adapters", json={"name": "a", "source": str(served.folder / "link")})
    assert response.status_code == 403
