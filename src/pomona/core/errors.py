"""Every error that a client or an operator can cause.

    PomonaError
    ├── InvalidRequestError      a parameter of a request is wrong; names the field        (400)
    │   └── PromptTooLongError   prompt, or prompt and max_tokens, exceed the context       (400)
    ├── ModelNotFoundError       no such base or adapter name, for this tenant             (404)
    ├── QueueFullError           the bounded queue is full; try again later                (429)
    ├── RateLimitError           a limit on requests, tokens or concurrency is reached     (429)
    │   ├── QuotaExceededError       the month's budget is spent                           (429)
    │   └── DeadlineError            the first token would come later than the target      (429)
    ├── EngineUnavailableError   the model process is restarting or shutting down          (503)
    │   └── EngineDiedError          it died with the request in it                        (503)
    ├── DatabaseUnavailableError the accounts database or its journal cannot be written    (503)
    ├── AccountNotFoundError     no such tenant, key or adapter                            (404)
    ├── AccountConflictError     it exists already, or is in use                           (409)
    ├── AdapterError             an adapter could not be read, or does not fit             (422)
    │   ├── AdapterNotFoundError     nothing at that source                                (404)
    │   ├── AdapterForbiddenError    the source lies outside what the operator allowed     (403)
    │   ├── AdapterConfigError       a field of adapter_config.json is wrong or unsupported (422)
    │   └── AdapterUnavailableError  its source, or the disk, fails for a while; try again  (503)
    ├── AdapterFailedError       a request names an adapter that cannot be brought in      (409)
    ├── CheckpointError          the base checkpoint could not be read or is unsupported   (start-up)
    └── ConfigError              a setting is wrong; names the setting                     (start-up)

Status codes are assigned in server/errors.py only. What only a bug of ours can cause is an ``assert``.
"""

from typing import Any


class PomonaError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is fit to show to the person who caused it."""


class InvalidRequestError(PomonaError):
    """A request parameter is wrong.

    Args:
        field: the parameter's name as the client wrote it, for example ``temperature``.
        message: what is wrong, with the value and the limit.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    @classmethod
    def out_of_range(cls, field: str, value: Any, allowed: str) -> "InvalidRequestError":
        """Build the common message: ``temperature is -1: must be between 0 and 2``."""
        return cls(field, f"{field} is {value!r}: must be {allowed}")


class PromptTooLongError(InvalidRequestError):
    """The prompt, or the prompt with the tokens asked for, does not fit the context."""


class ModelNotFoundError(PomonaError):
    """No base model or adapter of that name exists for this tenant."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model {model!r} does not exist.")
        self.model = model


class QueueFullError(PomonaError):
    """The waiting queue is at its limit; the request was never admitted."""


class RateLimitError(PomonaError):
    """A limit of the tenant, its key or the adapter is reached; nothing was admitted.

    Args:
        message: names the limit and its value.
        retry_after_s: seconds until the same request can succeed; None if it never can.
    """

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceededError(RateLimitError):
    """The month's budget is spent."""


class DeadlineError(RateLimitError):
    """The tenant's target for the time to first token cannot be met: too much waits already."""


class EngineUnavailableError(PomonaError):
    """The model process is not answering: it died, is restarting, or is shutting down."""


class EngineDiedError(EngineUnavailableError):
    """The model process died with the request, or the load of its adapter, in it, which may be why: clients should not
    send it again by themselves."""


class DatabaseUnavailableError(PomonaError):
    """The database of accounts does not answer, or usage can no longer be written down."""


class AccountNotFoundError(PomonaError):
    """No tenant, key or other account record of that name."""


class AccountConflictError(PomonaError):
    """It exists already, or something else depends on it."""


class AdapterError(PomonaError):
    """An adapter cannot be used: unreadable, corrupt, or made for another base model."""


class AdapterNotFoundError(AdapterError):
    """Nothing was found at the adapter's source."""


class AdapterForbiddenError(AdapterError):
    """The adapter's source lies outside the allowed folders or hubs."""


class AdapterConfigError(AdapterError):
    """A field of adapter_config.json is invalid or not supported.

    Args:
        field: the key in adapter_config.json.
        message: what is wrong, with the value.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"adapter_config.json: {field}: {message}")
        self.field = field


class AdapterUnavailableError(AdapterError):
    """An adapter cannot be brought in now, but may be later: its source, the disk or memory does not allow it.

    Args:
        message: what failed.
        retry_after_s: seconds until it is tried again.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AdapterFailedError(PomonaError):
    """A request names an adapter that was found but cannot be used, until it is replaced."""


class CheckpointError(PomonaError):
    """The base model's checkpoint is missing, broken, or of an unsupported kind."""


class ConfigError(PomonaError):
    """A setting of the server is wrong; the message names the setting."""
