"""From numbers to places on a chart, and where its ticks stand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """One direction of a chart."""

    label: str
    """With the unit."""
    low: float
    high: float
    logarithmic: bool = False
    """To the base 2."""
    ticks: Sequence[tuple[float, str]] = ()
    """Where and what; round numbers where none are given."""

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, value = (math.log2(one) if self.logarithmic else one for one in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def marks(self) -> Sequence[tuple[float, str]]:
        """Ticks within the axis."""
        if self.ticks:
            return self.ticks
        if self.logarithmic:
            powers = range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)
            return [(2.0**power, brief(2.0**power)) for power in powers]
        step = nice_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        return [(number * step, brief(number * step))
                for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def spanning(label: str, values: Sequence[float], *, include: Sequence[float] = ()) -> Axis:
    """A linear axis whose ends are round and hold all values."""
    low, high = min([*values, *include]), max([*values, *include])
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    step = nice_step(high - low)
    return Axis(label, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, of which at most MOST_TICKS fit."""
    rough = span / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def brief(value: float) -> str:
    """Of a tick: 128k for 131072, 1.6M for 1600000, no digits that say nothing."""
    if value >= 1024 and value % 1024 == 0 and math.log2(value).is_integer():
        return f"{value / 1024:g}k"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{round(value, 10):g}".replace("-", "\N{MINUS SIGN}")


def spread_apart(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least so far apart, in their order, within [low, high] as far as they fit."""
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    placed = [0.0] * len(wanted)
    floor = low
    for number in order:
        placed[number] = max(wanted[number], floor)
        floor = placed[number] + least
    ceiling = high
    for number in reversed(order):
        placed[number] = min(placed[number], ceiling)
        ceiling = placed[number] - least
    return placed


Project = Callable[[float], float]
