"""ServeBenchConfig: every setting of one `pomona bench serve`, checked when built."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pomona.core.errors import ConfigError
from pomona.metrics.slo import Slo
from pomona.workload.arrivals import AllAtOnce, Arrivals, GammaArrivals, PoissonArrivals
from pomona.workload.checks import require, require_count, require_positive
from pomona.workload.lengths import FixedLength, Lengths
from pomona.workload.popularity import GROUP_COUNTS

BASE_ONLY = "base"
"""The run in which no request asks for an adapter: what the others are compared with."""

ALL_POPULARITIES = (BASE_ONLY, *GROUP_COUNTS)
DEFAULT_PROMPT_LENGTHS = FixedLength(128)
DEFAULT_OUTPUT_LENGTHS = FixedLength(64)


def expand_popularities(names: str) -> tuple[str, ...]:
    """Read a flag's value: ``all``, one name, or several joined by commas.

    Raises:
        ConfigError: a name is unknown; the message lists those that exist.
    """
    listed = tuple(name.strip() for name in names.split(","))
    return ALL_POPULARITIES if "all" in listed else listed


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0  # a port beyond 65535 raises
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and is_whole and "@" not in url


@dataclass(frozen=True, slots=True)
class ServeBenchConfig:
    """What load to offer to which server.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    base_url: str = "http://127.0.0.1:8000"
    """Root of the server, without ``/v1``."""
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    """Name of the base model; default: the first listed model that has no parent."""
    adapters: tuple[str, ...] = ()
    """Model names of adapters, most popular first; default: every listed model that has a parent."""
    popularities: tuple[str, ...] = ALL_POPULARITIES
    """Run one after another, each over the same arrivals and lengths."""
    group_size: int = 32
    """Requests among which a popularity divides the adapters (Punica's batch of 32)."""
    num_requests: int = 64
    """Per popularity."""
    request_rate_per_s: float = math.inf
    """Mean arrivals per second; infinity sends all at once."""
    arrival_cv: float = 1.0
    """Burstiness: standard deviation of the gaps between arrivals over their mean; 1 is Poisson."""
    max_concurrency: int | None = None
    """Most requests in flight; further ones are held back, as by users who wait. None: open loop, no limit."""
    prompt_lengths: Lengths = DEFAULT_PROMPT_LENGTHS
    output_lengths: Lengths = DEFAULT_OUTPUT_LENGTHS
    ignore_eos: bool = True
    """Ask for exactly the drawn output length. Not in OpenAI's API: switch off for servers that refuse it."""
    temperature: float = 0.0
    num_warmup_requests: int | None = None
    """Sent before each run and not counted; default: one per model that the run asks for."""
    seed: int = 0
    slo: Slo | None = None
    """Adds attainment and goodput to the report."""
    request_timeout_s: float = 600.0
    output_file: Path | None = None
    """Append one JSON line per popularity."""
    is_recording_requests: bool = False
    """Put the record of every request into the JSON lines too."""

    def __post_init__(self) -> None:
        """Check every range once."""
        allowed = "an http:// or https:// address without a password"
        require("base_url", self.base_url, allowed, ok=_is_address(self.base_url))
        if not self.popularities:
            raise ConfigError(f"popularities is empty: must be some of {', '.join(ALL_POPULARITIES)}")
        for name in self.popularities:
            require("popularity", name, f"one of all, {', '.join(ALL_POPULARITIES)}", ok=name in ALL_POPULARITIES)
        if len(set(self.popularities)) != len(self.popularities):
            # The second run would find the first one's prompts in a prefix cache.
            raise ConfigError(f"popularities is {', '.join(self.popularities)}: must name each once")
        require_count("group_size", self.group_size)
        require_count("num_requests", self.num_requests)
        require("request_rate_per_s", self.request_rate_per_s, "positive, or inf", ok=self.request_rate_per_s > 0)
        require_positive("arrival_cv", self.arrival_cv)
        if self.max_concurrency is not None:
            require_count("max_concurrency", self.max_concurrency)
        if self.num_warmup_requests is not None:
            require_count("num_warmup_requests", self.num_warmup_requests, 0)
        require("temperature", self.temperature, "0 or larger", ok=0.0 <= self.temperature < math.inf)
        require_positive("request_timeout_s", self.request_timeout_s)

    @property
    def arrivals(self) -> Arrivals:
        """The arrival process that rate and burstiness describe."""
        if math.isinf(self.request_rate_per_s):
            return AllAtOnce()
        if self.arrival_cv == 1.0:
            return PoissonArrivals(self.request_rate_per_s)
        return GammaArrivals(self.request_rate_per_s, self.arrival_cv)
