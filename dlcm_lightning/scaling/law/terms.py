"""Eq. 22 as a sum of powers, in the coordinates in which it is fitted; with its Jacobian.

Amplitude and exponent of A / (x + t)^d are nearly the same number to a fit: over one decade of x, a larger d is undone
by a larger A. So the coordinates of a term are its *contribution* c in nats at the middle of the grid x0, its exponent,
and its offset as a share of x0:

    c (R / R0)^gamma ((x0 + t) / (x + t))^d          hence A = c (x0 + t)^d / R0^gamma

All but gamma are logarithms: contributions, exponents and offsets are positive, and their errors are factors. gamma is
free in sign, so that the data may say that coarser is better. A DLCM has three terms, of x = N (1-P), N P and D; a
dense model two, of N and D.

Offsets that vary by configuration get one more coordinate each, u: t_c = (x_c + t) e^u - x_c, with x_c the
configuration's smallest x. So u = 0.1 makes a configuration count as one with 10 % more of x, whatever t is; such an
offset may be negative. (Were u the logarithm of t_c / t, a large common t would buy freedom, and fits ran off to it.)
The offsets of N (1-P) and of N P are constants within a configuration: its own data cannot tell them from one another,
nor from the noise of its seed. So these coordinates are drawn to 0 by a prior (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dlcm_lightning.scaling.law.formula import ConceptLaw, DenseLaw, Law, Offsets
from dlcm_lightning.scaling.law.table import Run, rungs_of

EXPONENT = (0.02, 2.5)
CONTRIBUTION = (1e-5, 30.0)
"""Nats a token, in the middle of the grid."""
OFFSET = (1e-4, 20.0)
"""As a share of the middle of the grid: the least is as good as none."""
GAMMA = (-1.0, 3.0)
DEVIATION = 1.0
"""The most that u may be, either way."""


@dataclass(frozen=True)
class Term:
    """c (R / R0)^gamma ((x0 + t) / (x + t))^d over all points."""

    name: str
    """tok, con or dat."""
    exponent: str
    """Name of d in the law."""
    x: np.ndarray
    """(points,)"""
    middle: float
    """x0."""
    least: np.ndarray
    """x_c of the point's configuration, (points,)."""
    log_ratio: np.ndarray | None
    """log(R / R0), (points,); None where R does not enter."""
    middle_ratio: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of the coordinates: contribution, exponent, offset and, with R, gamma."""
        names = (f"c_{self.name}", self.exponent, f"t_{self.name}")
        return names if self.log_ratio is None else (*names, "gamma")


def _middle(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def _term(name: str, exponent: str, x: np.ndarray, rung: np.ndarray, R: np.ndarray | None = None) -> Term:
    least = np.full(int(rung.max()) + 1, np.inf)
    np.minimum.at(least, rung, x)
    ratio = 1.0 if R is None else _middle(R)
    return Term(name, exponent, x, _middle(x), least[rung], None if R is None else np.log(R / ratio), ratio)


@dataclass(frozen=True)
class Points:
    """All stable points of a ladder of one kind, in the order of runs and tokens, and the terms of its law."""

    runs: tuple[Run, ...]
    run: np.ndarray
    """Index of the run, (points,)."""
    rung: np.ndarray
    """Index of the configuration, (points,)."""
    rungs: tuple[tuple[str, float, float, float], ...]
    tokens: np.ndarray
    loss: np.ndarray
    weight: np.ndarray
    """Mean 1 over each run, so that a run counts once however often it was measured."""
    terms: tuple[Term, ...]
    by_rung: bool
    """Whether offsets vary by configuration."""

    @property
    def concept(self) -> bool:
        return len(self.terms) == 3

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the common coordinates."""
        return ("E0", *(name for term in self.terms for name in term.names))

    @property
    def size(self) -> int:
        """Number of all coordinates."""
        return len(self.names) + (len(self.terms) * len(self.rungs) if self.by_rung else 0)

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all coordinates."""
        low, high = [np.log(1e-3)], [float(np.log(self.loss.min()))]
        for term in self.terms:
            ranges = [np.log(CONTRIBUTION), np.log(EXPONENT), np.log(OFFSET)]
            ranges += [] if term.log_ratio is None else [np.array(GAMMA)]
            low += [float(one[0]) for one in ranges]
            high += [float(one[1]) for one in ranges]
        rest = self.size - len(self.names)
        return np.array(low + [-DEVIATION] * rest), np.array(high + [DEVIATION] * rest)

    @cached_property
    def last(self) -> np.ndarray:
        """Index of every run's last point, (runs,)."""
        return np.flatnonzero(np.append(self.run[1:] != self.run[:-1], True))

    def evaluate(self, coordinates: np.ndarray, jacobian: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Losses (points,), and their derivatives by every coordinate (points, size) if asked for, else (points, 0)."""
        total = np.full(len(self.loss), np.exp(coordinates[0]))
        slopes = np.zeros((len(self.loss), self.size if jacobian else 0))
        if jacobian:
            slopes[:, 0] = total
        place, rest = 1, len(self.names)
        rows = np.arange(len(self.loss))
        for term in self.terms:
            contribution, exponent, log_offset = coordinates[place:place + 3]
            d = np.exp(exponent)
            common = term.middle * np.exp(log_offset)
            offset, grown, growth = common, 0.0, 1.0
            if self.by_rung:
                grown = (term.least + common) * np.exp(coordinates[rest + self.rung])
                offset, growth = grown - term.least, grown / (term.least + common)
            log_share = np.log((term.middle + common) / (term.x + offset))
            value = np.exp(contribution + d * log_share)
            if term.log_ratio is not None:
                value = value * np.exp(coordinates[place + 3] * term.log_ratio)
            total = total + value
            if jacobian:
                pull = -value * d / (term.x + offset)
                slopes[:, place] = value
                slopes[:, place + 1] = value * d * log_share
                slopes[:, place + 2] = pull * growth * common + value * d * common / (term.middle + common)
                if term.log_ratio is not None:
                    slopes[:, place + 3] = value * term.log_ratio
                if self.by_rung:
                    slopes[rows, rest + self.rung] = pull * grown
            place += len(term.names)
            rest += len(self.rungs) if self.by_rung else 0
        return total, slopes

    def law(self, coordinates: np.ndarray) -> Law:
        """The law with the common offsets."""
        values: dict[str, float] = {"E0": float(np.exp(coordinates[0]))}
        place = 1
        for term in self.terms:
            contribution, exponent, log_offset = coordinates[place:place + 3]
            d, t = float(np.exp(exponent)), float(term.middle * np.exp(log_offset))
            gamma = 0.0 if term.log_ratio is None else float(coordinates[place + 3])
            amplitude = float(np.exp(contribution + d * np.log(term.middle + t)) / term.middle_ratio**gamma)
            values |= {f"A_{term.name}": amplitude, f"t_{term.name}": t, term.exponent: d}
            if term.log_ratio is not None:
                values["gamma"] = gamma
            place += len(term.names)
        return ConceptLaw(**values) if self.concept else DenseLaw(**values)

    def contributions(self, coordinates: np.ndarray) -> dict[str, float]:
        """Nats a token of every term in the middle of the grid."""
        return {name: float(np.exp(coordinates[place])) for place, name in enumerate(self.names) if name[:2] == "c_"}

    def offsets(self, coordinates: np.ndarray) -> tuple[Offsets, ...]:
        """By configuration, if they vary."""
        if not self.by_rung:
            return ()
        moves = coordinates[len(self.names):].reshape(len(self.terms), len(self.rungs))
        law = self.law(coordinates)
        found = []
        for place, (_, N, P, R) in enumerate(self.rungs):
            point = int(np.flatnonzero(self.rung == place)[0])
            own = {}
            for term, move in zip(self.terms, moves[:, place], strict=True):
                least = float(term.least[point])
                own[f"t_{term.name}"] = float((least + getattr(law, f"t_{term.name}")) * np.exp(move) - least)
            found.append(Offsets(N, P, R, own))
        return tuple(found)


def points_of(runs: Sequence[Run], *, late: float, skip: float, by_rung: bool) -> Points:
    """Points of runs of one kind. late: exponent of (D / D at the run's end) in a point's weight. skip: share of a
    run's tokens before which no point is taken: early training follows no power law."""
    runs = sorted(runs, key=lambda one: one.name)
    rungs = tuple(rungs_of(runs))
    names = ("run", "rung", "N", "P", "R", "tokens", "loss", "weight")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for index, run in enumerate(runs):
        taken = run.tokens >= skip * run.tokens[-1]
        tokens, ones = run.tokens[taken], np.ones(int(taken.sum()))
        weight = (tokens / tokens[-1]) ** late
        for name, value in (("run", index * ones), ("rung", rungs.index(run.rung) * ones), ("N", run.N * ones),
                            ("P", run.P * ones), ("R", run.R * ones), ("tokens", tokens), ("loss", run.loss[taken]),
                            ("weight", weight / weight.mean())):
            columns[name].append(value)
    at = {name: np.concatenate(values) for name, values in columns.items()}
    N, P, R, D, rung = at["N"], at["P"], at["R"], at["tokens"], at["rung"].astype(int)
    if runs[0].kind == "dlcm":
        terms = [_term("tok", "d1", N * (1 - P), rung), _term("con", "d2", N * P, rung, R)]
    else:
        terms = [_term("tok", "d1", N, rung)]
    terms.append(_term("dat", "alpha", D, rung))
    return Points(tuple(runs), at["run"].astype(int), rung, rungs, D, at["loss"], at["weight"],
                  tuple(terms), by_rung)
