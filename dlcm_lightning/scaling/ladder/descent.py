"""Coordinate descent over learning rates: one field at a time, on a grid of powers of a factor, until no field moves.

A field is tried at its place and one grid step to either side; while the best lies at the edge of what was tried, one
more step is taken there. What was tried once is not tried again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dlcm_lightning.errors import RunError

MOST_STEPS = 8
"""Of one field from where it was: a factor of 256 where the grid has a factor of 2."""
Place = Mapping[str, int]
"""By field, the power of the factor."""
Evaluate = Callable[[Sequence[Place], str], Sequence[float | None]]
"""Places and the field that is searched -> their losses: infinite where training diverged, None where one is not
known."""


@dataclass(frozen=True)
class LineSearch:
    """One field tried, the others held."""

    round: int
    field: str
    place: dict[str, int]
    """Before it."""
    tried: dict[int, float]
    """Loss by power of the field, ascending."""
    chosen: int


@dataclass(frozen=True)
class Descent:
    """The path of a search."""

    searches: tuple[LineSearch, ...]
    place: dict[str, int]
    """Where it ended, or stands."""
    finished: bool
    """Whether nothing was missing."""
    settled: bool
    """Whether the last round moved no field; if not, more rounds might."""


class _Missing(Exception):
    """A loss that is not known."""


def descend(fields: Sequence[str], rounds: int, evaluate: Evaluate) -> Descent:
    """From the power 0 of every field. RunError: every place that was tried diverged."""
    place = dict.fromkeys(fields, 0)
    known: dict[tuple[int, ...], float] = {}
    searches: list[LineSearch] = []

    def losses(field: str, powers: Sequence[int]) -> dict[int, float]:
        places = {power: {**place, field: power} for power in powers}
        missing = [power for power in powers if tuple(places[power].values()) not in known]
        found = evaluate([places[power] for power in missing], field) if missing else []
        for power, loss in zip(missing, found, strict=True):
            if loss is None:
                raise _Missing
            known[tuple(places[power].values())] = math.inf if math.isnan(loss) else loss
        return {power: known[tuple(places[power].values())] for power in powers}

    def search(number: int, field: str) -> None:
        begun = place[field]
        tried = losses(field, [begun - 1, begun, begun + 1])
        while (best := _best(tried, begun)) in (min(tried), max(tried)) and abs(best - begun) < MOST_STEPS:
            tried |= losses(field, [best - 1 if best == min(tried) else best + 1])
        if math.isinf(tried[best]):
            raise RunError("transfer: training diverged at every rate that was tried on the proxy; begin with lower "
                           "rates in the base")
        searches.append(LineSearch(number, field, dict(place), dict(sorted(tried.items())), best))
        place[field] = best

    settled = False
    try:
        for number in range(1, rounds + 1):
            before = dict(place)
            for field in fields:
                search(number, field)
            if settled := place == before:
                break
    except _Missing:
        return Descent(tuple(searches), place, False, False)
    return Descent(tuple(searches), place, True, settled)


def _best(tried: Mapping[int, float], begun: int) -> int:
    """The least loss; where several are equal, the one nearest to where the search began."""
    return min(tried, key=lambda power: (tried[power], abs(power - begun), power))
