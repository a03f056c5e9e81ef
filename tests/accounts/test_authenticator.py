"""Keys through the cache: as quick as memory, as true as the database."""

import asyncio
import contextlib
import threading
from dataclasses import replace

import pytest

from pomona.accounts.accounts import Accounts
from pomona.accounts.clock import now_s
from pomona.accounts.database import Database
from pomona.accounts.principal import Limits, Role
from pomona.accounts.tables import LimitsRow, PriceRow, TenantRow
from pomona.accounts.tenants import TenantStore
from pomona.accounts.usage_rows import Price
from pomona.core.errors import AccountConflictError, AccountNotFoundError, DatabaseUnavailableError, InvalidRequestError
from pomona.core.request import ServiceLevel
from support.driver import until


@pytest.fixture
async def accounts(config):
    async with Accounts(config) as running:
        await running.change(running.tenants.create_tenant, "acme")
        yield running


async def new_key(accounts, tenant_id="acme", **options):
    return await accounts.change(accounts.tenants.create_key, tenant_id, **options)


async def test_a_key_stands_for_its_tenant_with_its_limits(accounts):
    await accounts.change(accounts.tenants.set_limits, "tenant", "acme", Limits(requests_per_minute=5))
    _, key = await new_key(accounts)
    await accounts.change(accounts.tenants.set_limits, "key", key.key_id, Limits(max_concurrency=2))
    principal = await accounts.authenticator.authenticate(key.text)
    assert principal.tenant_id == "acme"
    assert principal.role is None
    assert principal.tenant_limits == Limits(requests_per_minute=5)
    assert principal.key_limits == Limits(max_concurrency=2)


async def test_an_admin_key_has_a_role_and_no_tenant(accounts):
    _, key = await new_key(accounts, None, role=Role.AUDITOR)
    principal = await accounts.authenticator.authenticate(key.text)
    assert (principal.tenant_id, principal.role) == (None, Role.AUDITOR)


async def test_a_right_id_with_a_wrong_secret_is_refused(accounts):
    _, key = await new_key(accounts)
    wrong = key.text[:-1] + ("a" if key.text[-1] != "a" else "b")
    assert await accounts.authenticator.authenticate(wrong) is None
    assert await accounts.authenticator.authenticate(key.text) is not None
    assert await accounts.authenticator.authenticate(wrong) is None


async def test_unknown_keys_are_refused_however_often_and_do_not_push_out_known_ones(config):
    async with Accounts(replace(config, key_cache_size=4, revision_poll_s=1000.0)) as accounts:
        await accounts.change(accounts.tenants.create_tenant, "acme")
        _, key = await new_key(accounts)
        assert await accounts.authenticator.authenticate(key.text)
        for index in range(20):
            assert await accounts.authenticator.authenticate(f"pk-{index:012d}-{'x' * 36}") is None
        accounts.database.read = None  # a look-up would fail
        assert await accounts.authenticator.authenticate(key.text)
        del accounts.database.read


async def test_a_revoked_key_ends_at_once_here(accounts):
    _, key = await new_key(accounts)
    assert await accounts.authenticator.authenticate(key.text)
    await accounts.change(accounts.tenants.revoke_key, key.key_id)
    assert await accounts.authenticator.authenticate(key.text) is None


async def test_a_key_revoked_by_another_process_ends_within_the_poll(accounts, config):
    _, key = await new_key(accounts)
    assert await accounts.authenticator.authenticate(key.text)
    other = Database(config.url)
    TenantStore(other).revoke_key(key.key_id)
    other.close()
    async with asyncio.timeout(20):
        while await accounts.authenticator.authenticate(key.text) is not None:
            await asyncio.sleep(0.01)


