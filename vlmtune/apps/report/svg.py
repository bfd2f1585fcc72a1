"""Plots as inline SVG: no script, no file, colours from the style sheet of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from vlmtune.apps.html.words import text

Point: TypeAlias = tuple[float, float]
Look: TypeAlias = Literal['line', 'faint', 'dots', 'scatter']

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 20, 8, 24  # pixels around the drawing
_COLUMNS = 150  # of a long line; of each, its lowest and its highest point are drawn
COLOURS = 8  # of the style sheet
FIRST_LAYER = 4  # runs have the colours before it


@dataclass(frozen=True)
class Line:
    """Points to draw.

    Attributes:
        points: (x, y), x rising.
        colour: a number; the style sheet has ``COLOURS`` of them.
        look: 'line'; 'faint', what a line was averaged from; 'dots', a line with a dot at each point; 'scatter', dots.
    """

    points: Sequence[Point]
    colour: int = 0
    look: Look = 'line'


def plot(lines: Sequence[Line], *, label: str, zero: bool = False, log: bool = False) -> str:
    """A plot of lines, axes with numbers; '' where there is not one point.

    Args:
        lines: drawn in this order.
        label: what it shows, for screen readers.
        zero: the axis begins at 0.
        log: a logarithmic axis; points that are not positive are left out.
    """
    lines = [Line([p for p in line.points if not log or p[1] > 0], line.colour, line.look) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    if not ys:
        return ''
    axes = _Axes(min(xs), max(xs), 0.0 if zero and min(ys) >= 0 else min(ys), max(ys), log=log)
    return _svg(label, axes.drawn() + ''.join(_draw(line, axes) for line in lines))


def areas(layers: Sequence[Sequence[Point]], *, label: str) -> str:
    """Layers on top of each other, all with the same x; layer i has colour ``FIRST_LAYER`` + i."""
    if not layers or not layers[0]:
        return ''
    tops = [[0.0] * len(layers[0])]
    for layer in layers:
        tops.append([below + y for below, (_, y) in zip(tops[-1], layer, strict=True)])
    xs = [x for x, _ in layers[0]]
    axes = _Axes(xs[0], xs[-1], 0.0, max(tops[-1]), log=False)
    drawn = []
    for i in range(len(layers)):
        above = [axes.place(p) for p in zip(xs, tops[i + 1], strict=True)]
        below = [axes.place(p) for p in zip(xs, tops[i], strict=True)]
        drawn.append(f'<path class="area c{(FIRST_LAYER + i) % COLOURS}" d="{_path(above + below[::-1])}Z"/>')
    return _svg(label, ''.join(drawn) + axes.drawn())


def averaged(points: Sequence[Point], *, window: int) -> list[Point]:
    """At each x the mean of the ``window`` values around it; of fewer, but as many on both sides, near the ends."""
    sums = [0.0, *accumulate(y for _, y in points)]
    out = []
    for i, (x, _) in enumerate(points):
        side = min(window // 2, i, len(points) - 1 - i)
        out.append((x, (sums[i + side + 1] - sums[i - side]) / (2 * side + 1)))
    return out


def in_columns(points: Sequence[Point]) -> list[Point]:
    """A point for each column of a plot, at most: each the mean of its neighbourhood."""
    size = -(-len(points) // _COLUMNS) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def compact(value: float) -> str:
    """A number in few characters: 0.0123, 1.5k, 2e-05."""
    for size, name in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= size:
            return f'{value / (1e3 if name == "k" else size):.4g}{name}'
    return f'{value:.4g}'


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round numbers between the two, at most ``most`` + 1."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for m in (1, 2, 5, 10) if (step := m * power) >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Where a point lies in the drawing, and the frame."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, *, log: bool) -> None:
        self.log = log
        if log:
            y_low, y_high = math.log10(y_low), math.log10(y_high)
        room = (y_high - y_low) * 0.04 or abs(y_high) * 0.1 or 1.0
        self.y_low = y_low if y_low == 0 and not log else y_low - room
        self.y_high = y_high + room
        self.x_low, self.x_high = x_low, x_high if x_high > x_low else x_low + 1

    def place(self, point: Point) -> Point:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (point[0] - self.x_low) / (self.x_high - self.x_low)
        y = math.log10(point[1]) if self.log else point[1]
        return x, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - self.y_low) / (self.y_high - self.y_low)

    def drawn(self) -> str:
        pieces = []
        for value, name in self._y_ticks():
            y = self.place((self.x_low, value))[1]
            pieces.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            pieces.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        along = ticks(self.x_low, self.x_high, most=6)
        if max(len(compact(value)) for value in along) > 5:
            along = ticks(self.x_low, self.x_high, most=3)
        for value in along:
            x = self.place((value, 1.0))[0]
            pieces.append(f'<text x="{x:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{compact(value)}</text>')
        return ''.join(pieces)

    def _y_ticks(self) -> list[tuple[float, str]]:
        if not self.log:
            return [(value, compact(value)) for value in ticks(self.y_low, self.y_high)]
        marks = (1, 2, 5) if self.y_high - self.y_low < 2 else (1,)
        powers = range(math.floor(self.y_low), math.ceil(self.y_high) + 1)
        values = [m * 10.0**power for power in powers for m in marks]
        return [(v, compact(v)) for v in values if self.y_low <= math.log10(v) <= self.y_high]


def _draw(line: Line, axes: _Axes) -> str:
    colour = f'c{line.colour % COLOURS}'
    points = line.points if line.look in ('dots', 'scatter') else _lowest_and_highest(line.points)
    places = [axes.place(point) for point in points]
    drawn = '' if line.look == 'scatter' or not places else f'<path class="{line.look} {colour}" d="{_path(places)}"/>'
    if line.look in ('dots', 'scatter') or len(places) == 1:
        for (x, y), (at, value) in zip(places, points, strict=True):
            told = f'<title>{compact(at)}: {value:.6g}</title>'
            drawn += f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">{told}</circle>'
    return drawn


def _lowest_and_highest(points: Sequence[Point]) -> list[Point]:
    """Of a long line, two points of each column: no spike is lost."""
    if len(points) <= 2 * _COLUMNS:
        return list(points)
    size = -(-len(points) // _COLUMNS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    kept = [sorted({min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])}) for g in groups]
    return [points[0], *(p for group in kept for p in group), points[-1]]


def _path(places: Sequence[Point]) -> str:
    return 'M' + 'L'.join(f'{x:.1f} {y:.1f}' for x, y in places)


def _svg(label: str, inside: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(label)}">'
    return f'{head}{inside}</svg>'
