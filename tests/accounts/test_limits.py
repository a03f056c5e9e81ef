"""Limits: never exceeded, in one process or in several, and given back when not used."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest
import sqlalchemy

from pomona.accounts import clock
from pomona.accounts import database as database_module
from pomona.accounts.accounts import Accounts
from pomona.accounts.batches import BatchStore
from pomona.accounts.buckets import Buckets, RateLimit
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.limiter import Admission, Limiter, Scope
from pomona.accounts.principal import Limits
from pomona.accounts.slots import EXPIRY_S, Slots
from pomona.accounts.tables import BucketRow, SpendingRow
from pomona.accounts.tenants import TenantStore
from pomona.accounts.usage_rows import Spending
from pomona.core.errors import DatabaseUnavailableError, QuotaExceededError, RateLimitError


@contextlib.contextmanager
def process(config: AccountsConfig):
    """Another server process, as far as the database can tell: connections of its own."""
    database = Database(config.url)
    yield database
    database.close()


def scope(**limits):
    return Scope("tenant", "acme", Limits(**limits))


def go_down(database):
    def fail(*_, **__):
        raise DatabaseUnavailableError("down")

    database.read = database.write = fail


def come_back(database):
    del database.read, database.write


async def num_taken(buckets, limit, num_tries, amount=1):
    waits = [await buckets.take(limit, amount) for _ in range(num_tries)]
    return sum(wait_s == 0 for wait_s in waits)


async def test_a_minutes_worth_is_taken_and_no_more(database):
    for per_minute in (3, 20, 100):
        limit = RateLimit(f"limit-{per_minute}", per_minute)
        assert await num_taken(Buckets(database), limit, per_minute) == per_minute
        assert 0 < await Buckets(database).take(limit, 1) <= 60 / per_minute + 0.1


async def test_processes_together_take_a_minutes_worth_and_no_more(config, database):
    limit = RateLimit("shared", 50)
    with process(config) as first, process(config) as second, process(config) as third:
        counts = await asyncio.gather(*(num_taken(Buckets(each), limit, 40) for each in (first, second, third)))
    # What one leased and did not use is all that may be missing; a second's worth has drained meanwhile.
    assert 50 - 2 * (50 // 16) <= sum(counts) <= 52


async def test_statements_that_race_lose_no_update(config, database):
    """Chunks of one: every take is a statement of its own."""
    limit = RateLimit("race", 31)
    with process(config) as first, process(config) as second:
        counts = await asyncio.gather(*(num_taken(Buckets(each), limit, 31) for each in (first, second, first)))
    assert 31 <= sum(counts) <= 33


async def test_a_lease_that_others_spend_while_it_is_extended_is_extended_again(database):
    limit = RateLimit("spent meanwhile", 64)
    buckets = Buckets(database)
    assert await Buckets(database).take(limit, 50) == 0
    assert await buckets.take(limit, 1) == 0  # leases four
    large = asyncio.create_task(buckets.take(limit, 13))
    await asyncio.sleep(0)  # its statement, for ten, is under way
    assert await buckets.take(limit, 3) == 0
    assert await large > 0


async def test_a_bucket_survives_its_process(database):
    limit = RateLimit("lasting", 10)
    assert await num_taken(Buckets(database), limit, 10) == 10
    assert await num_taken(Buckets(database), limit, 1) == 0


async def test_a_bucket_drains_with_time(database):
    limit = RateLimit("fast", 1200)
    buckets = Buckets(database)
    assert await buckets.take(limit, 1200) == 0
    wait_s = await buckets.take(limit, 10)
    assert 0 < wait_s <= 0.5
    await asyncio.sleep(1.1)
    assert await buckets.take(limit, 10) == 0


async def test_what_is_given_back_can_be_taken_again_by_another_process(database):
    limit = RateLimit("refund", 100)
    first, second = Buckets(database), Buckets(database)
    assert await first.take(limit, 100) == 0
    assert await second.take(limit, 50) > 0
    first.put(limit, 60)
    first._leases[limit.name].expires_s = 0.0  # a second has passed
    await first.settle()
    await asyncio.sleep(0.51)
    assert await second.take(limit, 50) == 0


async def test_what_was_used_beyond_the_promise_is_owed(database):
    limit = RateLimit("debt", 100)
    first = Buckets(database)
    assert await first.take(limit, 10) == 0
    first.put(limit, -95)
    assert await first.take(limit, 10) > 0
    await first.settle()
    assert await Buckets(database).take(limit, 10) > 0


async def test_whoever_asks_again_at_once_is_told_the_same_time(database):
    buckets, limit = Buckets(database), RateLimit("slow", 3)
    assert await num_taken(buckets, limit, 3) == 3
    first, second = await buckets.take(limit, 1), await buckets.take(limit, 1)
    assert 15 < second <= first <= 20
    assert 35 < await buckets.take(limit, 2) <= 40


async def test_a_limit_that_is_made_smaller_holds_from_then_on_and_not_for_the_past(config, database):
    tenants = TenantStore(database)
    tenants.create_tenant("acme")
    large, small = scope(requests_per_minute=6000), scope(requests_per_minute=60)
    tenants.set_limits("tenant", "acme", large.limits)
    assert await Buckets(database).take(large.requests(), 6000) == 0.0
    tenants.set_limits("tenant", "acme", replace(large.limits, monthly_tokens=1))
    assert await Buckets(database).take(large.requests(), 6000) > 0.0, "another limit was changed"
    tenants.set_limits("tenant", "acme", small.limits)
    assert await num_taken(Buckets(database), small.requests(), 70) >= 60
    tenants.set_limits("tenant", "acme", Limits())
    with database.read() as connection:
        assert connection.execute(sqlalchemy.select(BucketRow)).all() == []


async def test_more_than_a_minutes_worth_can_never_be_taken(database):
    assert await Buckets(database).take(RateLimit("small", 10), 11) == float("inf")


async def test_slots_are_never_more_than_the_limit_over_all_processes(config, database):
    with process(config) as first, process(config) as second:
        slots = [Slots(first, "one"), Slots(second, "two")]
        taken = await asyncio.gather(*(slots[index % 2].take("acme", 8) for index in range(20)))
        assert sum(taken) == 8
        holder = next(index % 2 for index, is_taken in enumerate(taken) if is_taken)
        slots[holder].put("acme")
        assert await slots[holder].take("acme", 8)
        slots[holder].put("acme")
        for _ in range(2):
            await slots[holder].heartbeat()
        assert await slots[1 - holder].take("acme", 8)


async def test_a_slot_taken_while_slots_are_renewed_is_counted(database):
    slots = Slots(database, "p1")
    for _ in range(2):
        assert await slots.take("acme", 1)
        slots.put("acme")
        await slots.heartbeat()  # nothing is used since: the next one frees it
        renewing = asyncio.create_task(slots.heartbeat())
        await asyncio.sleep(0)  # its statement is under way
        assert await slots.take("acme", 1)
        await renewing
        assert not await slots.take("acme", 1)
        slots.put("acme")


async def test_a_lease_taken_while_leases_are_settled_is_kept(database):
    limit = RateLimit("settled", 64)
    buckets = Buckets(database)
    assert await buckets.take(limit, 4) == 0
    lease = buckets._leases[limit.name]
    lease.available, lease.expires_s, lease.level_at_s = 1.0, 0.0, -1000.0  # long ago
    settling = asyncio.create_task(buckets.settle())
    await asyncio.sleep(0)  # its statement is under way
    assert await buckets.take(limit, 1) == 0
    await settling
    assert buckets._leases[limit.name] is lease


async def test_slots_of_a_process_that_died_come_back(database, monkeypatch):
    now_s = clock.now_s()
    monkeypatch.setattr(Database, "now_s", lambda *_: now_s)
    dead, alive = Slots(database, "dead"), Slots(database, "alive")
    assert await dead.take("acme", 1)
    assert not await alive.take("acme", 1)
    monkeypatch.setattr(Database, "now_s", lambda *_: now_s + EXPIRY_S + 0.1)
    assert await alive.take("acme", 1)
    with database.read() as connection:
        rows = connection.execute(sqlalchemy.text("SELECT process_id FROM slots WHERE process_id <> ''"))
        assert rows.scalars().all() == ["alive"]


async def test_a_process_that_ends_keeps_nothing_from_the_next(config, database):
    limits = scope(max_concurrency=1, requests_per_minute=64)
    async with Accounts(config) as accounts:
        (await accounts.limiter.admit([limits], 0)).settle(0)
    after = Limiter(database, config, "after")
    await after.admit([limits], 0)
    assert await num_taken(after.buckets, limits.requests(), 70) >= 62  # of 64: two were used


async def test_a_request_takes_from_every_limit_or_from_none(config, database):
    limiter = Limiter(database, config, "p1")
    scopes = [scope(requests_per_minute=5), Scope("key", "k", Limits(requests_per_minute=2, max_concurrency=9))]
    for _ in range(2):
        await limiter.admit(scopes, 10)
    for _ in range(4):
        with pytest.raises(RateLimitError, match="key's limit of 2 requests a minute") as caught:
            await limiter.admit(scopes, 10)
        assert 0 < caught.value.retry_after_s <= 30
    assert limiter.states([scopes[0]]).requests.remaining == 3
    assert limiter.slots._held["key:k"].num_used == 2


async def test_settling_gives_back_tokens_and_the_slot(config, database):
    limiter = Limiter(database, config, "p1")
    scopes = [scope(tokens_per_minute=1000, max_concurrency=1)]
    admission = await limiter.admit(scopes, 900)
    with pytest.raises(RateLimitError, match="1000 tokens"):
        await limiter.admit(scopes, 900)
    with pytest.raises(RateLimitError, match="1 requests at once"):
        await limiter.admit(scopes, 1)
    admission.settle(100)
    assert limiter.states(scopes).tokens.remaining in range(898, 920)
    await limiter.admit(scopes, 800)


async def test_a_request_larger_than_the_limit_is_told_that_it_never_can(config, database):
    with pytest.raises(RateLimitError, match="smaller than this request, which needs 50") as caught:
        await Limiter(database, config, "p1").admit([scope(tokens_per_minute=10)], 50)
    assert caught.value.retry_after_s is None


async def test_a_budget_holds_what_is_in_flight(config, database):
    limiter = Limiter(database, config, "p1")
    scopes = [scope(monthly_tokens=100)]
    admission = await limiter.admit(scopes, 60)
    with pytest.raises(RateLimitError, match="100 tokens a month has 40 left beside") as refused:
        await limiter.admit(scopes, 60)
    assert (type(refused.value), refused.value.retry_after_s) == (RateLimitError, 1.0), "it may fit in a moment"
    with pytest.raises(QuotaExceededError, match="100 tokens a month has 100 left"):
        await limiter.admit(scopes, 101)
    admission.settle(10)
    await limiter.admit(scopes, 60)


async def test_a_budget_holds_what_has_ended_until_the_ledger_has_it(config, database):
    limiter = Limiter(database, config, "p1")
    scopes, month = [scope(monthly_tokens=100)], clock.month_of(clock.now_s())
    (await limiter.admit(scopes, 60)).settle(50, "first")
    with pytest.raises(RateLimitError, match="100 tokens a month has 50 left beside"):
        await limiter.admit(scopes, 60)
    limiter.budgets.note([Spending("tenant", "acme", month, 1, 50, 0)], ["first", "another"])
    with pytest.raises(QuotaExceededError, match="100 tokens a month has 50 left"):
        await limiter.admit(scopes, 60)
    (await limiter.admit(scopes, 50)).settle(0)
    assert not limiter.budgets._reserved


async def test_requests_that_come_at_once_share_what_is_left_of_a_budget(config, database):
    month = clock.month_of(clock.now_s())
    with database.session(is_write=True) as session:
        sums = {"num_requests": 1, "num_tokens": 900, "cost_nanos": 0}
        session.add(SpendingRow(scope="tenant", scope_id="acme", month=month, **sums))
    limiter = Limiter(database, config, "p1")
    # At first all wait for the sums; then each waits for a rate after it has asked about the budget.
    for limits in ({}, {"requests_per_minute": 100}):
        scopes = [scope(monthly_tokens=1000, **limits)]
        asked = [limiter.admit(scopes, 40) for _ in range(20)]
        admissions = [one for one in await asyncio.gather(*asked, return_exceptions=True) if isinstance(one, Admission)]
        assert len(admissions) == 2
        for admission in admissions:
            admission.settle(0)
    assert not limiter.budgets._reserved


async def test_a_request_that_is_refused_holds_nothing_of_a_budget(config, database):
    limiter = Limiter(database, config, "p1")
    for limits in ({"max_concurrency": 0}, {"requests_per_minute": 0}):
        with pytest.raises(RateLimitError):
            await limiter.admit([scope(monthly_tokens=100, **limits)], 60)
    await limiter.admit([scope(monthly_tokens=100)], 60)


async def test_what_can_be_given_back_is_whatever_fails(config, database, monkeypatch):
    limiter = Limiter(database, config, "p1")
    scopes = [scope(max_concurrency=1, tokens_per_minute=100, monthly_tokens=100)]

    def fail(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(limiter.buckets, "put", fail)
    admission = await limiter.admit(scopes, 60)
    with pytest.raises(KeyError, match="a bug"):
        admission.settle(10)
    monkeypatch.undo()
    await limiter.admit([scope(max_concurrency=1, monthly_tokens=100)], 60)


async def test_budgets_of_many_are_read_again_together(config, database):
    limiter = Limiter(database, config, "p1")
    owners = [Scope("key", f"k{index}", Limits(monthly_tokens=100)) for index in range(1100)]
    for owner in owners:
        limiter.budgets._spent[owner.kind, owner.name] = (0, 0)
    await limiter.admit(owners[-1:], 0)
    month = clock.month_of(clock.now_s())
    with database.session(is_write=True) as session:
        for owner in owners:
            sums = {"num_requests": 1, "num_tokens": 100, "cost_nanos": 0}
            session.add(SpendingRow(scope="key", scope_id=owner.name, month=month, **sums))
    for owner in owners:
        limiter.budgets._spent[owner.kind, owner.name] = (0, 0)
    await limiter.maintain()
    for owner in (owners[0], owners[-1]):
        with pytest.raises(QuotaExceededError):
            await limiter.admit([owner], 1)


async def test_without_the_database_a_process_keeps_the_limits_alone_or_refuses(config, database):
    go_down(database)
    scopes = [scope(requests_per_minute=3, max_concurrency=2, monthly_tokens=5)]
    limiter = Limiter(database, config, "p1")
    first = await limiter.admit(scopes, 1)
    await limiter.admit(scopes, 1)
    with pytest.raises(RateLimitError, match="at once"):
        await limiter.admit(scopes, 1)
    first.settle(1)
    (await limiter.admit(scopes, 1)).settle(1)
    with pytest.raises(RateLimitError, match="3 requests"):
        await limiter.admit(scopes, 1)
    with pytest.raises(DatabaseUnavailableError):
        await Limiter(database, replace(config, when_database_is_down="refuse"), "p2").admit(scopes, 1)
    come_back(database)


async def test_slots_taken_without_the_database_are_counted_when_it_is_back(config, database):
    first, second = Limiter(database, config, "p1"), Limiter(database, config, "p2")
    scopes = [scope(max_concurrency=1)]
    go_down(database)
    await first.admit(scopes, 1)
    come_back(database)
    await first.maintain()
    with pytest.raises(RateLimitError, match="at once"):
        await second.admit(scopes, 1)


async def test_what_was_taken_without_the_database_is_not_given_back_to_it(config, database):
    limiter, scopes = Limiter(database, config, "p1"), [scope(tokens_per_minute=100)]
    go_down(database)
    (await limiter.admit(scopes, 100)).settle(1)
    (await limiter.admit(scopes, 90)).settle(1)  # there it is given back to whoever it was taken from
    come_back(database)
    limit = scopes[0].tokens()
    assert await num_taken(limiter.buckets, limit, 150) <= 101


async def test_a_clock_that_is_put_back_locks_nobody_out(database, monkeypatch):
    limit, now_s = RateLimit("clock", 10), clock.now_s()
    assert await num_taken(Buckets(database), limit, 10) == 10
    monkeypatch.setattr(Database, "now_s", lambda *_: now_s - 3600)
    buckets = Buckets(database)
    assert await num_taken(buckets, limit, 20) == 10
    monkeypatch.setattr(Database, "now_s", lambda *_: now_s - 3600 + 30)
    assert await num_taken(Buckets(database), limit, 10) == 5


async def test_nobody_waits_long_for_a_database_that_hangs(config, database, monkeypatch):
    monkeypatch.setattr(database_module, "_ASK_LIMIT_S", 0.3)
    limiter, goes_on = Limiter(database, config, "p1"), threading.Event()
    scopes = [scope(requests_per_minute=100, max_concurrency=50, monthly_tokens=1000)]
    write = database.write
    database.write = lambda: (goes_on.wait(), write())[1]
    async with asyncio.timeout(5):
        await asyncio.gather(*(limiter.admit(scopes, 1) for _ in range(20)))
    goes_on.set()
    del database.write
    await database.run(database.revision)
    await limiter.maintain()


async def test_servers_whose_clocks_differ_keep_limits_and_leases_together(postgres, tmp_path, monkeypatch):
    """What decides is the clock of the database."""
    database = Database(AccountsConfig(tmp_path, postgres.create_database()).url)
    database.migrate()
    TenantStore(database).create_tenant("acme")
    store, limit, now_s = BatchStore(database, tmp_path), RateLimit("tenant:acme:requests", 10), clock.now_s
    file_id = store.new_file_id()
    store.path_of(file_id).touch()
    store.add_file(file_id, "acme", "in.jsonl", "batch")
    batch = store.create_batch("acme", "key", "/v1/completions", file_id, None)
    slots = [Slots(database, process_id) for process_id in ("here", "ahead", "behind")]
    taken = []
    for skew_s, own in zip((0.0, 3600.0, -3600.0), slots, strict=True):
        monkeypatch.setattr("pomona.accounts.clock.now_s", lambda skew_s=skew_s: now_s() + skew_s)
        claimed = store.claim("process")
        is_left = store.cancel(batch.id, "acme").status == "cancelling"
        taken.append(
            (claimed is not None, is_left, await num_taken(Buckets(database), limit, 10), await own.take("acme", 1))
        )
    assert taken == [(True, True, 10, True), *[(False, True, 0, False)] * 2]
    database.close()
