"""When a dead engine is started again: a pure rule over the times of its deaths."""

from collections import deque

from pomona.driver.config import DriverConfig


class RestartRule:
    """Doubling pauses between starts; no more starts after too many deaths in a window."""

    def __init__(self, config: DriverConfig) -> None:
        """No death so far."""
        self._config = config
        self._deaths_s: deque[float] = deque()

    def delay_after_death_s(self, now_s: float) -> float | None:
        """Note a death at ``now_s``; seconds to wait before the next start, or None to give up."""
        self._deaths_s.append(now_s)
        while now_s - self._deaths_s[0] > self._config.death_window_s:
            self._deaths_s.popleft()
        num_deaths = len(self._deaths_s)
        if num_deaths >= self._config.max_deaths:
            return None
        delay_s: float = self._config.restart_delay_s * 2.0 ** (num_deaths - 1)
        return min(delay_s, self._config.max_restart_delay_s)
