"""Adapters brought in by the first request that names them: budgets, failures, and what people see."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest

from pomona.adapters.stores import FolderStore, StoredAdapter
from pomona.server.adapter_loading import ResidencyLimits
from support.driver import make_adapter, until
from support.server import Served, serve

PROMPT = "abcdefghij"


class CountingStore:
    """A folder store that counts how often it is asked."""

    def __init__(self, root: Path) -> None:
        self._store = FolderStore(root)
        self.asked: list[str] = []
        self.gate = threading.Event()
        """While it is clear, the store does not answer."""
        self.gate.set()

    def list(self) -> list[StoredAdapter]:
        return self._store.list()

    def find(self, name: str) -> StoredAdapter | None:
        self.asked.append(name)
        assert self.gate.wait(20)
        return self._store.find(name)


@contextlib.asynccontextmanager
async def served_folder(folder: Path, **limits):
    """A server whose names are the folder's sub-folders."""
    store = CountingStore(folder)
    residency = ResidencyLimits(**{"host_adapter_bytes": 2**20, "load_wait_s": 20.0, **limits})
    async with serve(folder, stores=(store,), residency=residency) as served:
        served.adapters.announce(adapter for adapter in store.list() if adapter.name != "tokenizer")
        yield served, store


async def _ask(served: Served, model: str):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    return await served.http.post("/v1/completions", json=body)


async def _text(served: Served, model: str) -> str:
    answer = await _ask(served, model)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def _card(served: Served, name: str):
    return (await served.http.get(f"/v1/adapters/{name}")).json()


def _staged(served: Served):
    return served.client._parts.adapter_host.staged


async def test_a_registered_adapter_is_brought_in_by_its_first_request_once_however_many_wait(tmp_path: Path):
    make_adapter(tmp_path / "a", "x" * 100, seconds=0.1)
    async with served_folder(tmp_path) as (served, _):
        card = await _card(served, "a")
        assert (card["state"], card["version"], card["id"], card["num_loads"]) == ("registered", 1, None, 0)
        assert "a" in [model["id"] for model in (await served.http.get("/v1/models")).json()["data"]]
        assert len(set(await asyncio.gather(*(_text(served, "a") for _ in range(8))))) == 1
        card = await _card(served, "a")
        assert (card["state"], card["num_loads"], card["num_misses"], card["num_hits"]) == ("resident", 1, 8, 0)
        assert card["stage_s"] >= 0.1
        await _text(served, "a")
        assert (await _card(served, "a"))["num_hits"] == 1


async def test_host_memory_stays_within_its_budget_and_every_request_is_answered(tmp_path: Path):
    names = [f"a{index}" for index in range(12)]
    for name in names:
        make_adapter(tmp_path / name, name * 40)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(80))
    async with served_folder(tmp_path, host_adapter_bytes=400) as (served, _):
        expected = {}
        for name in names:
            expected[name] = await _text(served, name)
            assert served.adapters.host.cache.num_bytes <= 400
        asked = [name for index in range(6) for name in names[index:] + names[:index]]
        answers = await asyncio.gather(*(_text(served, name) for name in asked))
        assert answers == [expected[name] for name in asked]
        await until(lambda: served.adapters.host.cache.num_reserved_bytes == 0, "nothing is under way")
        assert set(served.adapters.host.cache.ids) == _staged(served)
        assert served.adapters.host.cache.num_bytes <= 400
        assert served.adapters.host.cache.num_evictions > 12
        assert all(served.adapters.host.cache.num_holds(adapter_id) == 0 for adapter_id in _staged(served))


async def test_what_is_in_use_is_not_evicted_and_who_waits_too_long_is_told_to_come_back(tmp_path: Path):
    for name in ("a", "b"):
        make_adapter(tmp_path / name, name * 100)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(100))
    async with served_folder(tmp_path, host_adapter_bytes=350, load_wait_s=0.2) as (served, _):
        expected = await _text(served, "a")
        served.executor.gate.clear()
        running = asyncio.create_task(_text(served, "a"))
        await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the request is accepted")
        refused = await _ask(served, "b")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        assert len(_staged(served)) == 1
        served.executor.gate.set()
        assert await running == expected
        assert (await _ask(served, "b")).status_code == 200
        assert len(_staged(served)) == 1


async def test_a_name_that_no_store_has_is_asked_for_once(tmp_path: Path):
    async with served_folder(tmp_path) as (served, store):
        for _ in range(5):
            assert (await _ask(served, "nope")).status_code == 404
        for model in ("../etc", "a/../b", "x" * 500, "a b"):
            assert (await _ask(served, model)).status_code == 404
        assert store.asked == ["nope"]


