"""The date, for what outlives a process: when a key expires, when a request was answered, how full a bucket is."""

import calendar
import time


def now_s() -> float:
    """Return Unix time in seconds. Several processes and restarts share it, which no monotonic clock can offer."""
    return time.time()  # noqa: TID251


def day_of(unix_s: float) -> str:
    """Return the calendar day (UTC) that a moment belongs to, such as "2026-11-21"."""
    return time.strftime("%Y-%m-%d", time.gmtime(unix_s))


def month_of(unix_s: float) -> str:
    """Return the calendar month (UTC) that a moment belongs to, such as "2026-11"."""
    return time.strftime("%Y-%m", time.gmtime(unix_s))


def month_end_s(unix_s: float) -> float:
    """Return the Unix time at which the moment's calendar month (UTC) ends."""
    moment = time.gmtime(unix_s)
    num_days = calendar.monthrange(moment.tm_year, moment.tm_mon)[1]
    return float(calendar.timegm((moment.tm_year, moment.tm_mon, num_days, 24, 0, 0)))
