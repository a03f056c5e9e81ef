"""Settings of the driver: how long things may take, how often an engine may die, how much may be under way."""

from dataclasses import dataclass, fields

from pomona.core.errors import ConfigError

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
"""Of logs that are not for a terminal; the engine's process has no other."""


@dataclass(frozen=True, slots=True)
class DriverConfig:
    """Settings of ProcessClient and LocalClient.

    Raises:
        ConfigError: a value is zero or negative.
    """

    max_unanswered_commands: int = 4096
    """Requests are refused (QueueFullError) while this many commands wait for an engine that is busy with one step."""
    num_staging_threads: int = 2
    """Adapters read and verified at the same time, beside the step."""
    ping_interval_s: float = 2.0
    """An idle engine is asked this often whether it lives."""
    hang_limit_s: float = 300.0
    """An engine that has answered nothing for this long is killed; must exceed the longest legitimate step."""
    start_silence_limit_s: float = 900.0
    """An engine that starts and has reported no progress for this long is killed."""
    stop_limit_s: float = 10.0
    """An engine told to shut down is killed after this long."""
    max_deaths: int = 5
    """With this many deaths within ``death_window_s`` the engine is not started again."""
    death_window_s: float = 600.0
    restart_delay_s: float = 0.25
    """Pause after the first death; it doubles with every further death in the window."""
    max_restart_delay_s: float = 30.0

    def __post_init__(self) -> None:
        """Every setting is a limit, a count or a duration: all must be positive."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not value > 0:
                raise ConfigError(f"{setting.name} is {value}: must be greater than 0")