async def test_an_adapter_that_comes_later_is_found(tmp_path: Path):
    async with served_folder(tmp_path) as (served, _):
        make_adapter(tmp_path / "late", "late")
        assert (await _card(served, "late"))["state"] == "registered"
        await _text(served, "late")


async def test_a_failure_is_a_state_that_ends_when_the_source_is_back(tmp_path: Path):
    (tmp_path / "a").mkdir()
    make_adapter(tmp_path / "other", "other")
    async with served_folder(tmp_path) as (served, _):
        assert (await _ask(served, "a")).status_code == 404
        card = await _card(served, "a")
        assert (card["state"], card["num_failures"]) == ("failed", 1)
        assert "holds no adapter" in card["error"]
        assert 0 < card["retry_s"] <= 0.5
        assert (await _ask(served, "a")).status_code == 404
        assert (await _card(served, "a"))["num_failures"] == 1
        await _text(served, "other")
        make_adapter(tmp_path / "a", "a")
        await asyncio.sleep(card["retry_s"])
        await _text(served, "a")
        assert (await _card(served, "a"))["error"] is None


async def test_a_link_out_of_the_folder_is_refused_and_read_never(tmp_path: Path, tmp_path_factory):
    outside = make_adapter(tmp_path_factory.mktemp("outside") / "x")
    (tmp_path / "link").symlink_to(outside)
    async with served_folder(tmp_path) as (served, _):
        answer = await _ask(served, "link")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_failed")
        assert (await _card(served, "link"))["state"] == "failed"
        assert not _staged(served)


async def test_other_bytes_at_the_source_are_a_new_version_when_it_is_read_again(tmp_path: Path):
    for name in ("a", "b"):
        make_adapter(tmp_path / name, name * 100)
    async with served_folder(tmp_path, host_adapter_bytes=150) as (served, _):
        first = await _text(served, "a")
        make_adapter(tmp_path / "a", "new" * 40)
        assert await _text(served, "a") == first
        await _text(served, "b")
        assert (await _card(served, "a"))["state"] == "registered"
        await _text(served, "a")
        assert (await _card(served, "a"))["version"] == 2


async def test_what_was_loaded_by_name_is_never_replaced_by_other_bytes_behind_ones_back(tmp_path: Path):
    for name in ("a", "b"):
        make_adapter(tmp_path / name, name * 100)
    async with served_folder(tmp_path, host_adapter_bytes=150) as (served, _):
        body = {"name": "mine", "source": str(tmp_path / "a")}
        assert (await served.http.post("/v1/adapters", json=body)).status_code == 200
        make_adapter(tmp_path / "a", "new" * 40)
        await _text(served, "b")
        answer = await _ask(served, "mine")
        assert answer.status_code == 409
        assert "load it again" in answer.json()["error"]["message"]
        assert (await served.http.post("/v1/adapters", json=body)).json()["version"] == 2
        await _text(served, "mine")


async def test_a_pinned_adapter_stays(tmp_path: Path):
    for index in range(6):
        make_adapter(tmp_path / f"a{index}", f"a{index}" * 50)
    async with served_folder(tmp_path, host_adapter_bytes=300) as (served, _):
        await _text(served, "a0")
        answer = await served.http.patch("/v1/adapters/a0", json={"pinned": True})
        assert (answer.status_code, answer.json()["pinned"]) == (200, True)
        for index in range(1, 6):
            await _text(served, f"a{index}")
        assert (await _card(served, "a0"))["num_loads"] == 1
        assert (await served.http.patch("/v1/adapters/a5", json={"pinned": True})).status_code == 400
        await served.http.patch("/v1/adapters/a0", json={"pinned": False})
        for index in range(1, 6):
            await _text(served, f"a{index}")
            await _text(served, f"a{index}")
        assert (await _card(served, "a0"))["state"] == "registered"


