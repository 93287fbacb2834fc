"""The quality-against-speed plot as SVG; colours come from the page's style, so it follows light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from elision.bench.stats import Estimate
from elision.bench.summary import Row

WIDTH, HEIGHT = 620, 400
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 18, 46
_LETTER = 6.2  # width of a letter of the labels


@dataclass(frozen=True)
class Point:
    """One arm in the plot."""

    x: float
    y: float
    low: float
    high: float
    label: str
    kind: str
    left: float | None = None
    right: float | None = None


@dataclass(frozen=True)
class Frame:
    """What the axes of a plot are about.

    Attributes:
        x_title, y_title: beside the axes.
        about: what the plot shows, for readers who do not see it.
        unit: behind the numbers of the horizontal axis.
        least: a number that the horizontal axis begins at or before.
        y_unit: behind a point's quality.
    """

    x_title: str
    y_title: str = "PSNR to the uncached run, dB"
    about: str = "Quality against speed"
    unit: str = "×"
    least: float = 1.0
    y_unit: str = " dB"


def points(rows: Sequence[Row], x_of: Callable[[Row], Estimate | float | None]) -> list[Point]:
    """The arms that have a finite quality and a speed; the uncached run has no error and is left out."""
    found: list[Point] = []
    for row in rows:
        x = x_of(row)
        if row.kind == "baseline" or x is None or row.psnr.mean > 99:
            continue
        x = x if isinstance(x, Estimate) else Estimate(x, None, None, row.psnr.n)
        y, low, high = row.psnr.mean, row.psnr.low, row.psnr.high
        ends = (y if low is None else low, y if high is None else high)
        found.append(Point(x.mean, y, *ends, row.label, row.kind, x.low, x.high))
    return found


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers that cover the range."""
    span = high - low or max(abs(high), 1.0) / 10
    step = 10 ** math.floor(math.log10(span / most))
    step *= next(f for f in (1, 2, 5, 10) if span / (step * f) <= most)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [round(i * step, 10) for i in range(first, last + 1)]


def scatter(found: Sequence[Point], frame: Frame, name: str) -> str:
    """An SVG of quality over cost: the line is plain sampling with fewer steps, the mark to beat where it is drawn."""
    if not found:
        return ""
    xs = ticks(min(frame.least, *(p.x for p in found)), max(p.x for p in found), 6)
    ys = ticks(min(p.y for p in found), max(p.y for p in found))

    def sx(x: float) -> float:
        x = min(max(x, xs[0]), xs[-1])  # an interval may reach beyond the axes
        return LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def sy(y: float) -> float:
        y = min(max(y, ys[0]), ys[-1])
        return HEIGHT - BOTTOM - (y - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    best = max(found, key=lambda p: p.y)
    summary = f"{frame.about}, {len(found)} points; the highest quality is {best.label} at {best.y:.1f}{frame.y_unit}"
    parts = [
        f'<svg class="plot" id="{name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}" '
        'xmlns="http://www.w3.org/2000/svg">',
        *_axes(xs, ys, sx, sy, frame),
        _line([p for p in found if p.kind == "fewer_steps"], sx, sy),
    ]
    order = {"control": 1, "method": 2}
    ordered = sorted(found, key=lambda p: order.get(p.kind, 0))
    parts += [_marker(p, sx, sy, frame) for p in ordered]
    parts += _labels([p for p in reversed(ordered) if p.kind != "fewer_steps"], ordered, sx, sy)
    return "\n".join([*parts, "</svg>"])


Scale = Callable[[float], float]


def _axes(xs: Sequence[float], ys: Sequence[float], sx: Scale, sy: Scale, frame: Frame) -> list[str]:
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{sy(y):.1f}" y2="{sy(y):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{sy(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in ys
    ]
    parts += [
        f'<line class="grid" x1="{sx(x):.1f}" x2="{sx(x):.1f}" y1="{TOP}" y2="{base}"/>'
        f'<text class="tick" x="{sx(x):.1f}" y="{base + 18}" text-anchor="middle">{x:g}{frame.unit}</text>'
        for x in xs
    ]
    middle = (TOP + base) / 2
    parts.append(
        f'<text class="axis" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{frame.x_title}</text>'
    )
    parts.append(
        f'<text class="axis" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{frame.y_title}</text>'
    )
    return parts


def _line(fewer: Sequence[Point], sx: Scale, sy: Scale) -> str:
    path = " ".join(f"{sx(p.x):.1f},{sy(p.y):.1f}" for p in sorted(fewer, key=lambda p: p.y))
    return f'<polyline class="fewer" points="{path}"/>' if len(fewer) > 1 else ""


def _marker(p: Point, sx: Scale, sy: Scale, frame: Frame) -> str:
    x, y = sx(p.x), sy(p.y)
    at = f"{p.y:.1f}{frame.y_unit} [{p.low:.1f}, {p.high:.1f}] at {p.x:.2f}{frame.unit}"
    title = f"<title>{escape(p.label)}: {at}</title>"
    whisker = f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{sy(p.low):.1f}" y2="{sy(p.high):.1f}"/>'
    if p.left is not None and p.right is not None:
        whisker += f'<line class="whisker" x1="{sx(p.left):.1f}" x2="{sx(p.right):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if p.kind == "method":
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    elif p.kind == "control":
        shape = f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" rx="1.5"/>'
    else:
        shape, whisker = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>', ""
    return f'<g class="mark {p.kind}">{title}{whisker}{shape}</g>'


Box = tuple[float, float, float, float]


def _labels(named: Sequence[Point], everything: Sequence[Point], sx: Scale, sy: Scale) -> list[str]:
    """Labels at the first free place around their points, so that none covers another label or a marker."""
    taken: list[Box] = [(sx(p.x) - 6, sy(p.y) - 6, sx(p.x) + 6, sy(p.y) + 6) for p in everything]
    taken += [(sx(p.x) - 2, sy(p.high), sx(p.x) + 2, sy(p.low)) for p in named]
    parts: list[str] = []
    for p in named:
        x, y, width = sx(p.x), sy(p.y), len(p.label) * _LETTER
        places = [(x + 11 if side > 0 else x - 11 - width, y + 4 + shift) for shift in _SHIFTS for side in (1, -1)]
        boxes = [(left, foot - 10, left + width, foot + 3) for left, foot in places]
        free = [i for i, box in enumerate(boxes) if _inside(box) and not any(_meet(box, other) for other in taken)]
        inside = [i for i, box in enumerate(boxes) if _inside(box)]
        chosen = (free or inside or [0])[0]
        taken.append(boxes[chosen])
        left, foot = places[chosen]
        if abs(foot - 4 - y) > 12:
            near = left if left > x else left + width
            parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{foot - 4:.1f}"/>')
        parts.append(f'<text class="label {p.kind}" x="{left:.1f}" y="{foot:.1f}">{escape(p.label)}</text>')
    return parts


_SHIFTS = (0, -13, 13, -26, 26, -39, 39, -52, 52, -65, 65)


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
