"""How evenly tenants were served: service over time, the two differences of the VTC paper, and Jain's index.

Mind two traps. The windowed difference can rank first come, first served above a fair policy, because what a tenant did
not ask for counts as fair; the accumulated gap does not, so report both. And both grow with the length of a run, so
compare runs over the same seconds.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from pomona.core.ids import TenantId


@dataclass(frozen=True, slots=True)
class ServiceSpan:
    """What one request asked for and got."""

    tenant_id: TenantId
    arrival_s: float
    first_token_s: float
    end_s: float
    service: float
    """Units, such as input tokens + 2 * output tokens; taken to be given evenly from the first token to the end."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference in service over a run."""

    largest: float
    mean: float
    variance: float


@dataclass(slots=True)
class ServiceLog:
    """Service as it was given: events of each tenant, in the order of time."""

    _times_s: dict[TenantId, list[float]] = field(default_factory=dict)
    _totals: dict[TenantId, list[float]] = field(default_factory=dict)

    @property
    def tenants(self) -> list[TenantId]:
        """Who was served."""
        return list(self._times_s)

    def add(self, tenant_id: TenantId, now_s: float, service: float) -> None:
        """Note service given now; times of one tenant do not run backwards."""
        times_s = self._times_s.setdefault(tenant_id, [])
        totals = self._totals.setdefault(tenant_id, [])
        assert not times_s or now_s >= times_s[-1], "service is noted in the order of time"
        times_s.append(now_s)
        totals.append((totals[-1] if totals else 0.0) + service)

    def total(self, tenant_id: TenantId, until_s: float) -> float:
        """Service of a tenant up to and including a time."""
        index = bisect.bisect_right(self._times_s.get(tenant_id, ()), until_s)
        return self._totals[tenant_id][index - 1] if index else 0.0


def accumulated_gap(log: ServiceLog, tenants: Sequence[TenantId], until_s: float) -> float:
    """Service of the tenant that got most minus that of the one that got least, since the start."""
    totals = [log.total(tenant_id, until_s) for tenant_id in tenants]
    return max(totals) - min(totals)


def largest_accumulated_gap(log: ServiceLog, tenants: Sequence[TenantId], times_s: Sequence[float]) -> float:
    """The largest of the gaps at these times."""
    return max(accumulated_gap(log, tenants, time_s) for time_s in times_s)


def windowed_difference(spans: Sequence[ServiceSpan], times_s: Sequence[float], window_s: float = 60.0) -> Difference:
    """The VTC paper's difference in service (section 5.1), over windows centred on these times: with s the rate at
    which a tenant is served in the window, and a the rate at which it asked in it, the sum over tenants of
    ``min(max s - s, |a - s|)``, in units per second."""
    tenants = list(dict.fromkeys(span.tenant_id for span in spans))
    values = []
    for time_s in times_s:
        low_s, high_s = time_s - window_s / 2, time_s + window_s / 2
        served = dict.fromkeys(tenants, 0.0)
        asked = dict.fromkeys(tenants, 0.0)
        for span in spans:
            length_s = max(span.end_s - span.first_token_s, 1e-9)
            overlap_s = min(high_s, span.first_token_s + length_s) - max(low_s, span.first_token_s)
            if overlap_s > 0.0:
                served[span.tenant_id] += span.service * overlap_s / length_s / window_s
            if low_s <= span.arrival_s < high_s:
                asked[span.tenant_id] += span.service / window_s
        most = max(served.values())
        values.append(sum(min(most - served[one], abs(asked[one] - served[one])) for one in tenants))
    mean = sum(values) / len(values)
    return Difference(max(values), mean, sum((value - mean) ** 2 for value in values) / len(values))


def jain_index(shares: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1 / n when one has all; 1 when nobody has anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0
