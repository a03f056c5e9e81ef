"""Batches that something happens to: deaths of the engine and of the server, stops, leases, bugs, full disks."""

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from pomona.core.errors import DatabaseUnavailableError
from pomona.server.batch_files import Answer, Line, OutputFiles, read_lines
from pomona.server.batch_runner import BatchRunner
from support.batches import body, lines, results, start, until_ended, working
from support.driver import until


def test_an_answer_that_the_disk_takes_a_part_of_is_no_answer(tmp_path):
    def opened():
        return OutputFiles(("file-1", tmp_path / "output"), ("file-2", tmp_path / "error"))

    answer = Answer(200, "r1", {}, 0.0)
    files = opened()
    files.write(Line("whole", 0, 0), answer)
    whole, files._output = files._output, SimpleNamespace(write=lambda content: whole.write(content[:9]))
    with pytest.raises(OSError, match="short write"):
        files.write(Line("torn", 0, 0), answer)
    assert files.num_completed == 1
    files._output = whole
    files.close()
    again = opened()
    again.write(Line("torn", 0, 0), answer)
    again.close()
    written = (tmp_path / "output").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in written] == ["whole", "torn"]


async def test_a_batch_that_our_bug_ends_has_failed_and_others_go_on(served, clients, monkeypatch, caplog):
    client = clients["acme"]
    ask = BatchRunner._ask

    async def ask_or_fail(runner, principal, batch, line, content):
        if b"poison" in content:
            raise RecursionError("a bug")
        return await ask(runner, principal, batch, line, content)

    monkeypatch.setattr(BatchRunner, "_ask", ask_or_fail)
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", 0.1)
    async with working(served):
        failed = await until_ended(client, await start(client, lines(body("poison"))))
        batch = await until_ended(client, await start(client, lines(body())))
    assert (failed.status, failed.errors.data[0].code) == ("failed", "internal_error")
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    assert f"The batch {failed.id} failed: this is a bug" in caplog.text


async def test_a_line_with_which_the_engine_dies_twice_has_failed_and_the_others_go_on(served, clients, monkeypatch):
    """What runs beside it dies with it once: then each is tried alone."""
    client, ask, beside = clients["acme"], BatchRunner._ask, asyncio.Barrier(4)
    asked = []

    async def ask_or_die(runner, principal, batch, line, content):
        asked.append(content)
        if len(asked) <= 4:
            await beside.wait()  # all four are in the engine when it dies
        elif b"poison" not in content:
            return await ask(runner, principal, batch, line, content)
        return Answer(503, "", {"error": {"message": "it died", "code": "engine_died"}}, 0.0)

    monkeypatch.setattr(BatchRunner, "_ask", ask_or_die)
    monkeypatch.setattr("pomona.server.batch_runner._RETRY_S", 0.01)
    async with working(served):
        batch = await start(client, lines(body("poison"), *(body() for _ in range(5))))
        batch = await until_ended(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 5, 1)
    error = (await results(client, batch.error_file_id))["line-0"]["response"]
    assert (error["status_code"], error["body"]["error"]["code"]) == (503, "engine_died")
    assert sum(b"poison" in content for content in asked) == 2


async def test_of_several_lines_that_kill_the_engine_none_takes_another_with_it(served, clients, monkeypatch):
    """A line that was there when it died is tried alone: beside it, one not yet tried might be the next to kill it."""
    client, ask = clients["acme"], BatchRunner._ask
    in_engine, died = set(), set()

    async def ask_or_die(runner, principal, batch, line, content):
        me = object()
        in_engine.add(me)
        await asyncio.sleep(0.01 if b"poison" in content else 0.05)
        if b"poison" in content:
            died.update(in_engine)
        in_engine.discard(me)
        if me in died:
            return Answer(503, "", {"error": {"message": "it died", "code": "engine_died"}}, 0.0)
        return await ask(runner, principal, batch, line, content)

    monkeypatch.setattr(BatchRunner, "_ask", ask_or_die)
    monkeypatch.setattr("pomona.server.batch_runner._RETRY_S", 0.01)
    poisons = {1, 18, 19, 30}
    async with working(served):
        bodies = [body("poison" if index in poisons else "one two") for index in range(40)]
        batch = await until_ended(client, await start(client, lines(*bodies)))
    assert batch.status == "completed"
    assert set(await results(client, batch.error_file_id)) == {f"line-{index}" for index in poisons}


async def test_a_batch_goes_on_where_a_dead_process_left_it(served, clients, monkeypatch):
    client = clients["acme"]
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", 0.3)
    batch = await start(client, lines(*(body() for _ in range(6))))
    store = served.accounts.batches
    claimed = store.claim("dead")
    assert claimed is not None
    output, error = store.new_file_id(), store.new_file_id()
    store.update(batch.id, "dead", num_total=6, output_file_id=output, error_file_id=error)
    store.update(batch.id, "dead", status="in_progress")
    done = [json.dumps({"custom_id": f"line-{n}", "response": "from before"}) for n in range(2)]
    store.path_of(output).write_text("\n".join(done) + '\n{"custom_id":"line-2","resp')
    assert store.claim("other") is None
    async with working(served):
        batch = await until_ended(client, batch)
    assert batch.request_counts.completed == 6
    answers = await results(client, batch.output_file_id)
    assert [answers[f"line-{n}"]["response"] == "from before" for n in range(6)] == [True, True, *[False] * 4]
    assert len(await served.usage()) == 4