async def test_an_own_change_while_the_poll_asks_hides_no_foreign_one(accounts, config):
    _, key = await new_key(accounts)
    ask, loop, num_asked = accounts.database.revision, asyncio.get_running_loop(), 0

    def change_and_ask():
        nonlocal num_asked
        num_asked += 1
        if num_asked == 1:
            accounts.tenants.update_tenant("acme", is_disabled=False)
        elif num_asked == 2:
            asked = asyncio.run_coroutine_threadsafe(accounts.authenticator.authenticate(key.text), loop)
            assert asked.result() is not None
            other = Database(config.url)
            TenantStore(other).revoke_key(key.key_id)
            other.close()
        return ask()

    accounts.database.revision = change_and_ask
    async with asyncio.timeout(20):
        while num_asked < 2 or await accounts.authenticator.authenticate(key.text) is not None:
            await asyncio.sleep(0.01)


async def test_a_disabled_tenant_has_no_valid_keys_until_it_is_enabled(accounts):
    _, key = await new_key(accounts)
    await accounts.change(accounts.tenants.update_tenant, "acme", is_disabled=True)
    assert await accounts.authenticator.authenticate(key.text) is None
    await accounts.change(accounts.tenants.update_tenant, "acme", is_disabled=False)
    assert await accounts.authenticator.authenticate(key.text)


async def test_a_key_expires_although_it_is_remembered(accounts):
    _, key = await new_key(accounts, expires_s=now_s() + 0.3)
    assert await accounts.authenticator.authenticate(key.text)
    await asyncio.sleep(0.35)
    assert await accounts.authenticator.authenticate(key.text) is None


async def test_after_rotation_both_keys_are_valid_until_the_overlap_ends(accounts):
    _, old = await new_key(accounts)
    card, new = await accounts.change(accounts.tenants.rotate_key, old.key_id, 60.0)
    assert card.replaces == old.key_id
    first = await accounts.authenticator.authenticate(old.text)
    second = await accounts.authenticator.authenticate(new.text)
    assert first.root_id == second.root_id == old.key_id
    _, newest = await accounts.change(accounts.tenants.rotate_key, new.key_id, 0.0)
    assert await accounts.authenticator.authenticate(new.text) is None
    assert await accounts.authenticator.authenticate(newest.text)
    with pytest.raises(AccountNotFoundError, match="no longer valid"):
        await accounts.change(accounts.tenants.rotate_key, new.key_id, 0.0)


@pytest.mark.parametrize("expires_s", [None, 4e9])
async def test_a_key_rotated_again_during_the_overlap_lives_as_long_as_the_first_one_would_have(accounts, expires_s):
    """Whoever has not got the answer asks again."""
    _, old = await new_key(accounts, expires_s=expires_s)
    for _ in range(2):
        card, _ = await accounts.change(accounts.tenants.rotate_key, old.key_id, 60.0)
        assert card.expires_s == expires_s


async def test_every_tenant_has_its_own_salt_unless_it_joins_a_group(accounts):
    tenants = ("acme", "bolt", "core")
    for tenant_id in tenants[1:]:
        await accounts.change(accounts.tenants.create_tenant, tenant_id)
    keys = [(await new_key(accounts, tenant_id))[1] for tenant_id in tenants]

    async def salts():
        return [(await accounts.authenticator.authenticate(key.text)).cache_salt for key in keys]

    before = await salts()
    assert len(set(before)) == 3
    assert all(len(salt) == 16 for salt in before)
    for tenant_id in ("acme", "bolt"):
        await accounts.change(accounts.tenants.update_tenant, tenant_id, prefix_group="shared-prompt")
    first, second, third = await salts()
    assert first == second not in (before[0], before[1], third)


async def test_known_keys_are_accepted_without_the_database_if_the_operator_says_so(config):
    for rule, is_known in (("answer", True), ("refuse", False)):
        async with Accounts(replace(config, when_database_is_down=rule, known_key_ttl_s=0.001)) as accounts:
            with contextlib.suppress(AccountConflictError):
                await accounts.change(accounts.tenants.create_tenant, "acme")
            _, key = await new_key(accounts)
            assert await accounts.authenticator.authenticate(key.text)
            await asyncio.sleep(0.01)

            def fail(*_, **__):
                raise DatabaseUnavailableError("down")

            accounts.database.read = accounts.database.write = fail
            if is_known:
                assert await accounts.authenticator.authenticate(key.text)
            else:
                with pytest.raises(DatabaseUnavailableError):
                    await accounts.authenticator.authenticate(key.text)
            del accounts.database.read, accounts.database.write


