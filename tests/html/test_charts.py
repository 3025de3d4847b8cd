"""Charts: round ticks, and marks at the right places inside the picture."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.html import charts
from parsed_page import Page


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=100, deadline=None)
def test_ticks_are_few_round_and_inside(low: float, width: float):
    ticks = charts.nice_ticks(low, low + width)
    assert len(ticks) <= 8
    slack = 1e-6 * width + 4 * math.ulp(abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    if width > 1e-3 * abs(low):
        assert len(ticks) >= 2
        step = ticks[1] - ticks[0]
        assert float(f"{step:.2g}") == pytest.approx(step, rel=1e-3)


def test_numbers_on_axes_are_short():
    assert [charts.brief(x) for x in (0.05, 27.5, 12_000, 1.25e6, 3e13)] == [
        "0.05",
        "27.5",
        "12k",
        "1.25M",
        "30T",
    ]


points = st.lists(st.tuples(st.floats(0.01, 1e7), st.floats(0.5, 1e5)), min_size=1, max_size=20)


@given(st.lists(points, min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_everything_is_drawn_inside_the_picture(series: list[list[tuple[float, float]]], log_x: bool):
    drawn = charts.lines(
        "t",
        "x",
        "y",
        [charts.Series(str(i), "c0", sorted(p), dots=True) for i, p in enumerate(series)],
        log_x,
    )
    Page(drawn)
    marks = re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)
    assert len(marks) == sum(map(len, series))
    for x, y in marks:
        assert (
            charts.LEFT <= float(x) <= charts.WIDTH - charts.RIGHT
            and charts.TOP <= float(y) <= charts.HEIGHT - charts.BOTTOM
        )


def test_lines_place_points_where_they_belong():
    drawn = charts.lines(
        "t", "x", "y", [charts.Series("a", "c0", [(1, 10), (10, 20), (100, 30)], dots=True)], log_x=True
    )
    (x1, y1), (x2, y2), (x3, y3) = (
        (float(x), float(y)) for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn)
    )
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y1 > y2
    cut = charts.lines("t", "x", "y", [charts.Series("a", "c0", [(1, 1000), (2, 20), (3, 30)])], y_top=30)
    (path,) = re.findall(r'd="(M[^"]*)" class="line ', cut)
    assert path.count("L") == 1


def test_forest_orders_ratios_around_one():
    rows = [charts.Estimate(f"s{r}", r, [r - 0.05, r + 0.05], "c0") for r in (0.7, 1.0, 1.4)]
    drawn = charts.forest("t", rows)
    xs = [float(x) for x in re.findall(r'cx="([-\d.]+)"', drawn)]
    (one,) = re.findall(r'd="M([-\d.]+) [-\d.]+V[-\d.]+" class="one"', drawn)
    assert xs == sorted(xs) and xs[1] == pytest.approx(float(one), abs=0.11)
    intervals = re.findall(r'd="M([-\d.]+) [-\d.]+v8m0 -4H([-\d.]+)m0 -4v8"', drawn)
    assert all(float(low) < x < float(high) for (low, high), x in zip(intervals, xs, strict=True))
    Page(charts.forest("t", [charts.Estimate("a", 1.0, [1.0, 1.0], "c0")]))
