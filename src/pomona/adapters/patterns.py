"""Regular expressions that came with an adapter, applied to module names in bounded time.

Whoever can publish an adapter writes these patterns, and a backtracking pattern can run for years. Patterns that
provably cannot explode are applied here; all others in a process of their own, which is killed when time is up.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pomona.adapters import pattern_worker
from pomona.core.errors import AdapterConfigError, AdapterUnavailableError

TIME_LIMIT_S = 5.0
MAX_PATTERNS = 2048
"""Of one field: more than the largest models have modules to adapt, and done within a second."""
_WORKER_PATH = str(Path(pattern_worker.__file__).resolve())
_REPEATED_GROUP = re.compile(r"\)[*+?{]")


class Patience:
    """What is left of TIME_LIMIT_S for the patterns of one config together."""

    def __init__(self) -> None:
        self.left_s = TIME_LIMIT_S


def match_patterns(
    field: str,
    patterns: Sequence[str],
    names: Sequence[str],
    patience: Patience,
    *,
    wrap: str = "{}",
    is_full_match: bool = False,
) -> list[list[str | None]]:
    """Apply each pattern to each name, with ``re.match`` or ``re.fullmatch``.

    Args:
        field: the key of adapter_config.json to blame.
        patterns: as written in the config.
        names: module names.
        patience: of all fields of the config.
        wrap: what to match really; ``{}`` stands for the pattern.
        is_full_match: the whole name must match.

    Returns:
        Per pattern and name: None without a match, else the text of the group ``idx`` ("" if there is none).

    Raises:
        AdapterConfigError: not a regular expression, or it used up what was left of the time, or there are more than
            MAX_PATTERNS.
        AdapterUnavailableError: no process can be started now.
    """
    if len(patterns) > MAX_PATTERNS:
        raise AdapterConfigError(field, f"has {len(patterns)} patterns: at most {MAX_PATTERNS} are matched")
    wrapped = [wrap.replace("{}", pattern) for pattern in patterns]
    if all(_is_harmless(pattern) for pattern in patterns):
        try:
            return pattern_worker.apply_patterns(wrapped, list(names), is_full_match=is_full_match)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterConfigError(field, f"not a valid regular expression: {error}") from error
    request = {"patterns": wrapped, "names": list(names), "is_full_match": is_full_match}
    return _match_in_process(field, request, patience)


def _is_harmless(pattern: str) -> bool:
    """True if backtracking cannot explode: at most one repetition and one group, and the group is not repeated."""
    num_repeats = sum(pattern.count(symbol) for symbol in "*+?{")
    return num_repeats <= 1 and pattern.count("(") <= 1 and not _REPEATED_GROUP.search(pattern)


def _match_in_process(field: str, request: dict[str, object], patience: Patience) -> list[list[str | None]]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", _WORKER_PATH]
    begun_s = time.monotonic()
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=patience.left_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AdapterConfigError(
            field, f"the patterns took longer than {TIME_LIMIT_S:g} s to match module names; simplify this one"
        ) from error
    except OSError as error:
        raise AdapterUnavailableError(f"{field}: no process can be started to match its patterns: {error}") from error
    patience.left_s = max(0.0, patience.left_s - (time.monotonic() - begun_s))
    if done.returncode != 0:
        raise AdapterConfigError(field, "the pattern could not be evaluated; simplify it")
    answer: dict[str, object] = json.loads(done.stdout)
    if "error" in answer:
        raise AdapterConfigError(field, f"not a valid regular expression: {answer['error']}")
    table = answer["table"]
    assert isinstance(table, list)
    return table
