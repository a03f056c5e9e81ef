"""The Batch API with OpenAI's own client: files, batches, what is wrong with them, and what survives."""

import asyncio
import contextlib
import errno
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest

from pomona.accounts.batches import BatchStore
from pomona.accounts.config import AccountsConfig
from pomona.accounts.tables import BatchRow
from pomona.core.errors import DatabaseUnavailableError
from pomona.core.request import Priority
from pomona.server.batch_files import Answer, Line, OutputFiles, read_lines
from pomona.server.batch_runner import BatchRunner, running_batches
from support.accounts import serve_accounts
from support.driver import until
from support.server import BASE, listen


@pytest.fixture
async def served(config: AccountsConfig, tmp_path):
    async with serve_accounts(tmp_path, config) as running:
        yield running


@pytest.fixture
async def clients(served):
    """OpenAI clients of both tenants."""
    async with listen(served.served.app) as url:
        found = {
            who: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=served.keys[who], max_retries=0)
            for who in ("acme", "bolt")
        }
        yield found
        for client in found.values():
            await client.close()


@contextlib.asynccontextmanager
async def working(served):
    """Let the server work on batches."""
    context = served.served.app.state.context
    async with running_batches(served.served.app, served.accounts, context.wake_batches, context.config.max_body_bytes):
        yield


def lines(*bodies, url="/v1/completions"):
    return b"".join(
        json.dumps({"custom_id": f"line-{index}", "method": "POST", "url": url, "body": body}).encode() + b"\n"
        for index, body in enumerate(bodies)
    )


def body(prompt="one two", **fields):
    return {"model": BASE, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}


async def start(client, content, endpoint="/v1/completions", **fields):
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


async def until_ended(client, batch):
    async with asyncio.timeout(30):
        while batch.status in ("validating", "in_progress", "finalizing", "cancelling"):
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def results(client, file_id):
    content = await client.files.content(file_id)
    return {json.loads(line)["custom_id"]: json.loads(line) for line in content.text.splitlines()}


async def test_a_batch_is_carried_out_line_by_line(served, clients):
    client = clients["acme"]
    async with working(served):
        bodies = [*(body(f"one {'two ' * n}") for n in range(30)), body(model="absent"), body(max_tokens=-1)]
        batch = await until_ended(client, await start(client, lines(*bodies), metadata={"job": "nightly"}))
    assert (batch.status, batch.errors) == ("completed", None)
    assert batch.metadata == {"job": "nightly"}
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (32, 30, 2)
    answers = await results(client, batch.output_file_id)
    assert sorted(answers) == sorted(f"line-{n}" for n in range(30))
    direct = (await served.complete("acme", "one two two ", max_tokens=4)).json()
    batched = answers["line-2"]["response"]
    assert (batched["status_code"], batched["body"]["choices"]) == (200, direct["choices"])
    errors = await results(client, batch.error_file_id)
    assert {name: error["response"]["status_code"] for name, error in errors.items()} == {
        "line-30": 404,
        "line-31": 400,
    }
    rows = await served.usage(tenant_id="acme")
    assert len(rows) == 31
    assert {f"cmpl-{answer['response']['request_id']}" for answer in answers.values()} < {
        row["request_id"] for row in rows
    }


async def test_work_ends_when_it_is_told_to_as_it_wakes(served):
    context = served.served.app.state.context
    async with asyncio.timeout(10):
        for _ in range(3):
            async with working(served):
                await asyncio.sleep(0.2)  # it has looked, and waits
                context.wake_batches.set()
                await asyncio.sleep(0)  # it is about to wake


async def test_chats_go_in_batches_too(served, clients):
    client = clients["acme"]
    chat = {"model": BASE, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    async with working(served):
        url = "/v1/chat/completions"
        batch = await until_ended(client, await start(client, lines(chat, url=url), endpoint=url))
    answer = (await results(client, batch.output_file_id))["line-0"]["response"]["body"]
    assert answer["object"] == "chat.completion"


async def test_what_is_wrong_with_a_file_is_said_by_line(served, clients):
    good = lines(body())
    bad = (
        good + b"{\n" + b"[1]\n" + good + lines(body(), body(stream=True)).split(b"\n")[1] + b"\n"
        + lines(body(), url="/v1/chat/completions").replace(b"line-0", b"x") + b'{"custom_id":"y","method":"GET"}\n'
    )  # fmt: skip
    async with working(served):
        batch = await until_ended(clients["acme"], await start(clients["acme"], bad))
        empty = await until_ended(clients["acme"], await start(clients["acme"], b"\n"))
    assert batch.status == "failed"
    assert [(error.line, error.code) for error in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "invalid_request"),
        (6, "mismatched_endpoint"),
        (7, "invalid_method"),
    ]
    assert empty.errors.data[0].code == "empty_file"
    assert await served.usage() == []


