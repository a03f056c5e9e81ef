"""Recorded workloads: rows of public traces, read from the lines of their files, and what is made of them.

No public trace joins tokens, tenants and adapters, so a workload is composed: arrivals and lengths from one trace,
adapters from a popularity, tenants from weights; say so wherever results are shown. Who opens files is not asked here.
"""

import csv
import datetime
import itertools
import json
import math
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.workload.checks import MAX_COUNT, MAX_SECONDS, MAX_TOKENS, require_between, require_positive
from pomona.workload.popularity import Popularity
from pomona.workload.spec import DEFAULT_TENANT, WorkloadRequest

TraceFormat = Literal["azure", "mooncake", "plain"]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One recorded request."""

    arrival_s: float
    """Seconds after the first one."""
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    """One per block of the prompt, if recorded; equal hashes mean equal prompts up to the block's end."""
    tenant_id: TenantId | None = None
    """Whose it was, if recorded."""


def fail_line(line: int, message: str) -> ConfigError:
    """The refusal of a line."""
    return ConfigError(f"line {line}: {message}")


def _count(line: int, name: str, value: Any, minimum: int, maximum: int = MAX_TOKENS) -> int:
    try:
        number = int(value) if isinstance(value, str) else operator.index(value)  # JSON may say 3.7
    except (TypeError, ValueError, OverflowError):
        raise fail_line(line, f"{name} is {value!r}: must be an integer") from None
    if number < minimum:
        raise fail_line(line, f"{name} is {number}: must be at least {minimum}")
    if number > maximum:
        raise fail_line(line, f"{name} is {number}: must be at most {maximum}")
    return number


def _checked(rows: Iterable[tuple[int, float, int, int, tuple[int, ...]]]) -> list[TraceRow]:
    """Rows from (line, time, prompt, output, hashes), times made relative to the first."""
    found: list[TraceRow] = []
    first_s = last_s = 0.0
    for line, time_s, num_prompt, num_output, hashes in rows:
        if not math.isfinite(time_s):
            raise fail_line(line, f"its time is {time_s} s: must be finite")
        if not found:
            first_s = last_s = time_s
        if time_s < last_s:
            raise fail_line(line, f"its time is {last_s - time_s:g} s before the one above: times must not descend")
        if time_s - first_s > MAX_SECONDS:
            raise fail_line(
                line, f"its time is {time_s - first_s:g} s after the first: must be at most {MAX_SECONDS:g}"
            )
        last_s = time_s
        found.append(TraceRow(time_s - first_s, num_prompt, num_output, hashes))
    if not found:
        raise ConfigError("the trace has no rows")
    return found


