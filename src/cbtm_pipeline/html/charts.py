"""Charts as inline SVG markup. The style sheet has the colours, so charts follow light and dark mode."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from cbtm_pipeline.html.page import Html, tag

WIDTH, HEIGHT = 480, 290
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 28, 42  # margins around the plot
END_HEIGHT = 12  # of a name at the end of a line
FOREST_LEFT, ROW_HEIGHT = 132, 23
APART = 20  # between two ticks, at least

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]


class Series(NamedTuple):
    """A line of a chart.

    A label of "" keeps the line out of the legend. `colour` is a class of the style sheet: `c0` ... `c5` or
    `grey`. The style is "", "thin", "strong", "points" (no line) or "dashed": horizontal, at the height of
    its first point.
    """

    label: str
    colour: str
    points: Points
    style: str = ""
    dots: bool = False
    end: str = ""  # written where the line ends


def nice_ticks(low: float, high: float, n: int = 6) -> list[float]:
    """About n round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times a power of ten within [low, high]; powers alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        if len(found := [tick for tick in ticks if low <= tick <= high]) <= 7:
            return found
    return found[:: math.ceil(len(found) / 7)]


def brief(value: float) -> str:
    """A number for an axis: `0.05`, `27.5`, `1.2M`, `1e+18`."""
    if abs(value) >= 1e15:
        return f"{value:.2g}"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if suffix == "k" else size
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def _scale(low: float, high: float, begin: float, end: float, log: bool = False) -> Scale:
    """Map [low, high] to [begin, end], linearly or by logarithm. An empty range maps to the middle."""
    f = math.log if log else float
    if f(high) - f(low) <= 0:
        return lambda value: (begin + end) / 2
    return lambda value: begin + (end - begin) * (f(value) - f(low)) / (f(high) - f(low))


def lines(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    log_x: bool = False,
    y_top: float | None = None,
) -> Html:
    """A line chart with its legend.

    Points above `y_top` are not drawn. Up to 8 different values of x that lie apart get a tick each; others
    get round ticks.
    """
    xs = sorted({a for s in series for a, _ in s.points if s.style != "dashed"})
    ys = [b for s in series for _, b in s.points]
    y_high = max(ys) if y_top is None else min(max(ys), y_top)
    pad = 0.06 * (y_high - min(ys)) or 0.05 * abs(y_high) or 1.0
    low, high = min(ys) - pad, y_high + pad
    right = WIDTH - RIGHT - (8 * max(len(s.end) for s in series) if any(s.end for s in series) else 0)
    x = _scale(xs[0], xs[-1], LEFT + 8, right - 8, log_x)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)

    apart = all(x(b) - x(a) >= APART for a, b in itertools.pairwise(xs))
    round_ticks = (log_ticks if log_x else nice_ticks)(xs[0], xs[-1])
    x_ticks = xs if len(xs) <= 8 and apart else round_ticks or [xs[0], xs[-1]]
    middle = (LEFT + WIDTH - RIGHT) // 2
    parts = [
        tag("title", title),
        *_y_ticks(nice_ticks(low, high), y),
        *_x_ticks(x_ticks, x),
        tag("text", y_label, x=2, y=13),
        tag("text", x_label, x=middle, y=HEIGHT - 6, text_anchor="middle"),
    ]
    for s in series:
        if s.style == "dashed":
            level = f"M{LEFT} {y(s.points[0][1]):.1f}H{WIDTH - RIGHT}"
            parts.append(tag("path", d=level, class_=f"line dashed {s.colour}"))
            continue
        if s.style != "points":
            path = _path([(a, b) for a, b in s.points if b <= high], x, y)
            named = tag("title", s.label) if s.label else ""
            parts.append(tag("path", named, d=path, class_=f"line {s.style} {s.colour}"))
        for a, b in s.points if s.dots else ():
            parts.append(_dot(x(a), y(b), f"{s.label}, {x_label} {brief(a)}: {b:.4g}", s.colour))
    parts += _ends(series, x, lambda value: y(min(value, high)))
    return tag("figure", tag("h3", title), _svg(title, HEIGHT, parts), legend(series))