async def test_what_does_not_fit_beside_pinned_adapters_is_refused_and_keeps_nobody_waiting(tmp_path: Path):
    for name, size in (("pinned", 100), ("large", 100), ("small", 20)):
        make_adapter(tmp_path / name, name[0] * size)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(size))
    async with served_folder(tmp_path, host_adapter_bytes=350) as (served, _):
        await _text(served, "pinned")
        await served.http.patch("/v1/adapters/pinned", json={"pinned": True})
        for refused in (
            await _ask(served, "large"),
            await served.http.post("/v1/adapters", json={"name": "new", "source": str(tmp_path / "large")}),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
            assert "pinned adapters leave" in refused.json()["error"]["message"]
        await _text(served, "small")
        await served.http.patch("/v1/adapters/pinned", json={"pinned": False})
        await until(lambda: served.adapters.record("large").retry_at_s < time.monotonic(), "it may be tried again")
        await _text(served, "large")


async def test_names_pinned_before_they_were_read_keep_no_more_than_half_of_the_budget(tmp_path: Path):
    names = [f"a{index}" for index in range(4)]
    for name in names:
        make_adapter(tmp_path / name, name * 50)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(100))
    async with served_folder(tmp_path, host_adapter_bytes=500) as (served, _):
        for name in names:
            answer = await served.http.patch(f"/v1/adapters/{name}", json={"pinned": True})
            assert answer.status_code == 200
        for name in (*names, *names):
            await _text(served, name)
        assert [(await _card(served, name))["num_loads"] for name in names[:2]] == [1, 1]


async def test_a_load_that_waits_for_room_goes_on_when_an_adapter_is_unpinned(tmp_path: Path):
    for name, size in (("pinned", 100), ("used", 100), ("next", 110)):
        make_adapter(tmp_path / name, name[0] * size)
        (tmp_path / name / "adapter_model.safetensors").write_bytes(bytes(size))
    async with served_folder(tmp_path, host_adapter_bytes=500) as (served, _):
        for name in ("pinned", "used"):
            await _text(served, name)
        await served.http.patch("/v1/adapters/pinned", json={"pinned": True})
        served.executor.gate.clear()
        requests = [asyncio.create_task(_text(served, "used"))]
        await until(lambda: served.adapters.num_requests(served.adapters.get("used")) == 1, "the request is accepted")
        requests.append(asyncio.create_task(_text(served, "next")))
        await until(lambda: served.adapters.num_waiting == 1, "the other one waits")
        served.adapters.pin("pinned", is_pinned=False)
        await until(lambda: served.adapters.record("pinned").num_evictions == 1, "room is made")
        served.executor.gate.set()
        await asyncio.gather(*requests)


async def test_unloading_a_stores_name_frees_it_until_it_is_loaded_again(tmp_path: Path):
    make_adapter(tmp_path / "a", "a")
    async with served_folder(tmp_path) as (served, _):
        await _text(served, "a")
        assert (await served.http.delete("/v1/adapters/a")).status_code == 200
        assert not _staged(served)
        assert (await _ask(served, "a")).status_code == 404
        body = {"name": "a", "source": str(tmp_path / "a")}
        assert (await served.http.post("/v1/adapters", json=body)).status_code == 200
        await _text(served, "a")


async def test_an_unload_while_adapters_are_staged_again_stops_no_others(tmp_path: Path, monkeypatch):
    for name, seconds in (("a", 0.4), ("b", 0.2), ("c", 0.0)):
        make_adapter(tmp_path / name, name, seconds=seconds)
    async with served_folder(tmp_path) as (served, _):
        for name in "abc":
            await _text(served, name)
        monkeypatch.setattr(type(served.client), "num_restarts", 1)
        served.adapters.restage()
        assert (await served.http.delete("/v1/adapters/b")).status_code == 200
        async with asyncio.timeout(10):
            while (await _card(served, "c"))["state"] == "registered":
                await asyncio.sleep(0.02)


async def test_a_name_that_was_loaded_anew_while_adapters_are_staged_again_is_not_served_as_it_was(
    tmp_path: Path, monkeypatch
):
    for name, seconds in (("a", 0.4), ("b", 0.4), ("new" * 50, 0.0), ("other" * 30, 0.0)):
        make_adapter(tmp_path / name[:5], name, seconds=seconds)
    async with served_folder(tmp_path, host_adapter_bytes=200) as (served, _):
        for name in "ab":
            await _text(served, name)
        monkeypatch.setattr(type(served.client), "num_restarts", 1)
        served.adapters.restage()
        # The new one is the first version under its name, as the old one was.
        assert (await served.http.delete("/v1/adapters/b")).status_code == 200
        body = {"name": "b", "source": str(tmp_path / "newne")}
        assert (await served.http.post("/v1/adapters", json=body)).status_code == 200
        await until(lambda: served.adapters.record("a").num_loads == 2, "the first is staged again")
        await _text(served, "other")  # the new one has to go for it
        assert await _text(served, "b") == await _text(served, "newne")