def csv_rows(lines: Iterable[str], columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number, row) of a CSV file with a header.

    Raises:
        ConfigError: a column is missing, or a line is no CSV; names the line.
    """
    reader = csv.DictReader(lines)
    try:
        names = reader.fieldnames or ()
    except csv.Error as error:
        raise fail_line(1, str(error)) from error
    missing = [column for column in columns if column not in names]
    if missing:
        raise fail_line(1, f"no column {missing[0]!r}: must have {', '.join(columns)}")
    for row in _rows(reader):
        yield reader.line_num, row


def _rows(reader: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise fail_line(reader.line_num, str(error)) from error


def read_azure(lines: Iterable[str]) -> list[TraceRow]:
    """AzureLLMInferenceTrace_{code,conv}.csv (Azure Public Dataset, CC-BY-4.0): TIMESTAMP to 100 ns, ContextTokens,
    GeneratedTokens. Requests of no generated token are kept with one, because a request yields at least that.

    Raises:
        ConfigError: a line is malformed, out of order, or there is none; names the line.
    """

    def rows() -> Iterator[tuple[int, float, int, int, tuple[int, ...]]]:
        for line, row in csv_rows(lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
            try:
                whole, _, fraction = row["TIMESTAMP"].partition(".")
                time_s = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC).timestamp()
                time_s += float(f"0.{fraction.rstrip('+0:') or 0}")
            except (TypeError, ValueError, AttributeError):
                raise fail_line(line, f"TIMESTAMP is {row['TIMESTAMP']!r}: must be a date and time") from None
            num_output = max(1, _count(line, "GeneratedTokens", row["GeneratedTokens"], 0))
            yield line, time_s, _count(line, "ContextTokens", row["ContextTokens"], 1), num_output, ()

    return _checked(rows())


def read_mooncake(lines: Iterable[str], tick_s: float = 3.0, seed: int = 0) -> list[TraceRow]:
    """Mooncake's FAST'25 traces (Apache-2.0): JSON lines of timestamp (ms), input_length, output_length, hash_ids, one
    per 512 tokens of the prompt. Their times sit on ticks of 3 s, at which everything would queue; requests are spread
    over their tick at random.

    Args:
        lines: of the file.
        tick_s: width of a tick; 0 leaves times as they are.
        seed: of the spreading.

    Raises:
        ConfigError: a line is malformed, out of order, or there is none; names the line.
    """
    chance = random.Random(f"{seed}/ticks")
    # Any integers will do for hashes; numbered in order of appearance they are small enough for token ids.
    numbers: dict[int, int] = {}

    def rows() -> Iterator[tuple[int, float, int, int, tuple[int, ...]]]:
        for line, text in enumerate(lines, 1):
            try:
                row = json.loads(text)
                time_s = float(row["timestamp"]) / 1000.0
                hashes = tuple(numbers.setdefault(int(value), len(numbers)) for value in row.get("hash_ids", ()))
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
                raise fail_line(
                    line, "must be a JSON object with timestamp, input_length, output_length, and integers as hash_ids"
                ) from None
            num_prompt = _count(line, "input_length", row.get("input_length"), 1)
            num_output = max(1, _count(line, "output_length", row.get("output_length"), 0))
            yield line, time_s, num_prompt, num_output, hashes

    found = _checked(rows())
    if tick_s <= 0.0:
        return found
    spread = [replace(row, arrival_s=row.arrival_s + chance.uniform(0.0, tick_s)) for row in found]
    first_s = min(row.arrival_s for row in spread)
    return sorted((replace(row, arrival_s=row.arrival_s - first_s) for row in spread), key=lambda row: row.arrival_s)


def read_plain(lines: Iterable[str]) -> list[TraceRow]:
    """A CSV of one's own: arrival_s, num_prompt_tokens, num_output_tokens.

    Raises:
        ConfigError: a line is malformed, out of order, or there is none; names the line.
    """

    def rows() -> Iterator[tuple[int, float, int, int, tuple[int, ...]]]:
        names = ("arrival_s", "num_prompt_tokens", "num_output_tokens")
        for line, row in csv_rows(lines, names):
            try:
                time_s = float(row["arrival_s"])
            except (TypeError, ValueError):
                raise fail_line(line, f"arrival_s is {row['arrival_s']!r}: must be a number") from None
            if not 0.0 <= time_s < float("inf"):
                raise fail_line(line, f"arrival_s is {time_s}: must be finite and not negative")
            yield line, time_s, *(_count(line, name, row[name], 1) for name in names[1:]), ()  # type: ignore[misc]

    return _checked(rows())


READERS: dict[TraceFormat, Callable[[Iterable[str]], list[TraceRow]]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "plain": read_plain,
}


@dataclass(frozen=True, slots=True)
class TraceSelection:
    """A part of a trace, and how fast it runs.

    Raises:
        ConfigError: a value is out of range.
    """

    start_s: float = 0.0
    """Leave out what arrived before."""
    duration_s: float | None = None
    """Leave out what arrived later than this after the start, in the trace's own time."""
    speed: float = 1.0
    """2 lets requests arrive twice as fast as recorded."""
    max_prompt_tokens: int | None = None
    """Cut longer prompts; None keeps them, and replicas may refuse them."""
    max_output_tokens: int | None = None
    """Cut longer answers."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if not 0.0 <= self.start_s < float("inf"):
            raise ConfigError(f"start_s is {self.start_s}: must be finite and not negative")
        require_between("speed", self.speed, 1e-6, 1e6)
        for name in ("duration_s", "max_prompt_tokens", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None:
                require_positive(name, value)

    def apply(self, rows: Sequence[TraceRow]) -> list[TraceRow]:
        """The rows selected, times from the start of the selection.

        Raises:
            ConfigError: none is left, or they would take too long.
        """
        end_s = float("inf") if self.duration_s is None else self.start_s + self.duration_s
        chosen = [
            replace(
                row,
                arrival_s=(row.arrival_s - self.start_s) / self.speed,
                num_prompt_tokens=min(row.num_prompt_tokens, self.max_prompt_tokens or row.num_prompt_tokens),
                num_output_tokens=min(row.num_output_tokens, self.max_output_tokens or row.num_output_tokens),
            )
            for row in rows
            if self.start_s <= row.arrival_s < end_s
        ]
        if not chosen:
            where = "from there on" if self.duration_s is None else f"in the {self.duration_s:g} s from there on"
            raise ConfigError(f"start_s is {self.start_s}: the trace has no rows {where}")
        if chosen[-1].arrival_s > MAX_SECONDS:
            raise ConfigError(
                f"speed is {self.speed:g}: requests would arrive for {chosen[-1].arrival_s:g} s: must be at most "
                f"{MAX_SECONDS:g}"
            )
        return chosen


def compose(
    rows: Iterable[TraceRow],
    popularity: Popularity,
    tenant_weights: Sequence[tuple[TenantId, float]] = ((DEFAULT_TENANT, 1.0),),
    seed: int = 0,
) -> Iterator[WorkloadRequest]:
    """Give recorded requests adapters, and tenants if they have none, each from a random stream of its own as in
    ``workload.spec``."""
    adapters = popularity.indices(random.Random(f"{seed}/adapters"))
    tenant_rng = random.Random(f"{seed}/tenant")
    tenants = [tenant for tenant, _ in tenant_weights]
    weights = list(itertools.accumulate(weight for _, weight in tenant_weights))
    for row, adapter_index in zip(rows, adapters, strict=False):
        yield WorkloadRequest(
            arrival_s=row.arrival_s,
            num_prompt_tokens=row.num_prompt_tokens,
            num_output_tokens=row.num_output_tokens,
            adapter_index=adapter_index,
            tenant_id=row.tenant_id or tenant_rng.choices(tenants, cum_weights=weights)[0],
        )


def read_lora_uses(lines: Iterable[str]) -> tuple[tuple[int, ...], float]:
    """How often adapters are asked for in Alibaba's GenTD26 trace (data_trace_processed.csv: column lora_args, a list
    of {modelVersionId, scale}). It is of images, and its file order may be grouped by session: popularity is what can
    be taken from it, reuse distances are not.

    Returns:
        Uses of each adapter, most popular first; and the share of the requests that use none.

    Raises:
        ConfigError: a line is malformed, or there is none; names the line.
    """
    uses: Counter[str] = Counter()
    num_requests = num_without = 0
    for line, row in csv_rows(lines, ("lora_args",)):
        try:
            ids = [str(entry["modelVersionId"]) for entry in json.loads((row["lora_args"] or "[]").replace("'", '"'))]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise fail_line(line, f"lora_args is {row['lora_args']!r}: must be a list of adapters") from None
        uses.update(ids)
        num_requests += 1
        num_without += not ids
    if not uses:
        raise ConfigError("the trace has no adapters")
    return tuple(sorted(uses.values(), reverse=True)), num_without / num_requests


def read_spot_events(lines: Iterable[str]) -> tuple[tuple[float, int], ...]:
    """Instances that could be had over time, from the lines ``time_ms,add|remove,node`` of SpotServe's (Apache-2.0) and
    Parcae's (MIT) traces.

    Returns:
        (seconds, instances from then on), ascending, one per moment of change.

    Raises:
        ConfigError: a line is malformed, out of order, or there is none; names the line.
    """
    alive: set[str] = set()
    capacity: dict[float, int] = {}
    last_ms = 0
    for line, text in enumerate(lines, 1):
        fields = text.strip().split(",")
        if len(fields) != 3 or fields[1] not in ("add", "remove"):
            raise fail_line(line, f"is {text.strip()!r}: must be time_ms,add|remove,node")
        time_ms = _count(line, "time_ms", fields[0], 0, MAX_COUNT)
        if time_ms < last_ms:
            raise fail_line(line, f"its time is {last_ms - time_ms} ms before the one above: times must not descend")
        last_ms = time_ms
        if fields[1] == "add":
            alive.add(fields[2])
        else:
            alive.discard(fields[2])
        capacity[time_ms / 1000.0] = len(alive)
    if not capacity:
        raise ConfigError("the trace has no rows")
    return tuple(capacity.items())
