"""Settings of the HTTP server, and the facts of the base model that it checks requests against."""

from dataclasses import dataclass, field
from typing import Final

from pomona.core.errors import ConfigError
from pomona.server.service_level import ServiceLevels

MAX_CHOICES: Final = 256


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the HTTP server.

    Raises:
        ConfigError: a value is out of range.
    """

    api_key: str | None = None
    """Bearer token that every route but /health and /ready asks for; None asks for none."""
    max_body_bytes: int = 4 * 2**20
    """Largest request body; larger ones are answered with 413."""
    max_choices: int = MAX_CHOICES
    """Most engine requests that one API request may start: prompts times ``n``."""
    max_adapter_labels: int = 64
    """Adapters with their own label in metrics; those seen later are counted together as "(other)"."""
    cache_secret: bytes | None = None
    """Secret from which tenants' prefix-cache salts are derived; None draws a new one per start."""

    service_levels: ServiceLevels = field(default=ServiceLevels())
    """Which tenants may go before others, and what targets they have."""

    def __post_init__(self) -> None:
        """Limits must allow at least one of what they limit."""
        for name in ("max_body_bytes", "max_choices", "max_adapter_labels"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}: must be at least 1")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ConfigError("api_key: must be ASCII text and not empty")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model as clients see it.

    Raises:
        ConfigError: the name is empty.
    """

    name: str
    """Name under which the base is served."""
    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    vocab_size: int
    """Rows of the embedding: token ids must be smaller."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer unless the request says ``ignore_eos``."""

    def __post_init__(self) -> None:
        """A model without a name could not be asked for."""
        if not self.name:
            raise ConfigError("served_model_name is empty: a name is needed")
