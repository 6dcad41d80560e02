"""Charts as inline SVG: lines, bars and dots. Colours are CSS variables of the page, so that they follow its scheme.

A chart is WIDE units wide, about a phone's width: there its letters are as large as the page's, and on a desktop
charts stand beside each other. Lines are named at their ends and in a legend; points say their numbers when hovered.
Every text is escaped here, because names of domains and runs are foreign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlcm_lightning.evaluation.analysis.formatting import inline
from dlcm_lightning.evaluation.analysis.scales import Axis, spread_apart

WIDE, HIGH = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 84, 12, 42
ROW = 30
"""Height of a row of dots."""
LETTER = 6.7
"""About the width of one, at the charts' size of 12."""


@dataclass(frozen=True)
class Line:
    """A curve; None where it has a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int
    """From 1, of the page's series."""
    spread: Sequence[tuple[float, float] | None] = ()
    """Low and high at each point, drawn as bars."""
    dashed: bool = False
    hints: Sequence[str] = ()
    """What each point says when hovered."""
    short: str = ""
    """The name at its end, where the whole one is long."""


@dataclass(frozen=True)
class Dot:
    """A mark in a row."""

    value: float
    colour: int
    hint: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    label: str = ""


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{inline(content)}</text>'


def _open(title: str, height: float) -> list[str]:
    return [f'<svg viewBox="0 0 {WIDE} {height:.0f}" role="img" aria-label="{inline(title)}">']


def _frame(x: Axis, y: Axis, right: float, height: float) -> list[str]:
    """Grid, ticks and names of axes."""
    bottom = height - BOTTOM
    parts = []
    for value, label in y.marks():
        at = bottom - y.place(value) * (bottom - TOP)
        parts += [f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right:.1f}" y2="{at:.1f}"/>',
                  _text(LEFT - 5, at + 3.5, label, "tick", "end")]
    free = -1e9
    for value, label in x.marks():
        at = LEFT + x.place(value) * (right - LEFT)
        if at - len(label) * LETTER / 2 > free:
            parts.append(_text(at, bottom + 14, label, "tick", "middle"))
            free = at + len(label) * LETTER / 2 + 3
    parts += [f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right:.1f}" y2="{bottom}"/>',
              _text((LEFT + right) / 2, height - 8, x.label, "name", "middle"),
              f'<text class="name" text-anchor="middle" transform="translate(11 {(TOP + bottom) / 2:.1f}) rotate(-90)">'
              f"{inline(y.label)}</text>"]
    return parts


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, title: str, *, band: tuple[float, float] | None = None,
               rule: float | None = None, points: bool = True) -> str:
    """band: between two values of y, shaded. rule: a value of y that is marked. points: whether they are drawn."""
    right, bottom = WIDE - RIGHT, HIGH - BOTTOM

    def at(value: float) -> float:
        return LEFT + x.place(value) * (right - LEFT)

    def up(value: float) -> float:
        return bottom - y.place(value) * (bottom - TOP)

    parts = _open(title, HIGH)
    if band:
        parts.append(f'<rect class="band" x="{LEFT}" y="{up(band[1]):.1f}" width="{right - LEFT}" '
                     f'height="{up(band[0]) - up(band[1]):.1f}"/>')
    parts += _frame(x, y, right, HIGH)
    if rule is not None:
        parts.append(f'<line class="rule" x1="{LEFT}" y1="{up(rule):.1f}" x2="{right}" y2="{up(rule):.1f}"/>')
    ends: list[tuple[Line, float]] = []
    for line in lines:
        parts += _curve(line, [(at(one), None if value is None else up(value)) for one, value in line.points],
                        [None if spread is None else (up(spread[0]), up(spread[1])) for spread in line.spread], points)
        if last := [value for _, value in line.points if value is not None]:
            ends.append((line, up(last[-1])))
    for (line, wanted), place in zip(ends, spread_apart([one for _, one in ends], 12, TOP + 4, bottom), strict=True):
        parts.append(f'<path class="lead s{line.colour}" d="M{right + 2} {wanted:.1f}L{right + 8} {place:.1f}"/>')
        name = _fitted(line.short or line.name, RIGHT - 12)
        parts.append(_text(right + 11, place + 3.5, name, f"end f{line.colour}"))
    return "".join([*parts, "</svg>"])


