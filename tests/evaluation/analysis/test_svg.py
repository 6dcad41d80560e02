"""Charts put what they are given where it belongs."""

from __future__ import annotations

import re

import pytest

from dlcm_lightning.evaluation.analysis.scales import Axis
from dlcm_lightning.evaluation.analysis.svg import (
    BOTTOM,
    HIGH,
    LEFT,
    RIGHT,
    TOP,
    WIDE,
    Dot,
    Line,
    bar_chart,
    dot_chart,
    legend,
    line_chart,
)


def circles(chart: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]* cx="([\d.]+)" cy="([\d.]+)"', chart)]


def test_points_of_a_line_stand_at_their_values_and_gaps_stay_open() -> None:
    line = Line("a", [(1, 0.0), (2, 5.0), (4, None), (8, 10.0)], 1, hints=["one", "two", "none", "three"])
    chart = line_chart([line], Axis("x", 1, 16, True), Axis("y", 0, 10), "t", band=(2.5, 7.5), rule=5)
    width, height, bottom = WIDE - RIGHT - LEFT, HIGH - BOTTOM - TOP, HIGH - BOTTOM
    assert circles(chart) == [pytest.approx(one, abs=0.06) for one in (
        (LEFT, bottom), (LEFT + width / 4, bottom - height / 2), (LEFT + width * 3 / 4, TOP))]
    (path,) = re.findall(r'class="curve s1" d="(.*?)"', chart)
    assert re.sub(r"[\d. ]", "", path) == "MLM"
    assert re.findall(r"<title>(.*?)</title>", chart) == ["one", "two", "three"]
    (y, high), = re.findall(r'class="band"[^>]* y="([\d.]+)"[^>]* height="([\d.]+)"', chart)
    assert float(y) == pytest.approx(bottom - 0.75 * height) and float(high) == pytest.approx(height / 2)


def test_bars_are_as_high_as_their_values() -> None:
    chart = bar_chart([("1", 0.1, "a"), ("2", 0.4, "b"), ("3+", 0.2, "c")], "x", Axis("y", 0, 0.4), "t", 3, marked="2")
    heights = [float(one) for one in re.findall(r'<rect class="f3"[^>]* height="([\d.]+)"', chart)]
    assert [one / heights[1] for one in heights] == pytest.approx([0.25, 1, 0.5], abs=0.01)


def test_dots_stand_in_their_row_and_never_beyond_the_axis() -> None:
    chart = dot_chart([("a", [Dot(0.0, 1, "low", -1.0, 0.5)]), ("b", [Dot(10.0, 2, "high", hollow=True)])],
                      Axis("x", 0, 5), "t", rule=1)
    (left, above), (right, below) = circles(chart)
    assert left < right <= WIDE and above < below
    (spread,) = re.findall(r'class="spread s1" d="M([\d.]+) [\d.]+H([\d.]+)"', chart)
    assert float(spread[0]) == left < float(spread[1])


def test_names_are_escaped_everywhere() -> None:
    bad = '"><script>'
    axis = Axis(bad, 0, 1)
    charts = [line_chart([Line(bad, [(0, 0.5)], 1, hints=[bad])], axis, axis, bad),
              bar_chart([(bad, 0.5, bad)], bad, axis, bad, 1),
              dot_chart([(bad, [Dot(0.5, 1, bad, label=bad)])], axis, bad), legend([(bad, 1, True)])]
    assert all("<script" not in chart and "&lt;script&gt;" in chart for chart in charts)
