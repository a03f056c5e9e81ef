"""Line charts as SVG text: several panels above each other, each with its lines over a common horizontal axis. Equal
data give equal files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.chart import nice_step

COLORS = ("#2563eb", "#c2410c", "#15803d", "#7c3aed", "#64748b", "#b45309", "#0891b2", "#be123c")
_WIDTH, _PANEL, _LEFT, _RIGHT, _TOP, _GAP, _BOTTOM = 860, 230, 74, 24, 40, 52, 44


@dataclass(frozen=True, slots=True)
class Line:
    """Points joined in order; dots alone if ``is_dots``. Without a label it takes the color of the first line that has
    none, and no place in the legend."""

    label: str
    points: tuple[tuple[float, float], ...]
    is_dots: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One vertical axis."""

    unit: str
    lines: tuple[Line, ...]


def line_chart(title: str, x_unit: str, panels: Sequence[Panel], *, is_log_x: bool = False) -> str:
    """An SVG document; all panels share the horizontal axis."""
    xs = [x for panel in panels for line in panel.lines for x, _ in line.points]
    low, high = min(xs), max(xs)
    height = _TOP + len(panels) * (_PANEL + _GAP) + _BOTTOM

    def place(x: float) -> float:
        if is_log_x:
            share = math.log(x / low) / math.log(high / low) if high > low else 0.5
        else:
            share = (x - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="24" font-size="16" fill="#111827">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, _TOP + index * (_PANEL + _GAP) + 28, place)
    bottom = _TOP + len(panels) * (_PANEL + _GAP)
    ticks = sorted(set(xs)) if is_log_x else _ticks(low, high)
    for x in ticks:
        parts.append(_text(place(x), bottom, f"{x:g}", "middle"))
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, bottom + 20, x_unit, "middle"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(low: float, high: float) -> list[float]:
    step = nice_step(high - low) if high > low else 1.0
    first = math.ceil(low / step)
    return [k * step for k in range(first, math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="#374151">{escape(text)}</text>'


def _panel(panel: Panel, top: float, place) -> list[str]:  # noqa: ANN001
    largest = max((y for line in panel.lines for _, y in line.points), default=1.0)
    step = nice_step(largest) if largest > 0 else 1.0
    limit = step * max(1, math.ceil(largest / step - 1e-9))
    height = _PANEL - 28

    def level(y: float) -> float:
        return top + height * (1 - y / limit)

    parts = [_text(_LEFT - 66, top - 12, panel.unit, "start")]
    for tick in range(round(limit / step) + 1):
        y = level(tick * step)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick * step:g}", "end"))
    x = float(_WIDTH - _RIGHT)
    for index, line in reversed(list(enumerate(panel.lines))):
        color = COLORS[index % len(COLORS)] if line.label else COLORS[0]
        if line.label:
            x -= 26 + 6.4 * len(line.label)
            parts.append(f'<rect x="{x:.0f}" y="{top - 21:.0f}" width="10" height="10" fill="{color}"/>')
            parts.append(_text(x + 14, top - 12, line.label, "start"))
        spots = [(place(a), level(b)) for a, b in line.points]
        if not line.is_dots:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in spots)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if line.is_dots or len(spots) <= 40:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{color}"/>' for a, b in spots]
    return parts