def _ends(series: Sequence[Series], x: Scale, y: Scale) -> list[Html]:
    """The names at the ends of the lines, moved apart where they would overlap."""
    found = ((y(s.points[-1][1]), x(s.points[-1][0]), s) for s in series if s.end and s.points)
    named = sorted(found, key=lambda end: end[:2])
    lowest, parts = HEIGHT - BOTTOM - END_HEIGHT * (len(named) - 1), []
    at = TOP - END_HEIGHT
    for i, (own, end, s) in enumerate(named):
        at = min(max(own, at + END_HEIGHT), lowest + END_HEIGHT * i)
        parts.append(tag("text", s.end, x=f"{end + 6:.1f}", y=f"{at + 4:.1f}", class_=f"end {s.colour}"))
    return parts


def _y_ticks(ticks: Sequence[float], y: Scale) -> list[Html]:
    parts = []
    for tick in ticks:
        parts.append(tag("path", d=f"M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(tag("text", brief(tick), x=LEFT - 7, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    return parts


def _x_ticks(ticks: Sequence[float], x: Scale) -> list[Html]:
    y = HEIGHT - BOTTOM + 17
    return [tag("text", brief(tick), x=f"{x(tick):.1f}", y=y, text_anchor="middle") for tick in ticks]


def _path(points: Points, x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _dot(cx: float, cy: float, text: str, colour: str, r: float = 4) -> Html:
    return tag("circle", tag("title", text), cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=r, class_=f"dot {colour}")


def _svg(title: str, height: float, parts: Iterable[Html]) -> Html:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)


def legend(series: Sequence[Series]) -> Html:
    """Names beside their colours, each name once."""
    named = {s.label: s for s in reversed(series) if s.label}
    items = [tag("li", s.label, class_=f"{s.colour} {s.style}") for s in reversed(named.values())]
    return tag("ul", *items, class_="legend")


class Estimate(NamedTuple):
    """A row of a forest plot: a ratio with its interval, None where there is none."""

    label: str
    ratio: float
    ci95: Sequence[float] | None
    colour: str


def forest(title: str, rows: Sequence[Estimate]) -> Html:
    """Ratios with their intervals on a logarithmic axis, with a line at 1."""
    bottom = TOP + ROW_HEIGHT * len(rows)
    ends = [end for row in rows for end in row.ci95 or [row.ratio]]
    low, high = 0.98 * min(1.0, *ends), 1.02 * max(1.0, *ends)
    left = min(max([FOREST_LEFT, *(6.6 * len(row.label) for row in rows)]), WIDTH / 2)
    x = _scale(low, high, left, WIDTH - RIGHT, log=True)
    parts = [tag("title", title)]
    for tick in nice_ticks(low, high):
        class_ = "one" if math.isclose(tick, 1) else "grid"
        parts.append(tag("path", d=f"M{x(tick):.1f} {TOP - 6}V{bottom}", class_=class_))
        parts.append(tag("text", brief(tick), x=f"{x(tick):.1f}", y=bottom + 16, text_anchor="middle"))
    parts.append(tag("text", "← better", x=f"{x(1) - 8:.1f}", y=13, text_anchor="end"))
    parts.append(tag("text", "worse →", x=f"{x(1) + 8:.1f}", y=13))
    for i, row in enumerate(rows):
        parts += _estimate(row, TOP + ROW_HEIGHT * (i + 0.5), x)
    return tag("figure", tag("h3", title), _svg(title, bottom + 24, parts))


def _estimate(row: Estimate, y: float, x: Scale) -> list[Html]:
    """The name of a row at height y, its interval, and its ratio as a dot."""
    name = tag("text", row.label, x=0, y=f"{y + 4:.1f}", class_="name")
    if row.ci95 is None:
        return [name, _dot(x(row.ratio), y, f"{row.label}: {row.ratio:.3f}", row.colour, 3)]
    low, high = row.ci95
    whiskers = f"M{x(low):.1f} {y - 4:.1f}v8m0 -4H{x(high):.1f}m0 -4v8"
    numbers = f"{row.label}: {row.ratio:.3f} [{low:.3f}, {high:.3f}]"
    return [
        name,
        tag("path", d=whiskers, class_=f"line {row.colour}"),
        _dot(x(row.ratio), y, numbers, row.colour, 3),
    ]


def bar(share: float, title: str) -> Html:
    """A horizontal bar over this share of the width, for a table cell."""
    drawn = tag("rect", tag("title", title), width=f"{100 * share:.1f}", height=10, class_="bar c0")
    return tag("svg", drawn, viewBox="0 0 100 10", preserveAspectRatio="none", role="img", aria_label=title)
