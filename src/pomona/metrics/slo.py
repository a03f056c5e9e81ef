"""Service-level objectives of single requests, and what share of the requests that arrived met them.

Attainment counts over arrivals, so that neither rejecting nor aborting requests can raise it (arXiv 2410.14257).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.metrics.timeline import RequestTimeline


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds for each request; None sets none.

    Raises:
        ConfigError: a bound is not a positive number.
    """

    ttft_s: float | None = None
    """Time to first token."""
    tpot_s: float | None = None
    """Time per output token; met by answers of one token, for which it is undefined."""
    e2e_s: float | None = None
    """From arrival to the last token."""

    def __post_init__(self) -> None:
        """Check every bound once."""
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            bound = getattr(self, name)
            if bound is not None and not 0.0 < bound < math.inf:
                raise ConfigError(f"{name} is {bound}: must be a positive number")

    def is_met_by(self, timeline: RequestTimeline) -> bool:
        """True if the request finished with a whole answer, within every bound."""
        return timeline.is_finished and all(
            bound is None or measured is None or measured <= bound
            for bound, measured in (
                (self.ttft_s, timeline.ttft_s),
                (self.tpot_s, timeline.tpot_s),
                (self.e2e_s, timeline.e2e_s),
            )
        )


def attainment(slo: Slo, arrived: Collection[RequestTimeline]) -> float | None:
    """Share of the requests that met the objectives, in [0, 1]; None if none arrived.

    Args:
        slo: the objectives.
        arrived: every request that arrived, however it ended.
    """
    if not arrived:
        return None
    return sum(slo.is_met_by(timeline) for timeline in arrived) / len(arrived)


def goodput(slo: Slo, arrived: Collection[RequestTimeline], duration_s: float) -> float:
    """Requests per second that met the objectives.

    Args:
        slo: the objectives.
        arrived: every request that arrived in that time.
        duration_s: length of the observation, positive.
    """
    assert duration_s > 0.0
    return sum(slo.is_met_by(timeline) for timeline in arrived) / duration_s
