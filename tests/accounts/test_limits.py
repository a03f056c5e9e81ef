"""Limits: never exceeded, in one process or in several, and given back when not used."""

import asyncio
import contextlib
from dataclasses import replace

import pytest

from pomona.accounts import clock
from pomona.accounts.buckets import Buckets, RateLimit
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.limiter import Limiter, Scope
from pomona.accounts.principal import Limits
from pomona.accounts.slots import EXPIRY_S, Slots
from pomona.core.errors import DatabaseUnavailableError, QuotaExceededError, RateLimitError


@contextlib.contextmanager
def process(config: AccountsConfig):
    """Another server process, as far as the database can tell: connections of its own."""
    database = Database(config.url)
    yield database
    database.close()


def scope(**limits):
    return Scope("tenant", "acme", Limits(**limits))


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


async def test_slots_of_a_process_that_died_come_back(database, monkeypatch):
    now_s = clock.now_s()
    monkeypatch.setattr(clock, "now_s", lambda: now_s)
    dead, alive = Slots(database, "dead"), Slots(database, "alive")
    assert await dead.take("acme", 1)
    assert not await alive.take("acme", 1)
    monkeypatch.setattr(clock, "now_s", lambda: now_s + EXPIRY_S + 0.1)
    assert await alive.take("acme", 1)


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
    with pytest.raises(QuotaExceededError, match="100 tokens a month has 40 left"):
        await limiter.admit(scopes, 60)
    admission.settle(10)
    await limiter.admit(scopes, 60)


async def test_without_the_database_a_process_keeps_the_limits_alone_or_refuses(config, database):
    def fail(*_, **__):
        raise DatabaseUnavailableError("down")

    database.read = database.write = fail
    scopes = [scope(requests_per_minute=3, max_concurrency=2, monthly_tokens=5)]
    limiter = Limiter(database, config, "p1")
    first = await limiter.admit(scopes, 1)
    await limiter.admit(scopes, 1)
    with pytest.raises(RateLimitError, match="at once"):
        await limiter.admit(scopes, 1)
    first.settle(1)
    with pytest.raises(RateLimitError, match="3 requests"):
        await limiter.admit(scopes, 1)
    with pytest.raises(DatabaseUnavailableError):
        await Limiter(database, replace(config, when_database_is_down="refuse"), "p2").admit(scopes, 1)
    del database.read, database.write
