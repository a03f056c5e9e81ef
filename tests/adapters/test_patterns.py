"""Patterns from configs: exact regular expressions, but never without end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.adapters import patterns
from pomona.adapters.patterns import Patience, match_patterns
from pomona.core.errors import AdapterConfigError, AdapterUnavailableError

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head"]


def test_simple_and_complex_patterns_match_alike() -> None:
    simple = match_patterns("target_modules", [".*q_proj"], NAMES, Patience(), is_full_match=True)
    complex_ = match_patterns("target_modules", [".*(q+|z)_(proj)"], NAMES, Patience(), is_full_match=True)
    assert simple == complex_ == [["", None, None]]


def test_the_group_named_idx_is_returned() -> None:
    wrap = r".*\.{}\.(?P<idx>\d+)\."
    assert (
        match_patterns("layers_pattern", ["layers", "l+a+yers"], NAMES, Patience(), wrap=wrap)
        == [["0", "11", None]] * 2
    )


@pytest.mark.parametrize("pattern", ["(", "*", "[", "(?P<n>", "a{2,1}", "(?<=a+)b", "(a)(b)(", "(?P=none)"])
def test_what_is_no_regular_expression_is_refused_naming_the_field(pattern: str) -> None:
    with pytest.raises(AdapterConfigError, match=r"rank_pattern: not a valid regular expression"):
        match_patterns("rank_pattern", [pattern], NAMES, Patience())


@pytest.mark.parametrize("pattern", [r"([a-z_.0-9]+)+#", r"(.|.)*#", "(m|m)(o|o)*" + ".*" * 12 + "#"])
def test_a_pattern_that_would_run_for_years_is_stopped(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "TIME_LIMIT_S", 0.5)
    with pytest.raises(AdapterConfigError, match="target_modules: the patterns took longer than"):
        match_patterns(
            "target_modules", [pattern], ["model.layers.0.self_attn.q_proj" * 2], Patience(), is_full_match=True
        )


def test_the_fields_of_a_config_have_the_time_together() -> None:
    patience = Patience()
    before_s = patience.left_s
    assert match_patterns("target_modules", [".*(q|z)_(proj)"], NAMES, patience) == [["", None, None]]
    assert 0 < patience.left_s < before_s
    patience.left_s = 0.001
    with pytest.raises(AdapterConfigError, match="exclude_modules: the patterns took longer than"):
        match_patterns("exclude_modules", [".*(q|z)_(proj)"], NAMES, patience)


def test_where_no_process_can_be_started_the_adapter_is_unavailable_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.sys, "executable", "/no/such/program")
    with pytest.raises(AdapterUnavailableError, match="rank_pattern: no process can be started"):
        match_patterns("rank_pattern", ["(a+)+"], NAMES, Patience())


def test_more_patterns_than_any_model_has_modules_are_refused_unread() -> None:
    """Harmless ones too: a config has room for a hundred thousand, and the engine's process would apply them all."""
    table = [f"a{number}" for number in range(100_000)]
    with pytest.raises(AdapterConfigError, match="rank_pattern: has 100000 patterns: at most 2048"):
        match_patterns("rank_pattern", table, NAMES, Patience())


@pytest.mark.parametrize(
    "pattern", ["layers", ".*q_proj", r"model\.layers\.\d+\.mlp", "(self_attn|mlp).*", "[a-z]{3}_proj"]
)
def test_ordinary_patterns_need_no_process_of_their_own(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(patterns, "_match_in_process")
    assert len(match_patterns("target_modules", [pattern], NAMES, Patience())) == 1


@given(st.text(alphabet="ab.*+?|()[]{}1,^$\\", max_size=8))
def test_patterns_matched_in_this_process_cannot_explode(pattern: str) -> None:
    """The rule itself: at most one repetition and no repeated group."""
    if patterns._is_harmless(pattern):
        assert sum(pattern.count(symbol) for symbol in "*+?{") <= 1
        assert not any(f"){symbol}" in pattern for symbol in "*+?{")
