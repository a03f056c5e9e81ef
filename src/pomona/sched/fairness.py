"""Settings of fairness between tenants: the policy, and what is charged for what. See docs/design/0011-fairness.md."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from pomona.core.errors import ConfigError

Policy = Literal["fcfs", "rpm", "lcf", "vtc", "wvtc", "drr"]
Prediction = Literal["none", "mean", "max_tokens"]

_MIN_QUANTUM = 1e-6
"""Less would be lost in rounding beside what accounts owe: they would take turns for ever, and owe as much."""


@dataclass(frozen=True, slots=True)
class ServicePrices:
    """What a request is charged, in units of service. With the defaults a unit is an input token.

    A request of p prompt tokens with q output tokens costs ``per_request + per_input_token * p + per_output_token * q
    + per_token_pair * p * q + per_output_squared * q * q``: linear as in the VTC paper, or quadratic as its cost
    fitted from profiles (Sheng et al., OSDI 2024, sections 3.1 and 5). Adapters are ours.

    Raises:
        ConfigError: a price is negative or not finite.
    """

    per_input_token: float = 1.0
    """Prompt token that has to be computed; charged when the request is admitted."""
    per_output_token: float = 2.0
    """Output token; charged when it is produced."""
    per_cached_token: float = 0.0
    """Prompt token found in the prefix cache; charged when the request is admitted."""
    per_request: float = 0.0
    per_token_pair: float = 0.0
    per_output_squared: float = 0.0
    per_page_loaded: float = 0.0
    """Adapter page (a fixed number of bytes) copied to the device because the request needed it."""
    per_page_second: float = 0.0
    """Adapter page (a fixed number of rank rows) times seconds that the tenant's running requests keep it there, in
    steps that bring it a token."""

    def __post_init__(self) -> None:
        """Check every price once."""
        for field in fields(self):
            price = getattr(self, field.name)
            if not 0.0 <= price < math.inf:
                raise ConfigError(f"{field.name} is {price}: must be finite and at least 0")

    def admission(self, num_prompt_tokens: int, num_cached_tokens: int) -> float:
        """Charge for starting a request."""
        num_computed = num_prompt_tokens - num_cached_tokens
        return self.per_request + self.per_input_token * num_computed + self.per_cached_token * num_cached_tokens

    def outputs(self, num_prompt_tokens: int, first: int, end: int) -> float:
        """Charge for the output tokens ``first .. end - 1`` of a request, counted from 0."""
        per_token = self.per_output_token + self.per_token_pair * num_prompt_tokens
        return per_token * (end - first) + self.per_output_squared * (end * end - first * first)

    def request(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """Charge for a whole request, adapters apart."""
        return self.admission(num_prompt_tokens, 0) + self.outputs(num_prompt_tokens, 0, num_output_tokens)


@dataclass(frozen=True, slots=True)
class FairnessConfig:
    """How the scheduler divides its service between tenants.

    Raises:
        ConfigError: a value is out of range; the message names it.
    """

    policy: Policy = "wvtc"
    """``fcfs``: first come, first served; ``rpm``: that, with a limit on every tenant's requests per minute; ``lcf``:
    least service so far first; ``vtc``: least service first, where idle time earns nothing; ``wvtc``: with tenants'
    weights; ``drr``: deficit round robin, with weights."""
    prices: ServicePrices = ServicePrices()
    prediction: Prediction = "none"
    """Output tokens charged when a request is admitted, and corrected when it ends: none; the mean of the tenant's last
    five; or ``max_tokens``, for clients that say how much they want."""
    requests_per_minute: int = 60
    """With ``rpm``: requests of one tenant in any 60 seconds; more are refused."""
    quantum: float = 1000.0
    """With ``drr``: service a tenant of weight 1 gains per round."""
    max_lead: float | None = None
    """With ``vtc``, ``wvtc`` and ``drr``: service, divided by weight, that a tenant may be ahead of one that waits.
    Beyond, its running requests give way, first computing, then their memory. None: what the KV cache can hold. With
    ``drr`` at least the quantum, which a turn brings at once."""
    has_seats: bool = True
    """With the same: a tenant that waits and has nothing running may take the place of others' latest requests, up to
    an equal share of the memory."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if self.requests_per_minute < 1:
            raise ConfigError(f"requests_per_minute is {self.requests_per_minute}: must be at least 1")
        if not _MIN_QUANTUM <= self.quantum < math.inf:
            raise ConfigError(f"quantum is {self.quantum}: must be finite and at least {_MIN_QUANTUM}")
        if self.max_lead is not None and not 0.0 < self.max_lead < math.inf:
            raise ConfigError(f"max_lead is {self.max_lead}: must be a positive number")

    @property
    def has_bound(self) -> bool:
        """True for the policies that promise how far ahead a tenant can get."""
        return self.policy in ("vtc", "wvtc", "drr")

    @property
    def is_weighted(self) -> bool:
        """True for the policies that honour tenants' weights."""
        return self.policy in ("wvtc", "drr")