async def test_lines_that_a_stop_cuts_off_are_charged_when_they_are_answered(served, clients, monkeypatch):
    client, executor, ledger = clients["acme"], served.served.executor, served.accounts.ledger
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", 0.1)
    executor.pause_at_token = 2
    async with working(served):
        batch = await start(client, lines(*(body() for _ in range(3))))
        await until(lambda: not executor.gate.is_set(), "lines are under way")
        asyncio.get_running_loop().call_later(0.1, executor.gate.set)
    await until(lambda: not ledger.num_open, "all are cut off")
    assert await served.usage() == []
    async with working(served):
        batch = await until_ended(client, batch)
    assert (batch.status, batch.request_counts.completed) == ("completed", 3)
    rows, answers = await served.usage(), await results(client, batch.output_file_id)
    assert {row["request_id"] for row in rows} == {answer["response"]["body"]["id"] for answer in answers.values()}
    assert [(row["outcome"], row["output_tokens"]) for row in rows] == [("finish", 4)] * 3


async def test_a_line_that_is_answered_twice_is_charged_once(served, clients, monkeypatch):
    """The first answer was lost: whoever got it ended before it was written."""
    client, write = clients["acme"], OutputFiles.write
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", 0.1)
    monkeypatch.setattr(OutputFiles, "write", lambda *_: asyncio.current_task().cancel())
    async with working(served):
        batch = await start(client, lines(body()))
        await until(lambda: served.accounts.ledger.totals()["rows"], "it is answered")
    monkeypatch.setattr(OutputFiles, "write", write)
    await asyncio.sleep(0.2)
    async with working(served):
        batch = await until_ended(client, batch)
    assert batch.request_counts.completed == 1
    assert len(await served.usage()) == 1


async def test_a_stop_before_the_first_line_leaves_no_file_that_nobody_knows(served, clients, monkeypatch):
    client, is_begun, go_on = clients["acme"], threading.Event(), threading.Event()
    folder = served.accounts.config.data_dir / "files"
    monkeypatch.setattr("pomona.accounts.batches.LEASE_S", 0.1)
    monkeypatch.setattr("pomona.server.batch_runner.read_lines", lambda *_: is_begun.set() or (go_on.wait(20) and []))
    async with working(served):
        batch = await start(client, lines(body()))
        await until(is_begun.is_set, "the files are open")
    go_on.set()
    monkeypatch.undo()
    await asyncio.sleep(0.2)
    async with working(served):
        batch = await until_ended(client, batch)
    assert {path.name for path in folder.iterdir()} == {batch.input_file_id, batch.output_file_id}


@pytest.mark.parametrize("slow", ["read_lines", "OutputFiles.open"])
async def test_a_batch_stays_its_owners_while_large_files_are_read(served, clients, monkeypatch, slow):
    for module in ("accounts.batches", "server.batch_runner"):
        monkeypatch.setattr(f"pomona.{module}.LEASE_S", 0.3)
    real = read_lines if slow == "read_lines" else OutputFiles.open
    is_begun, go_on, readers = threading.Event(), threading.Event(), set()

    def read(*args):
        readers.add(threading.current_thread())
        is_begun.set()
        go_on.wait(2)
        return real(*args)

    monkeypatch.setattr(f"pomona.server.batch_runner.{slow}", read)
    async with working(served):
        batch = await start(clients["acme"], lines(body()))
        await until(is_begun.is_set, "the files are read")
        await asyncio.sleep(0.8)
        claimed = served.accounts.batches.claim("other")
        go_on.set()
        assert claimed is None
        assert (await until_ended(clients["acme"], batch)).status == "completed"
    assert threading.main_thread() not in readers


async def test_a_process_whose_lease_has_run_out_writes_nothing_until_it_knows_that_the_batch_is_its(
    served, clients, monkeypatch
):
    for module in ("accounts.batches", "server.batch_runner"):
        monkeypatch.setattr(f"pomona.{module}.LEASE_S", 0.3)
    client, store, executor = clients["acme"], served.accounts.batches, served.served.executor
    executor.gate.clear()
    update, was_asked = store.update, threading.Event()

    def fail(*args, **values):
        was_asked.set()
        raise DatabaseUnavailableError("gone")

    async with working(served):
        batch = await start(client, lines(body()))
        await until(lambda: served.accounts.ledger.num_open, "the line is asked")
        monkeypatch.setattr(store, "update", fail)
        await until(was_asked.is_set, "the lease is not renewed")
        await asyncio.sleep(0.4)
        claimed = store.claim("other")
        assert claimed is not None and claimed.output_file_id is not None
        executor.gate.set()
        await until(lambda: served.accounts.ledger.totals()["rows"], "the line is answered")
        await asyncio.sleep(0.2)
        assert store.path_of(claimed.output_file_id).read_bytes() == b""
        monkeypatch.setattr(store, "update", update)
        batch = await until_ended(client, batch)
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    assert len(await served.usage()) == 1
