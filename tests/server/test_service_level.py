"""Classes and targets: from the body and the operator's settings to the engine."""

from typing import Any

import pytest

from pomona.accounts.principal import Principal
from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.core.request import Priority, ServiceLevel
from pomona.server.service_level import ServiceLevels, Targets, parse_targets
from pomona.server.tenant import Caller, default_caller


def caller(tenant: str, **level: Any) -> Caller:
    tenant_id = TenantId(tenant)
    return Caller(tenant_id, b"", ServiceLevel(**level), Principal("k", "k", tenant_id, None, b"", None))


@pytest.mark.parametrize(
    "tier, priority",
    [
        (None, Priority.STANDARD),
        ("auto", Priority.STANDARD),
        ("default", Priority.STANDARD),
        ("flex", Priority.BATCH),
        ("priority", Priority.INTERACTIVE),
    ],
)
def test_service_tiers_name_classes(tier, priority):
    assert ServiceLevels().level_of(default_caller(b""), tier).priority is priority


def test_with_accounts_only_named_tenants_go_before_others():
    levels = ServiceLevels(priority_tenants=frozenset({"acme"}))
    assert levels.level_of(caller("acme"), "priority").priority is Priority.INTERACTIVE
    assert levels.level_of(caller("bolt"), "priority").priority is Priority.STANDARD
    assert levels.level_of(caller("bolt"), "flex").priority is Priority.BATCH
    everybody = ServiceLevels(priority_tenants=frozenset({"*"}))
    assert everybody.level_of(caller("bolt"), "priority").priority is Priority.INTERACTIVE


def test_targets_are_the_tenants_own_or_else_everybodys():
    levels = ServiceLevels(targets=(parse_targets("acme=0.5,0.05"), parse_targets("*=,0.2")))
    level = levels.level_of(caller("acme", weight=3.0), None)
    assert (level.weight, level.ttft_s, level.tpot_s) == (3.0, 0.5, 0.05)
    level = levels.level_of(caller("bolt"), None)
    assert (level.ttft_s, level.tpot_s) == (None, 0.2)


def test_a_tenants_own_level_holds_where_nothing_else_is_said():
    own = caller("acme", priority=Priority.INTERACTIVE, ttft_s=0.3)
    level = ServiceLevels(targets=(parse_targets("*=9,9"),)).level_of(own, None)
    assert (level.priority, level.ttft_s, level.tpot_s) == (Priority.INTERACTIVE, 0.3, None)
    assert ServiceLevels().level_of(own, "flex").priority is Priority.BATCH
    assert ServiceLevels(targets=(parse_targets("acme=0.1"),)).level_of(own, None).ttft_s == 0.1


def test_batch_work_never_hurries_and_has_no_targets():
    levels = ServiceLevels(frozenset({"*"}), (parse_targets("*=0.5"),))
    for tier in (None, "auto", "priority", "flex"):
        level = levels.level_of(caller("acme", priority=Priority.BATCH), tier)
        assert (level.priority, level.ttft_s) == (Priority.BATCH, None)


def test_a_target_may_be_left_out():
    assert parse_targets("acme=0.5") == ("acme", Targets(0.5, None))
    assert parse_targets("acme=,0.05") == ("acme", Targets(None, 0.05))


@pytest.mark.parametrize("text", ["acme", "=1", "acme=", "acme=,", "acme=1,2,3", "acme=fast", "acme=0", "acme=1,-2"])
def test_malformed_targets_are_refused_by_what_was_written(text):
    with pytest.raises(ConfigError, match=r"target '" + text.replace("*", r"\*")):
        parse_targets(text)
