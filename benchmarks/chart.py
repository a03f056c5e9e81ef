"""Charts as SVG text: grouped bars with the range of repetitions. Written by hand so that equal rows give equal files,
and nothing has to be installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_COLORS = ("#c2410c", "#2563eb", "#15803d", "#7c3aed", "#64748b", "#b45309")
_WIDTH, _HEIGHT = 860, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 62, 46
_NUM_TICKS = 5


@dataclass(frozen=True, slots=True)
class Bar:
    """A median with the smallest and largest repetition."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """One color: a bar per group, None where there is no measurement."""

    label: str
    bars: tuple[Bar | None, ...]


def nice_step(top: float) -> float:
    """A round distance between ticks so that about five reach ``top``."""
    magnitude = 1.0
    while magnitude * 10 <= top:
        magnitude *= 10
    while magnitude > top:
        magnitude /= 10
    return next(magnitude * factor for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if magnitude * factor * _NUM_TICKS >= top)


def grouped_bars(title: str, unit: str, groups: Sequence[str], series: Sequence[Series]) -> str:
    """An SVG document.

    Args:
        title: above the chart.
        unit: of the vertical axis.
        groups: labels below, left to right.
        series: all with as many bars as there are groups.
    """
    top = max((bar.high for one in series for bar in one.bars if bar is not None), default=1.0)
    step = nice_step(top)
    limit = step * max(1, -(-top // step))
    plot_height, plot_width = _HEIGHT - _TOP - _BOTTOM, _WIDTH - _LEFT - _RIGHT

    def y(value: float) -> float:
        return _TOP + plot_height * (1 - value / limit)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="22" font-size="16" fill="#111827">{escape(title)}</text>',
        f'<text x="{_LEFT - 8}" y="{_TOP - 8}" font-size="11" text-anchor="end" fill="#6b7280">{escape(unit)}</text>',
    ]
    for tick in range(round(limit / step) + 1):
        at = y(tick * step)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e5e7eb"/>')
        label = f"{tick * step:g}"
        parts.append(
            f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" font-size="11" text-anchor="end" fill="#6b7280">{label}</text>'
        )
    parts += _legend([one.label for one in series])
    group_width = plot_width / max(1, len(groups))
    bar_width = 0.8 * group_width / max(1, len(series))
    for position, group in enumerate(groups):
        left = _LEFT + position * group_width
        parts.append(
            f'<text x="{left + group_width / 2:.1f}" y="{_HEIGHT - _BOTTOM + 20}" font-size="13" text-anchor="middle" '
            f'fill="#111827">{escape(group)}</text>'
        )
        for index, one in enumerate(series):
            bar = one.bars[position]
            if bar is not None:
                x = left + 0.1 * group_width + index * bar_width
                parts += _bar(
                    bar, x, bar_width, _COLORS[index % len(_COLORS)], y(bar.median), (y(bar.low), y(bar.high))
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(labels: Sequence[str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for index, label in enumerate(labels):
        color = _COLORS[index % len(_COLORS)]
        parts.append(f'<rect x="{x:.0f}" y="32" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="42" font-size="12" fill="#374151">{escape(label)}</text>')
        x += 30 + 6.6 * len(label)
    return parts


def _bar(bar: Bar, x: float, width: float, color: str, top: float, whisker: tuple[float, float]) -> list[str]:
    low, high = whisker
    base = _HEIGHT - _BOTTOM
    middle = x + width / 2
    return [
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{0.92 * width:.1f}" height="{base - top:.1f}" fill="{color}">'
        f"<title>{bar.median:.4g} ({bar.low:.4g} to {bar.high:.4g})</title></rect>",
        f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="#111827"/>',
        f'<text x="{middle:.1f}" y="{high - 4:.1f}" font-size="9" text-anchor="middle" fill="#374151">'
        f"{bar.median:.0f}</text>",
    ]
