"""Plots as SVG text: no library, no network, readable on a slide, light and dark by the reader's own setting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 860, 500
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 60, 62  # margins, pixels
ROW = 46  # height of a method in a plot of distributions, pixels
FAMILIES = ("base", "args", "re-control", "best-of-n", "beam", "inferenceguard")  # of one colour each, in CSS

STYLE = """
.ig{--bg:#ffffff;--ink:#1d2129;--soft:#5d6675;--line:#d6dae1;--grid:#eceef2;--bad:#c8352b;
--base:#6b7280;--args:#b45309;--re-control:#a21caf;--best-of-n:#0369a1;--beam:#0f766e;--inferenceguard:#4338ca;--other:#4d7c0f;
background:var(--bg);font-family:system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif}
@media(prefers-color-scheme:dark){.ig{--bg:#15181e;--ink:#e8eaee;--soft:#a3abb8;--line:#3a404b;--grid:#262b34;--bad:#ff7b6e;
--base:#a8afba;--args:#f0a35e;--re-control:#e48df0;--best-of-n:#62b6ea;--beam:#4fd1c1;--inferenceguard:#a5a0ff;--other:#a3d65c}}
.ig text{fill:var(--ink);font-size:13px}
.ig .title{font-size:18px;font-weight:650}
.ig .note,.ig .tick{fill:var(--soft);font-size:12px}
.ig .axis{fill:var(--soft);font-size:13px}
.ig .grid{stroke:var(--grid);stroke-width:1}
.ig .frame{stroke:var(--line);stroke-width:1;fill:none}
.ig .limit{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:5 4}
.ig .bad{fill:var(--bad)}
.ig .halo{paint-order:stroke;stroke:var(--bg);stroke-width:3.5px;stroke-linejoin:round}
"""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Range:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """One method in a scatter plot."""

    name: str
    x: Range
    y: Range


@dataclass(frozen=True)
class Axis:
    """From values to pixels."""

    label: str
    low: float
    high: float
    first: float  # pixel of `low`
    last: float  # pixel of `high`
    ticks: tuple[float, ...]
    show: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value, inside the axis."""
        low, high, here = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = (here - low) / (high - low) if high > low else 0.5
        return self.first + min(max(share, 0.0), 1.0) * (self.last - self.first)


def scatter(
    title: str, note: str, points: Sequence[Point], x_label: str, y_label: str, *, x_kind: str, y_kind: str
) -> str:
    """Methods as points with their intervals and their names. Kinds of axis: number, share, log."""
    x = _axis(x_label, x_kind, [p.x for p in points], LEFT, WIDTH - RIGHT)
    y = _axis(y_label, y_kind, [p.y for p in points], HEIGHT - BOTTOM, TOP)
    marks = [_mark(point, x, y) for point in points]
    return _svg(title, note, HEIGHT, [*_grid(x, y, HEIGHT), *marks, *_labels(points, x, y)])


def distributions(
    title: str, note: str, values: Sequence[tuple[str, Sequence[float]]], x_label: str, limit: float | None = None
) -> str:
    """A density per method with its quartiles and median; what lies beyond `limit` is red."""
    shown = [(name, np.array(sorted(own), dtype=np.float64)) for name, own in values if len(own)]
    height = TOP + 12 + ROW * len(shown) + BOTTOM
    left = min(320, 40 + 7 * max((len(name) for name, _ in shown), default=0))
    everything = np.concatenate([own for _, own in shown]) if shown else np.zeros(1)
    low, high = (float(q) for q in np.quantile(everything, [0.002, 0.998]))
    if limit is not None:
        low, high = min(low, limit), max(high, limit)
    room = 0.06 * (high - low or 1.0)
    x = _axis(x_label, "number", [Range(low, low - room, high + room)], left, WIDTH - RIGHT - 40)
    parts = _grid(x, None, height, top=TOP + 12)
    for row, (name, own) in enumerate(shown):
        parts += _density(name, own, x, TOP + 12 + ROW * (row + 1) - 6, limit)
    if limit is not None:
        parts.append(_line(x.at(limit), TOP + 12, x.at(limit), height - BOTTOM, 'class="limit"'))
        parts.append(_write(x.at(limit), TOP + 7, f"budget {limit:g}", 'class="bad" text-anchor="middle"'))
    return _svg(title, note, height, parts)


def shares(title: str, note: str, groups: Sequence[str], rows: Sequence[tuple[str, Sequence[Range | None]]]) -> str:
    """A panel per group, a line per method: a rate with its interval."""
    left = min(320, 40 + 7 * max((len(name) for name, _ in rows), default=0))
    step = 26
    height = TOP + 26 + step * len(rows) + BOTTOM
    wide = (WIDTH - RIGHT - left) / max(1, len(groups))
    parts: list[str] = []
    for column, group in enumerate(groups):
        first, last = left + column * wide + 10, left + (column + 1) * wide - 22
        x = Axis("", 0.0, 1.0, first, last, (0.0, 0.5, 1.0), lambda share: f"{100 * share:.0f}" + "%" * (share == 1))
        parts += _grid(x, None, height, top=TOP + 26)
        parts.append(_write(first, TOP + 14, group, 'font-weight="600"'))
        for row, (name, own) in enumerate(rows):
            found, y = own[column], TOP + 26 + step * (row + 0.5)
            if found is not None:
                parts.append(_whisker(name, found, x, y, f"{group}: {name} {_interval_text(found)}"))
    for row, (name, _) in enumerate(rows):
        y = TOP + 26 + step * (row + 0.5) + 4
        parts.append(_write(left - 6, y, name, 'text-anchor="end" ' + _colour(name, "fill")))
    return _svg(title, note, height, parts)


# --- parts -----------------------------------------------------------------------------------------------------------


def _svg(title: str, note: str, height: float, parts: Sequence[str]) -> str:
    frame = f'class="ig" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(height)}"'
    head = [
        f'<svg {frame} role="img" aria-label="{escape(title)}"><style>{STYLE}</style>',
        '<rect width="100%" height="100%" fill="var(--bg)"/>',
        _write(20, 26, title, 'class="title"'),
        _write(20, 44, note, 'class="note"'),
    ]
    return "".join([*head, *parts, "</svg>"])


def _grid(x: Axis, y: Axis | None, height: float, top: float = TOP) -> list[str]:
    bottom = height - BOTTOM
    parts = []
    for tick in x.ticks:
        parts.append(_line(x.at(tick), top, x.at(tick), bottom, 'class="grid"'))
        parts.append(_write(x.at(tick), bottom + 18, x.show(tick), 'class="tick" text-anchor="middle"'))
    if x.label:
        middle = (x.first + x.last) / 2
        parts.append(_write(middle, bottom + 44, x.label, 'class="axis" text-anchor="middle"'))
    if y is None:
        return parts
    for tick in y.ticks:
        parts.append(_line(x.first, y.at(tick), x.last, y.at(tick), 'class="grid"'))
        parts.append(_write(x.first - 8, y.at(tick) + 4, y.show(tick), 'class="tick" text-anchor="end"'))
    middle = (y.first + y.last) / 2
    turned = f'class="axis" text-anchor="middle" transform="rotate(-90 20 {_n(middle)})"'
    parts.append(_write(20, middle, y.label, turned))
    size = f'width="{_n(x.last - x.first)}" height="{_n(y.first - y.last)}"'
    parts.append(f'<rect class="frame" x="{_n(x.first)}" y="{_n(y.last)}" {size}/>')
    return parts


def _mark(point: Point, x: Axis, y: Axis) -> str:
    here, there = x.at(point.x.value), y.at(point.y.value)
    bar = _colour(point.name, "stroke") + ' stroke-width="1.6" opacity=".55"'
    told = f"{point.name}: {x.label} {x.show(point.x.value)}, {y.label} {y.show(point.y.value)}"
    across = _line(x.at(point.x.low), there, x.at(point.x.high), there, bar)
    along = _line(here, y.at(point.y.low), here, y.at(point.y.high), bar)
    size = 7 if _family(point.name) == "inferenceguard" else 5.5
    return _group(told, across, along, _dot(here, there, size, point.name))


def _whisker(name: str, found: Range, x: Axis, y: float, told: str) -> str:
    bar = _colour(name, "stroke") + ' stroke-width="2" opacity=".6"'
    return _group(told, _line(x.at(found.low), y, x.at(found.high), y, bar), _dot(x.at(found.value), y, 5, name))


_BEYOND = 'style="fill:var(--bad)" opacity=".7"'


def _density(name: str, values: Floats, x: Axis, base: float, limit: float | None) -> list[str]:
    grid = np.linspace(x.low, x.high, 240)
    if limit is not None:
        grid = np.sort(np.append(grid, [limit, np.nextafter(limit, np.inf)]))  # the curve breaks at the limit
    heights = density(values, grid, limit)
    heights = heights / (heights.max() or 1.0) * (ROW - 12)
    within = grid <= (math.inf if limit is None else limit)
    parts = [
        _area(grid[which], heights[which], x, base, look)
        for which, look in ((within, _colour(name, "fill") + ' opacity=".45"'), (~within, _BEYOND))
        if which.any()
    ]
    low, middle, high = (float(q) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    told = (
        f"{name}: median {middle:.3g}, quartiles {low:.3g} and {high:.3g}, largest {values.max():.3g}, n {len(values)}"
    )
    bar = _colour(name, "stroke") + ' stroke-width="4" stroke-linecap="round"'
    parts.append(_group(told, _line(x.at(low), base, x.at(high), base, bar), _dot(x.at(middle), base, 4.5, name)))
    parts.append(_write(x.first - 12, base, name, 'text-anchor="end" ' + _colour(name, "fill")))
    parts.append(_write(x.last + 8, base, f"{middle:.2f}", 'class="note"'))
    return parts


def _area(grid: Floats, heights: Floats, x: Axis, base: float, look: str) -> str:
    """The area between a curve and its base line."""
    corners = [(x.at(float(v)), base - float(h)) for v, h in zip(grid, heights, strict=True)]
    corners = [(corners[0][0], base), *corners, (corners[-1][0], base)]
    return f'<path d="M{" L".join(f"{_n(across)} {_n(down)}" for across, down in corners)}Z" {look}/>'


def density(values: Floats, grid: Floats, limit: float | None = None) -> Floats:
    """A Gaussian kernel estimate on the grid; the bandwidth is Silverman's, at least a hundredth of the grid.

    With a limit each side of it is estimated by itself, mirrored at the limit: smoothing carries nothing across, so the
    area beyond the limit is the share of values beyond it.
    """
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = min(float(np.std(values)), float(quartiles[1] - quartiles[0]) / 1.34 or math.inf)
    bandwidth = max(0.9 * spread * len(values) ** -0.2, float(grid[-1] - grid[0]) / 100)

    def kernels(centres: Floats) -> Floats:
        heights: Floats = np.exp(-0.5 * ((grid[:, None] - centres[None]) / bandwidth) ** 2).sum(1)
        return heights

    if limit is None:
        total = kernels(values)
    else:
        within, beyond = values[values <= limit], values[values > limit]
        left, right = kernels(within) + kernels(2 * limit - within), kernels(beyond) + kernels(2 * limit - beyond)
        total = np.where(grid <= limit, left, right)
    heights: Floats = total / (len(values) * bandwidth * math.sqrt(2 * math.pi))
    return heights


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> str:
    return f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" {look}/>'


def _dot(x: float, y: float, size: float, name: str) -> str:
    look = f'{_colour(name, "fill")} stroke="var(--bg)" stroke-width="1.5"'
    return f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{size}" {look}/>'


def _write(x: float, y: float, text: str, look: str) -> str:
    return f'<text x="{_n(x)}" y="{_n(y)}" {look}>{escape(text)}</text>'


def _group(told: str, *parts: str) -> str:
    """Marks with what a reader is told who points at them."""
    return f"<g><title>{escape(told)}</title>{''.join(parts)}</g>"


# --- names beside points ---------------------------------------------------------------------------------------------

_Box = tuple[float, float, float, float]  # left, top, right, bottom
_Spot = tuple[float, float]
_ANGLES = tuple(math.radians(15 * step) for step in range(24))
_DISTANCES = (0.0, 14.0, 28.0, 44.0, 62.0, 84.0, 110.0, 140.0)


def _labels(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    """Each name where it overlaps least, with a line to its point where it stands apart; crowded points choose last."""
    spots = {point.name: (x.at(point.x.value), y.at(point.y.value)) for point in points}
    taken: list[tuple[_Box, float]] = []  # what a name should not cover, and how much that matters
    for point in points:
        here, there = spots[point.name]
        taken.append(((here - 7, there - 7, here + 7, there + 7), 4.0))
        taken.append(((x.at(point.x.low), there - 2, x.at(point.x.high), there + 2), 0.5))
        taken.append(((here - 2, y.at(point.y.high), here + 2, y.at(point.y.low)), 0.5))
    parts = []
    for name in sorted(spots, key=lambda name: _crowd(spots[name], list(spots.values()))):
        box, place = _best_box(name, spots[name], taken, [spot for spot in spots.values() if spot != spots[name]])
        taken.append((box, 8.0))
        here, there = spots[name]
        middle = (box[1] + box[3]) / 2
        if place > 1:
            end = min(max(here, box[0]), box[2])
            edge = box[3] if middle < there - 8 else box[1] if middle > there + 8 else middle
            parts.append(_line(here, there, end, edge, _colour(name, "stroke") + ' stroke-width="1" opacity=".45"'))
        weight = 'font-weight="650" ' if _family(name) == "inferenceguard" else ""
        parts.append(_write(box[0], middle + 4.5, name, f'class="halo" {weight}{_colour(name, "fill")}'))
    return parts


def _best_box(name: str, spot: _Spot, taken: Sequence[tuple[_Box, float]], others: Sequence[_Spot]) -> tuple[_Box, int]:
    """(where the name goes, how far away it is: 0 beside its point). Nearer to no other point than to its own."""
    wide, high = (7.7 if _family(name) == "inferenceguard" else 7.0) * len(name), 15.0
    best: tuple[float, _Box, int] | None = None
    for place, away in enumerate(_DISTANCES):
        for angle in _ANGLES:
            across, down = math.cos(angle), math.sin(angle)
            middle_x = spot[0] + across * (wide / 2 + 11 + away) if abs(across) > 0.3 else spot[0] + across * wide / 2
            middle_y = spot[1] + down * (17 + away)
            box = (middle_x - wide / 2, middle_y - high / 2, middle_x + wide / 2, middle_y + high / 2)
            cost = sum(weight * _overlap(box, other) for other, weight in taken) + _outside(box)
            cost += 1.2 * away + 6 * abs(down) + (3 if across < 0 else 0)
            cost += sum(40 + 4 * (gap - _gap(box, other)) for gap in [_gap(box, spot)] for other in others
                        if _gap(box, other) < gap + 4)  # fmt: skip
            if best is None or cost < best[0]:
                best = (cost, box, place)
    assert best is not None
    return best[1], best[2]


def _gap(box: _Box, spot: _Spot) -> float:
    """From a box to a point."""
    across = max(box[0] - spot[0], spot[0] - box[2], 0.0)
    return math.hypot(across, max(box[1] - spot[1], spot[1] - box[3], 0.0))


def _crowd(spot: _Spot, others: Sequence[_Spot]) -> float:
    return sum(math.exp(-math.dist(spot, other) / 60) for other in others)


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: _Box) -> float:
    beyond = max(0.0, LEFT + 4 - box[0]) + max(0.0, box[2] - WIDTH + RIGHT) + max(0.0, TOP - 4 - box[1])
    return 200 * (beyond + max(0.0, box[3] - HEIGHT + BOTTOM))


# --- axes and numbers ------------------------------------------------------------------------------------------------


def _axis(label: str, kind: str, ranges: Sequence[Range], first: float, last: float) -> Axis:
    low, high = min(r.low for r in ranges), max(r.high for r in ranges)
    if kind == "log":
        low, high = low / 1.5, high * 1.5
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if len(decades) < 5 else (1,))]
        shown = tuple(tick for tick in ticks if low <= tick <= high)
        return Axis(label, low, high, first, last, shown, _scientific, log=True)
    if kind == "share":
        low = max(0.0, math.floor((low - 0.02) * 10) / 10)
        high = min(1.0, math.ceil((high + 0.005) * 10) / 10)
        pad = 0.02 * (high - low)
        return Axis(label, low - pad, high + pad, first, last, _ticks(low, high), _percent)
    room = 0.07 * (high - low or 1.0)
    return Axis(label, low - room, high + room, first, last, _ticks(low - room, high + room), lambda v: f"{v:.6g}")


def _ticks(low: float, high: float, count: int = 6) -> tuple[float, ...]:
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return tuple(itertools.takewhile(lambda v: v <= high + 1e-9, (round(k * step, 12) for k in itertools.count(first))))


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _scientific(value: float) -> str:
    """A power of ten with its factor; plainly where that is short."""
    if 0.01 <= value < 10_000:
        return f"{value:.3g}"
    power = math.floor(math.log10(value) + 1e-9)
    front = value / 10**power
    raised = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
    digits = "".join("\u207b" if digit == "-" else raised[int(digit)] for digit in str(power))
    return f"10{digits}" if abs(front - 1) < 1e-9 else f"{front:.2g}\u00b710{digits}"


def _interval_text(found: Range) -> str:
    return f"{_percent(found.value)} ({_percent(found.low)} to {_percent(found.high)})"


def _family(name: str) -> str:
    return next((family for family in FAMILIES if name.startswith(family)), "other")


def _colour(name: str, attribute: str) -> str:
    return f'style="{attribute}:var(--{_family(name)})"'


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