async def test_of_two_changes_at_once_the_second_finds_the_first(accounts, config):
    store = accounts.tenants
    tenant = dict.fromkeys(("disabled_s", "prefix_group", "ttft_s", "tpot_s"))
    tenant |= {"id": "bolt", "created_s": 1.0, "cache_secret": b"", "weight": 1.0, "priority": "standard"}
    price = PriceRow(adapter="", input_nanos=1, cached_nanos=1, output_nanos=1)

    async def at_once(row, work, *args):
        with other.session(is_change=True) as session:
            session.add(row)
            session.flush()
            second = asyncio.create_task(accounts.change(work, *args))
            await asyncio.sleep(0.3)
        return await second

    other = Database(config.url)

    with pytest.raises(AccountConflictError, match="bolt"):
        await at_once(TenantRow(**tenant), store.create_tenant, "bolt")
    await at_once(LimitsRow(scope="tenant", scope_id="acme"), store.set_limits, "tenant", "acme", Limits(2))
    assert store.limits("tenant", "acme") == Limits(2)
    await at_once(price, accounts.usage.set_price, "", Price(2, 2, 2))
    assert accounts.usage.prices() == {"": Price(2, 2, 2)}
    other.close()


async def test_what_cannot_be_is_refused_by_name(accounts):
    tenants = accounts.tenants
    with pytest.raises(AccountConflictError, match="acme"):
        await accounts.change(tenants.create_tenant, "acme")
    for bad in ("", "Acme", "a_b", "-a", "a-", "a" * 64, "a/b"):
        with pytest.raises(InvalidRequestError, match="id is"):
            await accounts.change(tenants.create_tenant, bad)
    with pytest.raises(AccountNotFoundError, match="nobody"):
        await new_key(accounts, "nobody")
    for scope in ("tenant", "key"):
        with pytest.raises(AccountNotFoundError, match="nobody"):
            tenants.limits(scope, "nobody")
    with pytest.raises(InvalidRequestError, match="requests_per_minute is -1"):
        await accounts.change(tenants.set_limits, "tenant", "acme", Limits(requests_per_minute=-1))
    with pytest.raises(InvalidRequestError, match="weight"):
        await accounts.change(tenants.update_tenant, "acme", change_level=lambda _: ServiceLevel(weight=float("nan")))
    with pytest.raises(InvalidRequestError, match="expires_at"):
        await new_key(accounts, expires_s=1.0)


async def test_a_change_that_fails_makes_no_process_forget_whom_it_knows(accounts):
    _, key = await new_key(accounts)
    assert await accounts.authenticator.authenticate(key.text)

    def fail(*_, **__):
        raise DatabaseUnavailableError("down")

    accounts.database.read = accounts.database.write = fail
    with pytest.raises(DatabaseUnavailableError):
        await accounts.change(accounts.shares.remove, "bolt", "legal")
    assert await accounts.authenticator.authenticate(key.text)
    del accounts.database.read, accounts.database.write


async def test_a_key_that_was_made_is_shown_although_the_database_goes_away_just_then(accounts, monkeypatch):
    def fail():
        raise DatabaseUnavailableError("down")

    monkeypatch.setattr(accounts.shares, "adapters", fail)
    _, key = await new_key(accounts)
    assert await accounts.authenticator.authenticate(key.text)


async def test_a_change_whose_maker_waits_no_more_is_known_here_too(accounts):
    key, new = await new_key(accounts)
    assert await accounts.authenticator.authenticate(new.text)
    is_begun, may_end = threading.Event(), threading.Event()

    def revoke(key_id):
        is_begun.set()
        may_end.wait(10)
        return accounts.tenants.revoke_key(key_id)

    revoking = asyncio.create_task(accounts.change(revoke, key.id))
    await until(is_begun.is_set, "the change is under way")
    revoking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await revoking
    may_end.set()
    await asyncio.sleep(10 * accounts.config.revision_poll_s)
    assert await accounts.authenticator.authenticate(new.text) is None
