"""Charts as SVG text: grouped bars with the range of repetitions, and rooflines.

Written by hand (docs/design/0007): equal rows give equal files, nothing has to be installed, and colors follow the
reader's light or dark scheme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 66, 58
_NUM_TICKS = 5
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8c8c8c", "#e69f00")
"""Okabe and Ito's: told apart by color-blind readers, and on light and dark ground."""
_STYLE = """<style>
text{fill:#111827}.soft{fill:#4b5563}.card{fill:#fff}.grid{stroke:#e5e7eb}.line{stroke:#374151;fill:none}
@media (prefers-color-scheme:dark){
text{fill:#f0f6fc}.soft{fill:#9da7b3}.card{fill:#0d1117}.grid{stroke:#30363d}.line{stroke:#c9d1d9}}
</style>"""


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


@dataclass(frozen=True, slots=True)
class Point:
    """A measured op under a roof."""

    label: str
    flops_per_byte: float
    flops_per_s: float


def nice_step(top: float) -> float:
    """A round distance between ticks so that about five reach ``top``."""
    magnitude = 1.0
    while magnitude * 10 <= top:
        magnitude *= 10
    while magnitude > top:
        magnitude /= 10
    return next(magnitude * factor for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if magnitude * factor * _NUM_TICKS >= top)


def grouped_bars(title: str, x_label: str, y_label: str, groups: Sequence[str], series: Sequence[Series]) -> str:
    """An SVG document.

    Args:
        title: above the chart.
        x_label: what the groups are.
        y_label: what the height is, with its unit.
        groups: labels below, left to right.
        series: all with as many bars as there are groups.
    """
    bars = [bar for one in series for bar in one.bars if bar is not None]
    top = max((bar.high for bar in bars), default=1.0)
    bottom = min((bar.low for bar in bars), default=0.0)
    step = nice_step(max(top, -bottom, 1e-9))
    first, last = min(0, math.floor(bottom / step)), max(1, math.ceil(top / step))
    height = _HEIGHT - _TOP - _BOTTOM

    def y(value: float) -> float:
        return _TOP + height * (1 - (value / step - first) / (last - first))

    parts = _frame(title, x_label, y_label, [one.label for one in series])
    for tick in range(first, last + 1):
        parts += _horizontal(y(tick * step), f"{tick * step:g}")
    group_width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(groups))
    bar_width = 0.8 * group_width / max(1, len(series))
    for position, group in enumerate(groups):
        left = _LEFT + position * group_width
        parts.append(_text(left + group_width / 2, _HEIGHT - _BOTTOM + 18, group, 12, "middle"))
        for index, one in enumerate(series):
            bar = one.bars[position]
            if bar is not None:
                x = left + 0.1 * group_width + index * bar_width
                place = y(bar.median), y(bar.low), y(bar.high), y(0.0)
                parts += _bar(bar, x, bar_width, _COLORS[index % len(_COLORS)], place)
    parts.append(f'<line class="line" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def roofline(title: str, peak_flops_per_s: float, bytes_per_s: float, points: dict[str, Sequence[Point]]) -> str:
    """An SVG document: what ops reach, under what the machine can do at most at their intensity, both logarithmic.

    Args:
        title: above the chart.
        peak_flops_per_s: the flat part of the roof.
        bytes_per_s: the slope of the other.
        points: by series; at least one.
    """
    shown = [point for of_series in points.values() for point in of_series]
    ridge = peak_flops_per_s / bytes_per_s
    x_powers = _powers([ridge, *(point.flops_per_byte for point in shown)])
    y_powers = _powers([peak_flops_per_s / 1e9, *(point.flops_per_s / 1e9 for point in shown)])

    def x(intensity: float) -> float:
        share = (math.log10(intensity) - x_powers[0]) / (x_powers[-1] - x_powers[0])
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share

    def y(gflop_per_s: float) -> float:
        share = (math.log10(gflop_per_s) - y_powers[0]) / (y_powers[-1] - y_powers[0])
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    parts = _frame(title, "FLOPs per byte moved", "GFLOP/s", list(points))
    for power in y_powers:
        parts += _horizontal(y(10.0**power), f"{10.0**power:g}")
    for power in x_powers:
        at = x(10.0**power)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(_text(at, _HEIGHT - _BOTTOM + 18, f"{10.0**power:g}", 11, "middle", css="soft"))
    first = max(10.0 ** x_powers[0], 1e9 * 10.0 ** y_powers[0] / bytes_per_s)
    corners = [(first, first * bytes_per_s), (ridge, peak_flops_per_s), (10.0 ** x_powers[-1], peak_flops_per_s)]
    path = " ".join(f"{x(intensity):.1f},{y(flops / 1e9):.1f}" for intensity, flops in corners)
    parts.append(f'<polyline class="line" stroke-width="2" points="{path}"/>')
    roof = f"{peak_flops_per_s / 1e9:.0f} GFLOP/s, {bytes_per_s / 1e9:.0f} GB/s"
    parts.append(_text(_WIDTH - _RIGHT - 4, y(peak_flops_per_s / 1e9) - 6, roof, 11, "end", css="soft"))
    for index, of_series in enumerate(points.values()):
        parts += [
            f'<circle cx="{x(one.flops_per_byte):.1f}" cy="{y(one.flops_per_s / 1e9):.1f}" r="4.5" '
            f'fill="{_COLORS[index % len(_COLORS)]}"><title>{escape(one.label)}: {one.flops_per_s / 1e9:.3g} GFLOP/s'
            f"</title></circle>"
            for one in of_series
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _powers(values: Sequence[float]) -> list[int]:
    """Powers of ten that enclose the values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    return list(range(low, max(high, low + 1) + 1))


def _frame(title: str, x_label: str, y_label: str, labels: Sequence[str]) -> list[str]:
    """Everything that every chart has."""
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        _STYLE,
        f'<rect class="card" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>',
        _text(_LEFT, 24, title, 16),
        _text(middle_x, _HEIGHT - 14, x_label, 12, "middle", css="soft"),
        f'<g transform="rotate(-90 20 {middle_y:.1f})">{_text(20, middle_y, y_label, 12, "middle", css="soft")}</g>',
    ]
    x = float(_LEFT)
    for index, label in enumerate(labels):
        parts.append(f'<rect x="{x:.0f}" y="36" width="11" height="11" fill="{_COLORS[index % len(_COLORS)]}"/>')
        parts.append(_text(x + 16, 46, label, 12))
        x += 34 + 6.8 * len(label)
    return parts


def _text(x: float, y: float, text: str, size: int, anchor: str = "start", css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _horizontal(at: float, label: str) -> list[str]:
    """A line across, with its label on the left."""
    return [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>',
        _text(_LEFT - 8, at + 4, label, 11, "end", css="soft"),
    ]


def _bar(bar: Bar, x: float, width: float, color: str, place: tuple[float, float, float, float]) -> list[str]:
    """A bar from zero to its median, with a whisker; ``place`` has the heights of median, low, high and zero."""
    median, low, high, zero = place
    middle = x + width / 2
    text = f"{bar.median:.0f}" if abs(bar.median) >= 100 else f"{bar.median:.3g}"
    return [
        f'<rect x="{x:.1f}" y="{min(median, zero):.1f}" width="{0.92 * width:.1f}" height="{abs(zero - median):.1f}" '
        f'fill="{color}"><title>{bar.median:.4g} ({bar.low:.4g} to {bar.high:.4g})</title></rect>',
        f'<line class="line" x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>',
        _text(middle, min(high, zero) - 4, text, 9, "middle"),
    ]
