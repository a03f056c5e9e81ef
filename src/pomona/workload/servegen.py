"""ServeGen's way of making a workload (arXiv 2505.09999): many clients, each with its own rate, burstiness and lengths
in every window of time; what a server sees is their sum. Read from reduced tables: per client and window the rate, the
coefficient of variation and family of the gaps, and mean and percentiles of the lengths. A client is a tenant.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.workload.arrivals import CVS, RATES
from pomona.workload.checks import MAX_TOKENS
from pomona.workload.traces import TraceRow, csv_rows, fail_line

_WINDOW_S = 600.0
_P90 = 1.2815515655446004
"""The 90th percentile of a standard normal variable."""


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """One client during one window."""

    start_s: float
    rate_per_s: float
    cv: float
    """Of the gaps between requests."""


@dataclass(frozen=True, slots=True)
class ClientLengths:
    """Percentiles of a client's lengths from some time on."""

    start_s: float
    p50: float
    p90: float
    p99: float

    def draw(self, rng: random.Random) -> int:
        """A lognormal length of these p50 and p90, at most twice p99."""
        sigma = math.log(max(self.p90, self.p50) / self.p50) / _P90
        return max(1, round(min(self.p50 * rng.lognormvariate(0.0, sigma), 2.0 * self.p99)))


def read_rates(lines: Iterable[str]) -> dict[str, list[ClientWindow]]:
    """client -> windows in which it sent anything, ascending, from the columns client, window_start_s, rate_rps, cv.

    Raises:
        ConfigError: a line is malformed, windows of a client overlap, or no client sends anything; names the line, or
            the client.
    """
    found: dict[str, list[ClientWindow]] = {}
    for line, row in csv_rows(lines, ("client", "window_start_s", "rate_rps", "cv")):
        start_s, rate, cv = (_number(line, name, row[name]) for name in ("window_start_s", "rate_rps", "cv"))
        if rate > 0.0:
            for name, value, allowed in (("rate_rps", rate, RATES), ("cv", cv or 1.0, CVS)):
                if not allowed[0] <= value <= allowed[1]:
                    raise fail_line(line, f"{name} is {value}: must be between {allowed[0]:g} and {allowed[1]:g}")
            found.setdefault(row["client"], []).append(ClientWindow(start_s, rate, cv or 1.0))
    if not found:
        raise ConfigError("the trace has no client that sends anything")
    for client, windows in found.items():
        windows.sort(key=lambda window: window.start_s)
        for before, after in itertools.pairwise(windows):
            if after.start_s - before.start_s < _WINDOW_S:
                raise ConfigError(
                    f"client {client!r} has windows at {before.start_s:g} and {after.start_s:g} s: must be "
                    f"{_WINDOW_S:g} s apart"
                )
    return found


def read_lengths(lines: Iterable[str]) -> dict[tuple[str, str], list[ClientLengths]]:
    """(client, field) -> lengths from when on, ascending; field is input_tokens or output_tokens.

    Raises:
        ConfigError: a line is malformed; names the line.
    """
    found: dict[tuple[str, str], list[ClientLengths]] = {}
    for line, row in csv_rows(lines, ("client", "window_start_s", "field", "p50", "p90", "p99")):
        start_s, p50, p90, p99 = (_number(line, name, row[name]) for name in ("window_start_s", "p50", "p90", "p99"))
        if max(p50, p90, p99) > MAX_TOKENS:
            raise fail_line(line, f"lengths of {max(p50, p90, p99):g} tokens: must be at most {MAX_TOKENS}")
        found.setdefault((row["client"], row["field"]), []).append(
            ClientLengths(start_s, max(p50, 1.0), max(p90, 1.0), max(p99, 1.0))
        )
    for lengths in found.values():
        lengths.sort(key=lambda entry: entry.start_s)
    return found


def client_requests(
    rates: Mapping[str, list[ClientWindow]],
    lengths: Mapping[tuple[str, str], list[ClientLengths]],
    start_s: float,
    duration_s: float,
    seed: int = 0,
) -> Iterator[TraceRow]:
    """Yield the requests of all clients in [start, start + duration), by ascending arrival from 0.

    Every client has a random stream of its own. One without lengths of prompts or answers sends nothing.
    """
    streams = (
        _one_client(client, windows, lengths, (start_s, start_s + duration_s), random.Random(f"{seed}/{client}"))
        for client, windows in rates.items()
    )
    return heapq.merge(*streams, key=lambda request: request.arrival_s)


def _one_client(
    client: str,
    windows: list[ClientWindow],
    lengths: Mapping[tuple[str, str], list[ClientLengths]],
    span: tuple[float, float],
    rng: random.Random,
) -> Iterator[TraceRow]:
    prompts, outputs = (lengths.get((client, field), []) for field in ("input_tokens", "output_tokens"))
    if not prompts or not outputs:
        return
    for window in windows:
        if window.start_s >= span[1] or window.start_s + _WINDOW_S <= span[0]:
            continue
        # Gaps are Gamma: mean 1 / rate, deviation cv times the mean. The window begins anywhere in its first one, and
        # more likely in a long one: such a gap, drawn in proportion to its length, is Gamma of a shape one larger.
        shape = 1.0 / window.cv**2
        scale = window.cv**2 / window.rate_per_s
        time_s = window.start_s + rng.gammavariate(shape + 1.0, scale) * rng.random()
        while time_s < min(window.start_s + _WINDOW_S, span[1]):
            prompt, output = (_at(entries, time_s).draw(rng) for entries in (prompts, outputs))
            if time_s >= span[0]:
                yield TraceRow(time_s - span[0], prompt, output, tenant_id=TenantId(f"client-{client}"))
            time_s += rng.gammavariate(shape, scale)


def _at(entries: list[ClientLengths], time_s: float) -> ClientLengths:
    """The latest entry that has begun, or the first."""
    return max((entry for entry in entries if entry.start_s <= time_s), key=lambda e: e.start_s, default=entries[0])


def _number(line: int, name: str, text: str) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise fail_line(line, f"{name} is {text!r}: must be a number") from None
    if not 0.0 <= value < math.inf:
        raise fail_line(line, f"{name} is {value}: must be finite and not negative")
    return value
