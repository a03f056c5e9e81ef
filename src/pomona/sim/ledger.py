"""Ledger: what became of every request of a cluster simulation, in columns (some 60 bytes per request), and the numbers
that are read from them. Latencies are the server's, by the glossary's definitions.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from pomona.core.ids import ReplicaId, TenantId
from pomona.metrics.slo import Slo
from pomona.workload.spec import WorkloadRequest

_NAN = math.nan


class Ending(IntEnum):
    """How a request ended."""

    NONE = 0
    """It had not when the simulation stopped."""
    FINISHED = 1
    REJECTED = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the seconds of a set of requests."""

    num_samples: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> "Percentiles | None":
        """Summarise; None if there are no samples."""
        ordered = sorted(samples)
        if not ordered:
            return None
        p50, p90, p99 = (_percentile(ordered, share) for share in (0.5, 0.9, 0.99))
        return cls(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p99)


def _percentile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Ledger:
    """One row per request, numbered in order of arrival."""

    def __init__(self) -> None:
        self.arrival_s = array("d")
        self.first_token_s = array("d")
        """NaN without tokens."""
        self.last_token_s = array("d")
        """When it ended, whatever it got; NaN while it has not."""
        self.num_prompt_tokens = array("l")
        self.num_output_tokens = array("l")
        """Tokens delivered."""
        self.num_restarts = array("B")
        """Times it began again on another replica."""
        self.ending = array("B")
        self.replica_id = array("l")
        """Where it ended; -1 nowhere."""
        self.adapter_index = array("l")
        """-1 for the base model alone."""
        self.tenant = array("I")
        """Index into ``tenants``."""
        self.tenants: list[TenantId] = []
        self._tenant_index: dict[TenantId, int] = {}

    def __len__(self) -> int:
        return len(self.arrival_s)

    def arrive(self, request: WorkloadRequest) -> int:
        """Open a row; returns its number."""
        number = len(self.arrival_s)
        tenant = self._tenant_index.get(request.tenant_id)
        if tenant is None:
            tenant = self._tenant_index[request.tenant_id] = len(self.tenants)
            self.tenants.append(request.tenant_id)
        self.arrival_s.append(request.arrival_s)
        self.first_token_s.append(_NAN)
        self.last_token_s.append(_NAN)
        self.num_prompt_tokens.append(request.num_prompt_tokens)
        self.num_output_tokens.append(0)
        self.num_restarts.append(0)
        self.ending.append(Ending.NONE)
        self.replica_id.append(-1)
        self.adapter_index.append(-1 if request.adapter_index is None else request.adapter_index)
        self.tenant.append(tenant)
        return number

    def close(self, number: int, ending: Ending, replica_id: ReplicaId | None = None) -> None:
        """Note how a request ended; it ends once."""
        assert self.ending[number] == Ending.NONE
        self.ending[number] = ending
        self.replica_id[number] = -1 if replica_id is None else replica_id

    def ttft_s(self, number: int) -> float:
        """First token minus arrival; NaN without tokens."""
        return self.first_token_s[number] - self.arrival_s[number]

    def tpot_s(self, number: int) -> float:
        """(Last token minus first) / (tokens - 1); NaN below two tokens."""
        num_tokens = self.num_output_tokens[number]
        if num_tokens < 2:
            return _NAN
        return (self.last_token_s[number] - self.first_token_s[number]) / (num_tokens - 1)

    def meets(self, number: int, slo: Slo) -> bool:
        """True if the request finished within every bound (see ``Slo.is_met_by``)."""
        if self.ending[number] != Ending.FINISHED:
            return False
        e2e_s = self.last_token_s[number] - self.arrival_s[number]
        measured = ((slo.ttft_s, self.ttft_s(number)), (slo.tpot_s, self.tpot_s(number)), (slo.e2e_s, e2e_s))
        # A NaN, being undefined, exceeds nothing.
        return not any(bound is not None and value > bound for bound, value in measured)

    def numbers(self, from_s: float = 0.0, until_s: float = math.inf) -> list[int]:
        """Rows of requests that arrived in [from_s, until_s)."""
        return [number for number, arrival_s in enumerate(self.arrival_s) if from_s <= arrival_s < until_s]

    def numbers_by_tenant(self) -> dict[TenantId, list[int]]:
        """Rows of every tenant's requests."""
        found: dict[TenantId, list[int]] = {tenant: [] for tenant in self.tenants}
        for number, index in enumerate(self.tenant):
            found[self.tenants[index]].append(number)
        return found

    def summary(self, slo: Slo, duration_s: float, numbers: Sequence[int] | None = None) -> "LedgerSummary":
        """The figures of these rows, or of all.

        Args:
            slo: the objectives.
            duration_s: what rates are divided by, positive.
            numbers: rows to take.
        """
        rows = range(len(self)) if numbers is None else numbers
        endings = [self.ending[number] for number in rows]
        num_met = sum(self.meets(number, slo) for number in rows)
        has_tokens = [number for number in rows if self.num_output_tokens[number] > 0]
        ended = [number for number in rows if self.ending[number] == Ending.FINISHED]
        return LedgerSummary(
            num_requests=len(rows),
            num_finished=endings.count(Ending.FINISHED),
            num_rejected=endings.count(Ending.REJECTED),
            num_failed=endings.count(Ending.FAILED),
            num_restarts=sum(self.num_restarts[number] for number in rows),
            attainment=num_met / len(rows) if rows else math.nan,
            goodput_rps=num_met / duration_s,
            throughput_rps=endings.count(Ending.FINISHED) / duration_s,
            output_tokens_per_s=sum(self.num_output_tokens[number] for number in rows) / duration_s,
            ttft_s=Percentiles.of(map(self.ttft_s, has_tokens)),
            tpot_s=Percentiles.of(self.tpot_s(number) for number in ended if self.num_output_tokens[number] > 1),
            e2e_s=Percentiles.of(self.last_token_s[number] - self.arrival_s[number] for number in ended),
        )


@dataclass(frozen=True, slots=True)
class LedgerSummary:
    """Figures of a set of requests."""

    num_requests: int
    num_finished: int
    num_rejected: int
    num_failed: int
    num_restarts: int
    attainment: float
    """Share of those that arrived that met the objectives."""
    goodput_rps: float
    throughput_rps: float
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    e2e_s: Percentiles | None

    @property
    def num_open(self) -> int:
        """Those that had not ended when the simulation stopped."""
        return self.num_requests - self.num_finished - self.num_rejected - self.num_failed


@dataclass(slots=True)
class ReplicaRecord:
    """One replica's life."""

    replica_id: ReplicaId
    asked_s: float
    """When it was asked for; from then on it is paid for."""
    ready_s: float = _NAN
    end_s: float = _NAN
    """When it was released, interrupted or failed; NaN if it lived to the end."""
    is_lost: bool = False
    """It was interrupted or failed."""
    busy_s: float = 0.0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens computed: what the prefix cache found is not among them, what was recomputed is."""
    num_output_tokens: int = 0
    num_preemptions: int = 0
    num_adapter_loads: int = 0


@dataclass(frozen=True, slots=True)
class FleetSample:
    """The cluster at one moment."""

    now_s: float
    loads: tuple[tuple[ReplicaId, int], ...]
    """Requests on every serving replica, draining ones included."""
    num_starting: int
    num_waiting: int
    """Requests that wait for a replica."""
    kv_used_share: float
    adapter_pages_used_share: float
    service: dict[TenantId, float] = field(default_factory=dict)
    """Service delivered so far (prompt tokens + 2 * output tokens), by tenant."""