async def test_what_was_at_the_source_of_before_says_nothing_of_a_name_that_was_loaded_anew(tmp_path: Path):
    make_adapter(tmp_path / "a", seconds=0.3)
    (tmp_path / "a" / "weights").unlink()
    for name in ("new", "other"):
        make_adapter(tmp_path / name, name * 100)
    async with served_folder(tmp_path, host_adapter_bytes=520) as (served, _):
        early = asyncio.create_task(_ask(served, "a"))
        await until(lambda: served.adapters.num_waiting == 1, "the request waits")
        body = {"name": "a", "source": str(tmp_path / "new")}
        assert (await served.http.post("/v1/adapters", json=body)).status_code == 200
        assert (await early).status_code == 404
        assert (await _card(served, "a"))["error"] is None
        await _text(served, "other")
        await until(lambda: len(_staged(served)) == 1, "it had to go")
        await _text(served, "a")


async def test_a_request_for_a_name_that_is_being_unloaded_does_not_bring_it_back(tmp_path: Path):
    make_adapter(tmp_path / "a", "a")
    async with served_folder(tmp_path) as (served, store):
        await _text(served, "a")
        served.executor.gate.clear()
        running = asyncio.create_task(_text(served, "a"))
        await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the request is accepted")
        store.gate.clear()
        unload = asyncio.create_task(served.http.delete("/v1/adapters/a"))
        await until(lambda: served.adapters.num_ready == 0, "it drains")
        late = asyncio.create_task(_ask(served, "a"))
        served.executor.gate.set()
        await running
        assert (await unload).status_code == 200
        store.gate.set()
        assert (await late).status_code == 404
        assert (await _ask(served, "a")).status_code == 404


async def test_what_a_store_says_after_a_name_was_loaded_and_unloaded_comes_too_late(tmp_path: Path):
    async with served_folder(tmp_path) as (served, store):
        make_adapter(tmp_path / "a", "a")
        store.gate.clear()
        early = asyncio.create_task(_ask(served, "a"))
        await until(lambda: store.asked == ["a"], "the store is asked")
        body = {"name": "a", "source": str(tmp_path / "a")}
        assert (await served.http.post("/v1/adapters", json=body)).status_code == 200
        assert (await served.http.delete("/v1/adapters/a")).status_code == 200
        store.gate.set()
        assert (await early).status_code == 404
        assert (await _ask(served, "a")).status_code == 404


async def test_requests_of_others_go_on_while_an_adapter_is_brought_in(tmp_path: Path):
    make_adapter(tmp_path / "slow", "slow", seconds=1)
    make_adapter(tmp_path / "quick", "quick")
    async with served_folder(tmp_path) as (served, _):
        slow = asyncio.create_task(_text(served, "slow"))
        await until(lambda: served.adapters.num_waiting == 1, "the request waits")
        while (state := (await _card(served, "slow"))["state"]) != "verifying":
            assert state == "fetching"
        await _text(served, "quick")
        assert not slow.done()
        await slow


@pytest.mark.parametrize("num_gone", [1, 3])
async def test_clients_that_go_away_while_they_wait_leave_nothing_held(tmp_path: Path, num_gone):
    make_adapter(tmp_path / "a", "a", seconds=0.2)
    async with served_folder(tmp_path) as (served, _):
        tasks = [asyncio.create_task(_text(served, "a")) for _ in range(3)]
        await until(lambda: served.adapters.num_waiting == 3, "all wait")
        for task in tasks[:num_gone]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: bool(_staged(served)), "it is brought in all the same")
        (adapter_id,) = _staged(served)
        await until(lambda: served.adapters.host.cache.num_holds(adapter_id) == 0, "nobody holds it")
        assert (await served.http.delete("/v1/adapters/a")).status_code == 200
        assert not _staged(served)


async def test_an_unload_between_the_ends_of_two_loads_disturbs_neither(tmp_path: Path):
    make_adapter(tmp_path / "slow", "slow", seconds=0.4)
    make_adapter(tmp_path / "quick", "quick")
    async with served_folder(tmp_path) as (served, _):
        slow = asyncio.create_task(_text(served, "slow"))
        await until(lambda: served.adapters.num_waiting == 1, "the request waits")
        await _text(served, "quick")
        assert (await served.http.delete("/v1/adapters/quick")).status_code == 200
        await slow
        assert len(_staged(served)) == 1
