"""The Batch API with OpenAI's own client: what is carried out, refused, cancelled, and who waits for whom."""

import asyncio
import threading

import openai
import pytest

from pomona.accounts.batches import BatchStore
from pomona.accounts.tables import BatchRow
from pomona.core.request import Priority
from support.batches import body, lines, results, start, start_with, until_ended, working
from support.server import BASE


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


async def test_lines_of_a_batch_give_way_to_everything_else(served, clients, monkeypatch):
    submitted = []
    submit = served.served.client.submit
    monkeypatch.setattr(served.served.client, "submit", lambda request: submitted.append(request) or submit(request))
    async with working(served):
        await until_ended(clients["acme"], await start(clients["acme"], lines(body())))
    assert [request.service_level.priority for request in submitted] == [Priority.BATCH]