async def test_lines_that_no_request_could_be_are_refused_and_hold_up_nobody(served, clients):
    client = clients["acme"]
    config = served.served.app.state.context.config
    wide = lines(body(prompt=[[]] * 100_001))
    long = lines(body("x" * config.max_body_bytes))
    async with working(served):
        batch = await until_ended(client, await start(client, lines(body()) + wide + long))
    assert [(error.line, error.code) for error in batch.errors.data] == [(2, "line_too_large"), (3, "line_too_large")]
    assert f"{config.max_body_bytes} bytes" in batch.errors.data[1].message


async def test_files_and_batches_do_not_exist_for_others(served, clients):
    batch = await start(clients["acme"], lines(body()))
    other = clients["bolt"]
    for call in (
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(batch.input_file_id),
        lambda: other.files.delete(batch.input_file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: start_with(other, batch.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            await call()
    assert (await other.files.list()).data == []
    assert (await other.batches.list()).data == []
    assert [file.id for file in (await clients["acme"].files.list()).data] == [batch.input_file_id]


async def test_lists_after_what_is_gone_or_another_s_are_refused_and_do_not_begin_anew(served, clients):
    theirs = await start(clients["acme"], lines(body()))
    mine = clients["bolt"]
    await start(mine, lines(body()))
    gone = await mine.files.create(file=("in.jsonl", lines(body())), purpose="batch")
    await mine.files.delete(gone.id)
    for listed, after in ((mine.files, theirs.input_file_id), (mine.files, gone.id), (mine.batches, theirs.id)):
        with pytest.raises(openai.NotFoundError, match=after):
            await listed.list(after=after)


async def start_with(client, file_id):
    return await client.batches.create(input_file_id=file_id, endpoint="/v1/completions", completion_window="24h")


async def test_files_are_stored_read_paged_and_deleted(served, clients):
    client = clients["acme"]
    content = lines(body())
    files = [await client.files.create(file=(f"{n}.jsonl", content), purpose="batch") for n in range(3)]
    assert (files[0].bytes, files[0].filename, files[0].status) == (len(content), "0.jsonl", "processed")
    assert (await client.files.content(files[1].id)).content == content
    page = await client.files.list(limit=2)
    assert [file.id for file in page.data] == [files[2].id, files[1].id]
    assert page.has_more
    assert [file.id async for file in page] == [file.id for file in reversed(files)]
    page = await client.files.list(limit=2, order="asc")
    assert [file.id async for file in page] == [file.id for file in files]
    for path, name in (("files", "order"), ("files", "odd"), ("batches", "order"), ("adapters", "order")):
        refused = await served.call("acme", "GET", f"/v1/{path}?{name}=up")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert (await client.files.delete(files[0].id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(files[0].id)
    batch = await start_with(client, files[1].id)
    with pytest.raises(openai.ConflictError):
        await client.files.delete(batch.input_file_id)


async def test_a_file_whose_content_is_gone_is_not_there(served, clients):
    client = clients["acme"]
    file = await client.files.create(file=("in.jsonl", lines(body())), purpose="batch")
    served.accounts.batches.path_of(file.id).unlink()
    with pytest.raises(openai.NotFoundError, match=file.id):
        await client.files.content(file.id)


async def test_forms_that_are_wrong_are_refused(served, clients):
    for options, status in (
        ({"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}}, 400),
        ({"files": {"file": b"x"}}, 400),
        ({"data": {"purpose": "batch"}}, 400),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"files": [("file", b"x"), ("file", b"y")], "data": {"purpose": "batch"}}, 400),
        ({"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after[seconds]": "3600"}}, 400),
    ):
        headers = {"authorization": f"Bearer {served.keys['acme']}", **options.pop("headers", {})}
        response = await served.served.http.post("/v1/files", headers=headers, **options)
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]


async def test_a_part_of_a_file_can_be_read_and_parts_that_are_not_there_are_refused(served):
    headers = {"authorization": f"Bearer {served.keys['acme']}"}
    form = {"files": {"file": b"0123456789"}, "data": {"purpose": "batch"}}
    path = (await served.served.http.post("/v1/files", headers=headers, **form)).json()["id"]
    for wanted, status, what in (
        ("bytes=2-4", 206, b"234"),
        ("bytes=0-1,8-", 206, None),
        ("bytes=10-", 416, "invalid_range"),
        ("bytes=4-2", 400, "invalid_value"),
        ("lines=1-2", 400, "invalid_value"),
        ("nonsense", 400, "invalid_value"),
    ):
        url = f"/v1/files/{path}/content"
        response = await served.served.http.get(url, headers={**headers, "range": wanted})
        assert response.status_code == status, wanted
        if status == 206:
            assert what in (None, response.content)
            continue
        assert response.json()["error"]["code"] == what
        assert response.headers.get("content-range") == ("bytes */10" if status == 416 else None)


async def test_files_have_a_limit_together(config, tmp_path):
    async with serve_accounts(tmp_path, replace(config, max_tenant_file_bytes=100)) as served:
        headers = {"authorization": f"Bearer {served.keys['acme']}"}
        statuses = []
        for _ in range(2):
            form = {"files": {"file": b"x" * 150}, "data": {"purpose": "batch"}}
            statuses.append((await served.served.http.post("/v1/files", headers=headers, **form)).status_code)
    assert statuses == [200, 409]


async def test_files_that_come_at_once_have_the_limit_together_too(config, tmp_path):
    async with serve_accounts(tmp_path, replace(config, max_tenant_file_bytes=100)) as served:
        headers = {"authorization": f"Bearer {served.keys['acme']}"}
        form = {"files": {"file": b"x" * 150}, "data": {"purpose": "batch"}}
        answers = await asyncio.gather(
            *(served.served.http.post("/v1/files", headers=headers, **form) for _ in range(8))
        )
        assert sorted(answer.status_code for answer in answers)[1:] == [409] * 7
        assert len(list((served.accounts.config.data_dir / "files").iterdir())) == 1


async def test_a_file_whose_name_the_database_does_not_take_leaves_nothing(served, clients):
    part = b'--x\r\nContent-Disposition: form-data; name="'
    content = part + b'purpose"\r\n\r\nbatch\r\n' + part + b'file"; filename="a\0b"\r\n\r\nlines\r\n--x--\r\n'
    headers = {"authorization": f"Bearer {served.keys['acme']}", "content-type": "multipart/form-data; boundary=x"}
    response = await served.served.http.post("/v1/files", headers=headers, content=content)
    assert response.status_code in (200, 400), response.text
    on_disk = list((served.accounts.config.data_dir / "files").iterdir())
    assert [path.name for path in on_disk] == [file.id async for file in clients["acme"].files.list()]


async def test_a_full_disk_leaves_nothing_of_a_file(served, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pomona.server.files.os.replace", fail)
    form = {"files": {"file": b"x"}, "data": {"purpose": "batch"}}
    headers = {"authorization": f"Bearer {served.keys['acme']}"}
    assert (await served.served.http.post("/v1/files", headers=headers, **form)).status_code == 500
    assert list((served.accounts.config.data_dir / "files").iterdir()) == []


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


async def test_tenants_do_not_wait_for_each_others_batches(served, clients):
    await served.call("admin", "PUT", "/v1/admin/limits/tenant/acme", {"requests_per_minute": 1})
    async with working(served):
        stuck = await start(clients["acme"], lines(*(body() for _ in range(3))))
        while stuck.request_counts.completed < 1:
            await asyncio.sleep(0.05)
            stuck = await clients["acme"].batches.retrieve(stuck.id)
        batch = await until_ended(clients["bolt"], await start(clients["bolt"], lines(body())))
        stuck = await clients["acme"].batches.retrieve(stuck.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    assert (stuck.status, stuck.request_counts.completed) == ("in_progress", 1)


@pytest.mark.parametrize("kind", ["report", "upload", "batch"])
async def test_what_takes_long_leaves_threads_for_everything_else(served, clients, monkeypatch, kind):
    go_on, accounts = threading.Event(), served.accounts
    monkeypatch.setattr(accounts.usage, "sums", lambda *_: go_on.wait(20) and [])
    monkeypatch.setattr("pomona.server.files._copy", lambda _, path: go_on.wait(20) and path.touch())
    monkeypatch.setattr("pomona.server.batch_runner.read_lines", lambda *_: go_on.wait(20) and ([], [{}]))

    async def begin(number):
        if kind == "report":
            await served.call("acme", "GET", "/v1/usage")
        elif kind == "upload":
            await clients["acme"].files.create(file=("in.jsonl", b""), purpose="batch")
        else:
            tenant_id, file_id = f"tenant-{number}", accounts.batches.new_file_id()
            accounts.batches.path_of(file_id).touch()
            accounts.tenants.create_tenant(tenant_id)
            accounts.batches.add_file(file_id, tenant_id, "in.jsonl", "batch")
            accounts.batches.create_batch(tenant_id, "key", "/v1/completions", file_id, None)
            served.served.app.state.context.wake_batches.set()

    async with working(served), asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(begin(number))
        await asyncio.sleep(0.5)
        try:
            async with asyncio.timeout(5):
                await accounts.database.ask(accounts.database.revision)
        finally:
            go_on.set()


async def test_a_spent_budget_is_a_lines_error(served, clients):
    await served.call("admin", "PUT", "/v1/admin/limits/tenant/acme", {"monthly_tokens": 3})
    client = clients["acme"]
    async with working(served):
        batch = await until_ended(client, await start(client, lines(body(), body())))
    errors = await results(client, batch.error_file_id)
    assert batch.status == "completed"
    assert [error["response"]["body"]["error"]["code"] for error in errors.values()] == ["insufficient_quota"] * 2


async def test_lines_wait_for_what_others_hold_of_a_budget(served, clients):
    await served.call("admin", "PUT", "/v1/admin/limits/tenant/acme", {"monthly_tokens": 400})
    client = clients["acme"]
    async with working(served):  # each may use more than 100 tokens, and uses a few
        batch = await until_ended(client, await start(client, lines(*(body(max_tokens=100) for _ in range(6)))))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 0)


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


@pytest.mark.parametrize("status", ["cancelled", "expired"])
async def test_a_batch_that_is_over_before_it_starts_asks_nothing(served, clients, status):
    client = clients["acme"]
    batch = await start(client, lines(*(body() for _ in range(3))))
    if status == "cancelled":
        await client.batches.cancel(batch.id)
    else:
        with served.accounts.database.session(is_write=True) as session:
            session.get(BatchRow, batch.id).expires_s = 1.0
    async with working(served):
        batch = await until_ended(client, batch)
    assert (batch.status, batch.output_file_id, batch.request_counts.completed) == (status, None, 0)
    assert await served.usage() == []


@pytest.mark.parametrize("at", ["in_progress", "completed"])
async def test_a_batch_cancelled_at_any_moment_is_cancelled(served, clients, monkeypatch, at):
    client = clients["acme"]
    store = served.accounts.batches
    update = store.update

    def cancel_first(batch_id, process_id, **values):
        if values.get("status") == at:
            store.cancel(batch_id, "acme")
        return update(batch_id, process_id, **values)

    monkeypatch.setattr(store, "update", cancel_first)
    async with working(served):
        batch = await until_ended(client, await start(client, lines(body())))
    assert (batch.status, batch.request_counts.completed) == ("cancelled", 1 if at == "completed" else 0)


async def test_a_cancelled_batch_keeps_what_is_done(served, clients, monkeypatch):
    client = clients["acme"]
    served.served.executor.gate.clear()
    abort, has_aborted = served.served.client.abort, asyncio.Event()

    async def noted_abort(request_id):
        has_aborted.set()
        await abort(request_id)

    monkeypatch.setattr(served.served.client, "abort", noted_abort)
    async with working(served):
        batch = await start(client, lines(*(body() for _ in range(40))))
        while batch.status != "in_progress":
            await asyncio.sleep(0.05)
            batch = await client.batches.retrieve(batch.id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        await has_aborted.wait()
        served.served.executor.gate.set()
        batch = await until_ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.request_counts.completed < 40


async def test_a_batch_waits_for_limits_and_ends_with_its_key(served, clients):
    client = clients["acme"]
    await served.call("admin", "PUT", "/v1/admin/limits/tenant/acme", {"max_concurrency": 1})
    async with working(served):
        batch = await until_ended(client, await start(client, lines(*(body() for _ in range(3)))))
        assert batch.request_counts.completed == 3
        made = (await served.call("admin", "POST", "/v1/admin/keys", {"tenant": "acme"})).json()
        doomed = client.with_options(api_key=made["key"])
        file = await doomed.files.create(file=("in.jsonl", lines(body())), purpose="batch")
        await served.call("admin", "DELETE", f"/v1/admin/keys/{made['id']}")
        store: BatchStore = served.accounts.batches
        orphan = store.create_batch("acme", made["id"], "/v1/completions", file.id, None)
        ended = await until_ended(client, await client.batches.retrieve(orphan.id))
    assert ended.request_counts.failed == 1


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


async def test_lines_of_a_batch_give_way_to_everything_else(served, clients, monkeypatch):
    submitted = []
    submit = served.served.client.submit
    monkeypatch.setattr(served.served.client, "submit", lambda request: submitted.append(request) or submit(request))
    async with working(served):
        await until_ended(clients["acme"], await start(clients["acme"], lines(body())))
    assert [request.service_level.priority for request in submitted] == [Priority.BATCH]
