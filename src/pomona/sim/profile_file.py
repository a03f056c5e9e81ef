"""CostProfile: a replica's measured speed and size, as a file. Written by ``pomona profile``, read by simulations."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pomona.core.errors import ConfigError
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.step_work import StepWork

_QUANTITIES = tuple(name for name in dir(StepWork) if not name.startswith("_"))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TermEntry(_Part):
    """See CostTerm."""

    quantity: str
    seconds_each: float = Field(ge=0, le=1e6)
    above: float = Field(default=0.0, ge=0)
    up_to: float | None = Field(default=None, gt=0)
    beside_rows: float | None = Field(default=None, gt=0)

    @field_validator("quantity")
    @classmethod
    def _is_known(cls, quantity: str) -> str:
        if quantity not in _QUANTITIES:
            raise ValueError(f"{quantity!r} is no quantity of a step: must be one of {', '.join(_QUANTITIES)}")
        return quantity

    @model_validator(mode="after")
    def _is_never_negative(self) -> Self:
        if self.up_to is not None and self.up_to <= self.above:
            raise ValueError(f"up_to is {self.up_to:g}: must be greater than above, which is {self.above:g}")
        return self


class ErrorEntry(_Part):
    """How well a form predicted held-out points, relative."""

    dense: str
    adapters: str
    mean: float = Field(ge=0)
    p50: float = Field(ge=0)
    p90: float = Field(ge=0)
    max: float = Field(ge=0)


class AdapterSize(_Part):
    """What adapters of a rank occupy."""

    lora_rank: int = Field(ge=0)
    num_pages: int = Field(ge=0)
    num_host_bytes: int = Field(ge=0)


class ReplicaSize(_Part):
    """Limits of the replica that was measured; names as in SchedulerConfig."""

    num_kv_blocks: int = Field(ge=1)
    num_adapter_pages: int = Field(ge=0)
    blocks_per_page: int = Field(default=0, ge=0)
    max_model_len: int = Field(ge=2)
    block_size: int = Field(ge=1)
    max_num_batched_tokens: int = Field(ge=1)
    max_num_seqs: int = Field(ge=1)


class CostProfile(_Part):
    """One profile."""

    format: Literal[1] = 1
    model: str
    dtype: str
    device: str
    hardware: str
    commit: str | None
    pomona_version: str
    created_at: str
    """UTC, ISO 8601."""
    replica: ReplicaSize
    adapters: tuple[AdapterSize, ...]
    step_s: float = Field(ge=0, le=1e6)
    terms: tuple[TermEntry, ...]
    error: ErrorEntry
    tried: tuple[ErrorEntry, ...]
    num_points: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    measuring_s: float = Field(ge=0)

    @property
    def cost_model(self) -> LinearCost:
        """The fitted model."""
        terms = (
            CostTerm(
                term.quantity,
                term.seconds_each,
                term.above,
                math.inf if term.up_to is None else term.up_to,
                math.inf if term.beside_rows is None else term.beside_rows,
            )
            for term in self.terms
        )
        return LinearCost(self.step_s, tuple(terms))

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str) -> Self:
        """Read a file's content.

        Args:
            text: the content.
            name: of the file, for messages.

        Raises:
            ConfigError: it is no profile; names the field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(str(part) for part in first["loc"]) or "(file)"
            raise ConfigError(f"{name}: {path}: {first['msg']}") from error
