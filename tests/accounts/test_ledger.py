"""The ledger: one row per request, exactly once, with everything that was counted."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import msgspec
import pytest
import sqlalchemy

from pomona.accounts import journal as journal_module
from pomona.accounts import ledger as ledger_module
from pomona.accounts.accounts import Accounts, Booking
from pomona.accounts.database import Database
from pomona.accounts.journal import Journal, Start, Usage, dead_journals, remove_folder
from pomona.accounts.ledger import Ledger
from pomona.accounts.principal import Principal
from pomona.accounts.usage import COLUMNS, UsageFilter, UsageStore
from pomona.accounts.usage_rows import Price, insert_usage
from pomona.core.errors import DatabaseUnavailableError, InvalidRequestError
from pomona.core.ids import RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason


def principal(tenant_id="acme", key_id="k1"):
    return Principal(key_id, key_id, TenantId(tenant_id), None, b"", None)


def output(num_tokens, *, cached=0, finish=None, first_s=1.0):
    return RequestOutput(
        RequestId("r"),
        new_token_ids=(7,) * num_tokens,
        num_cached_tokens=cached,
        first_scheduled_s=first_s,
        finish_reason=finish,
    )


def start(request_id, number=0, slot=0):
    return Start(number, slot, request_id, "acme", "k1", "k1", "base", "", (10,), 1000.0)


def usage(begun, outcome="finish", output_tokens=3):
    return Usage(
        begun.number,
        begun.request_id,
        "acme",
        "k1",
        "k1",
        "base",
        "",
        10,
        0,
        output_tokens,
        0.5,
        outcome,
        1000.0,
        1001.0,
    )


def rows(database):
    return [row for page in UsageStore(database).rows(UsageFilter()) for row in page]


@pytest.fixture
def new_ledger(database):
    """Make ledgers of server processes that are taken for dead when the test ends."""
    made = []

    def new(config, process_id="p1"):
        made.append(Ledger(database, config, process_id, lambda *_: None))
        return made[-1]

    yield new
    for ledger in made:
        ledger._journal.close()


async def answer(ledger_or_accounts, request_id, *, num_tokens=5, adapter="base", who=None, outcome="finish"):
    """One whole request."""
    entry = ledger_or_accounts.begin(who or principal(), Booking(request_id, adapter, "", (10,)))
    entry.note(0, output(1, cached=4), 1.5)
    entry.note(0, output(num_tokens - 1, finish=FinishReason.STOP), 3.0)
    entry.close(outcome, 3.5)


async def test_a_request_is_one_row_with_all_that_was_counted(config):
    async with Accounts(config) as accounts:
        await answer(accounts, "r1")
    database = Database(config.url)
    (row,) = rows(database)
    told = {name: row[name] for name in ("request_id", "tenant_id", "key_id", "input_tokens", "cached_tokens")}
    assert told == {"request_id": "r1", "tenant_id": "acme", "key_id": "k1", "input_tokens": 10, "cached_tokens": 4}
    assert (row["output_tokens"], row["outcome"], row["engine_s"]) == (5, "finish", pytest.approx(2.5))
    assert not list((config.data_dir / "journal").iterdir())
    database.close()


async def test_choices_add_up_and_a_prompt_counts_once(config):
    async with Accounts(config) as accounts:
        entry = accounts.begin(principal(), Booking("r1", "base", "", (10,), 2))
        for index in (0, 1):
            entry.note(index, output(3, cached=4 * index, finish=FinishReason.LENGTH), 2.0)
        entry.close("finish", 2.0)
        await accounts.ledger.flush()
        (row,) = rows(accounts.database)
    assert (row["input_tokens"], row["cached_tokens"], row["output_tokens"]) == (10, 0, 6)
    assert row["engine_s"] == pytest.approx(2.0)


def test_a_group_that_is_sent_twice_changes_nothing(database):
    group = [usage(start(f"r{index}")) for index in range(5)]
    for _ in range(2):
        with database.write() as connection:
            insert_usage(connection, group, {"": Price(1, 1, 2)})
    assert len(rows(database)) == 5
    with database.read() as connection:
        spending = connection.execute(
            sqlalchemy.text("SELECT scope, num_requests, num_tokens, cost_nanos FROM spending")
        )
        assert sorted(spending) == [("adapter", 5, 65, 80), ("key", 5, 65, 80), ("tenant", 5, 65, 80)]


def test_the_highest_prices_do_not_stop_the_ledger(database):
    for index in range(3):
        group = [usage(start(f"r{index}-{row}"), output_tokens=2**32) for row in range(2)]
        with database.write() as connection:
            insert_usage(connection, group, {"": Price(output_nanos=10**9)})
    with database.read() as connection:
        spent = connection.execute(sqlalchemy.text("SELECT cost_nanos FROM spending")).scalars().all()
    assert spent == [2**63 - 1] * 3
    (sums,) = UsageStore(database).sums(UsageFilter(), ())
    assert sums["cost_nanos"] == 6 * 2**32 * 10**9


def test_a_group_that_is_partly_there_adds_only_the_rest(database):
    for group in (["r1", "r2"], ["r2", "r3"]):
        with database.write() as connection:
            insert_usage(connection, [usage(start(name)) for name in group], {})
    assert sorted(row["request_id"] for row in rows(database)) == ["r1", "r2", "r3"]
    with database.read() as connection:
        assert set(connection.execute(sqlalchemy.text("SELECT num_requests FROM spending"))) == {(3,)}


async def test_rows_wait_for_a_database_that_is_down_and_none_is_lost(config):
    async with Accounts(config) as accounts:
        write = accounts.database.write

        def fail(*_, **__):
            accounts.database.down_since_s = 1.0
            raise DatabaseUnavailableError("down")

        accounts.database.write = fail
        for index in range(1200):
            await answer(accounts, f"r{index}")
        with pytest.raises(DatabaseUnavailableError):
            await accounts.ledger.flush()
        assert rows(accounts.database) == []
        totals = accounts.ledger.totals()
        assert (totals["rows"], totals["waiting_rows"], totals["open_requests"]) == (0, 1200, 0)
        accounts.database.write = write
        await accounts.ledger.flush()
        assert len(rows(accounts.database)) == 1200
        totals = accounts.ledger.totals()
        assert (totals["rows"], totals["waiting_rows"]) == (1200, 0)


async def test_the_operator_may_have_requests_refused_while_the_database_is_down(config):
    async with Accounts(replace(config, when_database_is_down="refuse")) as accounts:
        accounts.database.down_since_s = 1.0
        with pytest.raises(DatabaseUnavailableError, match="refused until it is back"):
            await answer(accounts, "r1")
        accounts.database.down_since_s = None
        await answer(accounts, "r2")


async def test_requests_are_refused_when_too_much_waits(config, database, new_ledger):
    ledger = new_ledger(replace(config, max_journal_bytes=2000))

    def begin_many():
        for index in range(100):
            ledger.begin(start(f"r{index}"), 1)

    with pytest.raises(DatabaseUnavailableError, match="Too much usage"):
        begin_many()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from pomona.accounts.journal import Counted, Journal, Start, Usage
    journal = Journal(Path(sys.argv[1]), "victim", segment_bytes=2000)
    for index in range(40):
        begun = journal.start(Start(0, 0, f"r{index}", "acme", "k1", "k1", "base", "", (10,), 1000.0))
        journal.advance(begun, Counted(index, 1, 10), 1002.0)
        if index % 3:
            journal.finish(begun, Usage(begun.number, f"r{index}", "acme", "k1", "k1", "base", "", 10, 1, index, 0.5,
                                        "finish", 1000.0, 1001.0))
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_killed_process_leaves_a_row_for_every_start_with_the_tokens_it_had_counted(
    config, database, new_ledger
):
    folder = config.data_dir / "journal"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(folder)], env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    ledger = new_ledger(config, "next")
    assert await ledger.adopt() == 40
    found = {row["request_id"]: row for row in rows(database)}
    assert len(found) == 40
    for index in range(40):
        row = found[f"r{index}"]
        assert (row["output_tokens"], row["outcome"]) == (index, "finish" if index % 3 else "lost")
    assert await ledger.adopt() == 0
    assert [path.name for path in folder.iterdir()] == ["next"]


async def test_the_journal_of_a_living_process_is_left_alone(config, database, new_ledger):
    living = new_ledger(config, "living")
    living.begin(start("r1"), 1)
    assert await new_ledger(config, "next").adopt() == 0
    assert rows(database) == []


def test_a_journal_is_removed_while_others_look_for_dead_ones(tmp_path):
    has_ended = threading.Event()

    def adopt():
        while not has_ended.is_set():
            with dead_journals(tmp_path) as found:
                for folder, _ in found:
                    remove_folder(folder)

    with ThreadPoolExecutor(2) as threads:
        adopting = [threads.submit(adopt) for _ in range(2)]
        try:
            for index in range(200):
                journal = Journal(tmp_path, f"p{index}")
                journal.start(start("r"))
                if index % 2:
                    journal.close()
                else:
                    journal.remove()
        finally:
            has_ended.set()
        for one in adopting:
            one.result()


def test_what_a_kill_leaves_of_a_journal_that_is_removed_hinders_nobody(tmp_path, monkeypatch):
    journal = Journal(tmp_path, "p1")
    journal.start(start("r"))
    monkeypatch.setattr(journal_module.shutil, "rmtree", lambda folder: (folder / "progress").unlink())
    journal.remove()
    with dead_journals(tmp_path) as found:
        assert found == []


async def test_what_kills_leave_of_journals_is_removed_when_it_is_old(config, database, new_ledger):
    ledger = new_ledger(config)
    young, old = (config.data_dir / "journal" / name for name in (".young", ".old"))
    for folder in (young, old):
        folder.mkdir()
        (folder / "progress").touch()
    os.utime(old, (0, 0))
    await ledger.adopt()
    assert (young.exists(), old.exists()) == (True, False)


def test_the_table_of_progress_has_its_place_on_the_disk(tmp_path):
    journal = Journal(tmp_path, "p1")
    table = (tmp_path / "p1" / "progress").stat()
    assert table.st_blocks * 512 >= table.st_size
    journal.close()


def test_a_batchs_line_is_a_row_when_it_is_answered(database, tmp_path):
    """What a death or a stop has cut off is done again, under the same id."""
    journal = Journal(tmp_path / "journal", "p1")
    for outcome in ("lost", "abort", "fail", "finish"):
        begun = journal.start(msgspec.structs.replace(start("line"), is_batch=True))
        if outcome != "lost":
            journal.finish(begun, msgspec.structs.replace(usage(begun, outcome), is_batch=True))
    journal.close()
    with dead_journals(tmp_path / "journal") as found, database.write() as connection:
        ((_, ended),) = found
        assert [one.outcome for one in ended] == ["abort", "fail", "finish", "lost"]
        (*_, spent) = insert_usage(connection, ended, {})
    assert [row["outcome"] for row in rows(database)] == ["finish"]
    assert spent.num_requests == 1


def test_a_torn_record_ends_its_segment_and_nothing_else(tmp_path):
    journal = Journal(tmp_path, "p1")
    begun = [journal.start(start(f"r{index}")) for index in range(3)]
    journal.finish(begun[0], usage(begun[0]))
    journal.close()
    segment = tmp_path / "p1" / "00000000"
    whole = segment.read_bytes()
    for cut in range(1, 60):
        segment.write_bytes(whole[:-cut])
        with dead_journals(tmp_path) as ((_, found),):
            assert sorted(row.request_id for row in found) == ["r0", "r1", "r2"]
            assert {row.outcome for row in found} == {"lost"}


async def test_old_segments_go_when_the_ledger_has_them(config, database, new_ledger):
    ledger = new_ledger(config)
    ledger._journal._segment_bytes = 1000
    long_one = ledger.begin(start("long"), 1)
    for index in range(50):
        ledger.begin(start(f"r{index}"), 1).close("finish", 2.0)
    await ledger.flush()
    assert len(list(ledger._journal.folder.glob("0*"))) == 2, "that of the open request, and the last one"
    long_one.close("finish", 2.0)
    await ledger.flush()
    assert len(list(ledger._journal.folder.glob("0*"))) == 1
    assert len(rows(database)) == 51


async def test_what_is_written_while_a_segment_is_read_is_read_next(config, database, new_ledger, monkeypatch):
    ledger = new_ledger(config)
    ledger._journal._segment_bytes = 1000
    ledger.begin(start("first"), 1).close("finish", 2.0)
    read_records = journal_module._records

    def slowly(path, offset, end):
        yield from read_records(path, offset, end)
        monkeypatch.undo()
        for index in range(20):
            ledger.begin(start(f"r{index}"), 1).close("finish", 2.0)

    monkeypatch.setattr(journal_module, "_records", slowly)
    await ledger.flush()
    await ledger.flush()
    assert len(rows(database)) == 21


async def test_a_row_that_cannot_be_written_now_is_written_later(config, database, new_ledger):
    ledger = new_ledger(config)
    entry = ledger.begin(start("r1"), 1)
    segment = ledger._journal._segments[0]
    with open("/dev/full", "wb", buffering=0) as full:
        file, segment.file = segment.file, full
        entry.close("finish", 2.0)
        segment.is_torn = False
        with pytest.raises(DatabaseUnavailableError, match="cannot be written"):
            ledger.begin(start("r2"), 1)
    segment.is_torn = False
    segment.file = file
    await ledger.flush()
    assert [row["request_id"] for row in rows(database)] == ["r1"]


async def test_usage_is_summed_up_by_any_columns(config):
    async with Accounts(config) as accounts:
        await accounts.change(accounts.usage.set_price, "", Price(1, 0, 10))
        await accounts.change(accounts.usage.set_price, "acme/legal", Price(2, 1, 20))
        await answer(accounts, "r1", adapter="acme/legal")
        await answer(accounts, "r2", adapter="acme/legal", outcome="abort")
        await answer(accounts, "r3", who=principal("bolt", "k2"))
        await accounts.ledger.flush()
        by_adapter = accounts.usage.sums(UsageFilter(), ["adapter", "tenant"])
        assert [(row["adapter"], row["tenant"], row["num_requests"], row["cost_nanos"]) for row in by_adapter] == [
            ("acme/legal", "acme", 2, 2 * (6 * 2 + 4 + 5 * 20)),
            ("base", "bolt", 1, 6 + 50),
        ]
        (everything,) = accounts.usage.sums(UsageFilter(), [])
        assert (everything["input_tokens"], everything["output_tokens"]) == (30, 15)
        (own,) = accounts.usage.sums(UsageFilter(tenant_id="bolt"), ["outcome"])
        assert (own["outcome"], own["num_requests"]) == ("finish", 1)
        with pytest.raises(InvalidRequestError, match="group_by is 'secret'"):
            accounts.usage.sums(UsageFilter(), ["secret"])


async def test_prices_that_change_while_they_are_read_are_read_again(config, database, new_ledger, monkeypatch):
    ledger, read_prices = new_ledger(config), ledger_module.read_prices

    def read_and_forget(connection):
        found = read_prices(connection)
        ledger.forget_prices()
        return found

    monkeypatch.setattr(ledger_module, "read_prices", read_and_forget)
    ledger.begin(start("r1"), 1).close("finish", 2.0)
    await ledger.flush()
    monkeypatch.undo()
    UsageStore(database).set_price("", Price(2, 2, 2))
    entry = ledger.begin(start("r2"), 1)
    entry.note(0, output(5, finish=FinishReason.STOP), 1.5)
    entry.close("finish", 2.0)
    await ledger.flush()
    assert {row["request_id"]: row["cost_nanos"] for row in rows(database)} == {"r1": 0, "r2": 30}


async def test_exports_hold_every_row(config):
    import io

    from pyarrow import parquet

    async with Accounts(config) as accounts:
        for index in range(7):
            await answer(accounts, f"r{index}")
        await accounts.ledger.flush()
        lines = b"".join(accounts.usage.csv(UsageFilter())).decode().splitlines()
        assert lines[0] == ",".join(COLUMNS)
        assert len(lines) == 8
        table = parquet.read_table(io.BytesIO(b"".join(accounts.usage.parquet(UsageFilter()))))
        assert table.num_rows == 7
        assert sum(table["output_tokens"].to_pylist()) == 35


async def test_many_requests_at_once_leave_many_rows(config):
    async with Accounts(config) as accounts:
        await asyncio.gather(*(answer(accounts, f"r{index}") for index in range(2000)))
    database = Database(config.url)
    assert len(rows(database)) == 2000
    database.close()