def _fitted(name: str, room: float) -> str:
    most = int(room / LETTER)
    return name if len(name) <= most else name[:most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _curve(line: Line, places: Sequence[tuple[float, float | None]], spreads: Sequence[tuple[float, float] | None],
           points: bool) -> list[str]:
    parts, path, pen = [], "", "M"
    for across, up in places:
        if up is None:
            pen = "M"
            continue
        path += f"{pen}{across:.1f} {up:.1f}"
        pen = "L"
    for (across, _), spread in zip(places, spreads, strict=False):
        if spread:
            parts.append(f'<path class="spread s{line.colour}" d="M{across:.1f} {spread[0]:.1f}V{spread[1]:.1f}"/>')
    parts.append(f'<path class="curve s{line.colour}{" dashed" * line.dashed}" d="{path}"/>')
    for number, (across, up) in enumerate(places if points else ()):
        if up is not None:
            hint = f"<title>{inline(line.hints[number])}</title>" if line.hints else ""
            parts.append(f'<circle class="f{line.colour}" cx="{across:.1f}" cy="{up:.1f}" r="2.6">{hint}</circle>')
    return parts


def bar_chart(bars: Sequence[tuple[str, float, str]], x_label: str, y: Axis, title: str, colour: int, *,
              marked: str = "", every: int = 5, height: float = 150) -> str:
    """bars: name, height and hint of each, from left to right. marked: name of one that a dashed line leads to. every:
    which ones are named below, besides the first and the last."""
    right, bottom = WIDE - 10, height - BOTTOM
    room = (right - LEFT) / len(bars)
    ticks = [(number + 0.5, name) for number, (name, _, _) in enumerate(bars)
             if number in (0, len(bars) - 1) or (number + 1) % every == 0]
    parts = _open(title, height) + _frame(Axis(x_label, 0, len(bars), ticks=ticks), y, right, height)
    for number, (name, value, hint) in enumerate(bars):
        high = y.place(value) * (bottom - TOP)
        if name == marked:
            across = LEFT + (number + 0.5) * room
            parts.append(f'<line class="rule" x1="{across:.1f}" y1="{TOP}" x2="{across:.1f}" y2="{bottom}"/>')
        parts.append(f'<rect class="f{colour}" x="{LEFT + number * room + 1:.1f}" y="{bottom - high:.1f}" '
                     f'width="{max(1.0, room - 2):.1f}" height="{high:.1f}"><title>{inline(hint)}</title></rect>')
    return "".join([*parts, "</svg>"])


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], x: Axis, title: str, *, rule: float | None = None) -> str:
    """A row for each name, with its marks; rule: a value that is marked in all of them."""
    left = 14 + max(len(name) for name, _ in rows) * LETTER
    height, right = TOP + len(rows) * ROW + BOTTOM, WIDE - 14
    bottom = height - BOTTOM

    def at(value: float) -> float:
        return left + min(1.0, max(0.0, x.place(value))) * (right - left)

    parts = _open(title, height)
    for value, label in x.marks():
        parts += [f'<line class="grid" x1="{at(value):.1f}" y1="{TOP}" x2="{at(value):.1f}" y2="{bottom}"/>',
                  _text(at(value), bottom + 14, label, "tick", "middle")]
    if rule is not None:
        parts.append(f'<line class="rule" x1="{at(rule):.1f}" y1="{TOP}" x2="{at(rule):.1f}" y2="{bottom}"/>')
    parts.append(_text((left + right) / 2, height - 8, x.label, "name", "middle"))
    for number, (name, dots) in enumerate(rows):
        level = TOP + (number + 0.5) * ROW
        parts.append(_text(left - 8, level + 3.5, name, "tick", "end"))
        for dot in dots:
            if dot.low is not None and dot.high is not None:
                parts.append(f'<path class="spread s{dot.colour}" d="M{at(dot.low):.1f} {level:.1f}'
                             f'H{at(dot.high):.1f}"/>')
            kind = f"hollow s{dot.colour}" if dot.hollow else f"f{dot.colour}"
            parts.append(f'<circle class="{kind}" cx="{at(dot.value):.1f}" cy="{level:.1f}" r="4">'
                         f"<title>{inline(dot.hint)}</title></circle>")
            if dot.label:
                parts.append(_text(at(dot.value), level - 7, dot.label, f"end f{dot.colour}", "middle"))
    return "".join([*parts, "</svg>"])


def legend(entries: Sequence[tuple[str, int, bool]]) -> str:
    """HTML: name, colour and whether hollow or dashed, of each."""
    items = "".join(f'<li><i class="k{colour}{" open" * hollow}"></i>{inline(name)}</li>'
                    for name, colour, hollow in entries)
    return f'<ul class="legend">{items}</ul>'
