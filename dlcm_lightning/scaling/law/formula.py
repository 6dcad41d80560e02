"""The laws of section 6.2 and what a fit of them says; standard library only, so that a planner can read one anywhere.

Eq. 22, the loss of a DLCM while the learning rate is held, in nats a token:

    L(N, D, R, P) = E0 + A_tok / (N (1-P) + t_tok)^d1 + A_con R^gamma / (N P + t_con)^d2 + A_dat / (D + t_dat)^alpha

The dense baseline is its limit without a concept term:

    L(N, D) = E0 + A_tok / (N + t_tok)^d1 + A_dat / (D + t_dat)^alpha

Eq. 23, what the decay of the learning rate takes off it: delta = k L_stable^a R^b N^c.

N non-embedding parameters, P the backbone's share of them, R tokens per concept, D training tokens. R^gamma stands in
the numerator: gamma > 0 says that coarser concepts cost loss.

A fit is only as good as its grid. So a law carries the range of everything that it has seen, and refuses what lies
further outside than a stated factor; and it carries the laws of its bootstrap, from which intervals of any prediction
follow. They are intervals of the law: a single run lies around it with the noise of its seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dlcm_lightning.errors import ConfigError

FORMAT = 1
COVERAGE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class ConceptLaw:
    """Constants of Eq. 22."""

    E0: float
    """Loss that is left at infinite size and data, nats a token."""
    A_tok: float
    t_tok: float
    """Parameters that are added to those of the token stacks."""
    d1: float
    A_con: float
    gamma: float
    t_con: float
    """Parameters that are added to those of the backbone."""
    d2: float
    A_dat: float
    t_dat: float
    """Tokens that are added to D."""
    alpha: float

    def loss(self, N: float, D: float, R: float, P: float) -> float:
        """Eq. 22, nats a token."""
        return (self.E0 + self.A_tok / (N * (1 - P) + self.t_tok) ** self.d1
                + self.A_con * R**self.gamma / (N * P + self.t_con) ** self.d2
                + self.A_dat / (D + self.t_dat) ** self.alpha)


@dataclass(frozen=True)
class DenseLaw:
    """Constants of the dense baseline."""

    E0: float
    A_tok: float
    t_tok: float
    d1: float
    A_dat: float
    t_dat: float
    alpha: float

    def loss(self, N: float, D: float, R: float = 1.0, P: float = 0.0) -> float:
        """Nats a token. R and P are not read: a dense model has no concepts."""
        return self.E0 + self.A_tok / (N + self.t_tok) ** self.d1 + self.A_dat / (D + self.t_dat) ** self.alpha


@dataclass(frozen=True)
class DecayLaw:
    """Constants of Eq. 23."""

    k: float
    a: float
    b: float
    """Exponent of R; 0 for dense models."""
    c: float

    def gain(self, stable_loss: float, N: float, R: float) -> float:
        """Nats a token that the decay takes off `stable_loss`."""
        return self.k * stable_loss**self.a * R**self.b * N**self.c


Law = ConceptLaw | DenseLaw


@dataclass(frozen=True)
class Range:
    """The least and the largest value that a fit has seen."""

    low: float
    high: float

    def factor(self, value: float) -> float:
        """How far outside a value lies: 1 inside, 2 at twice the largest or half the least."""
        if not value > 0:
            return float("inf")
        return max(1.0, self.low / value, value / self.high)


@dataclass(frozen=True)
class Offsets:
    """The offsets of one configuration, where they were let vary by configuration."""

    N: float
    P: float
    R: float
    """On target."""
    offsets: dict[str, float]
    """By name: t_tok, t_con, t_dat."""


@dataclass(frozen=True)
class Prediction:
    """Nats a token."""

    loss: float
    low: float
    high: float
    """Ends of the 95 % interval of the law, by its bootstrap; both `loss` where there was none."""
    factor: float
    """The largest factor by which something lies outside what the fit has seen."""


@dataclass(frozen=True)
class FittedLaw:
    """A law, what it was fitted to, and how well it is known."""

    law: Law
    intervals: dict[str, tuple[float, float]]
    """95 % intervals of its constants, by the bootstrap over runs."""
    samples: tuple[Law, ...]
    """One law for each draw of the bootstrap."""
    seen: dict[str, Range]
    """N, D; for a DLCM also R, P, and N (1-P) and N P under `token_parameters` and `concept_parameters`."""
    extrapolation: float
    """Factor outside `seen` up to which predictions are given unasked."""
    quality: dict[str, Any]
    """R^2, errors on what was left out, spread of the starts, what cannot be told apart: as fit.md says it."""
    offsets: tuple[Offsets, ...] = ()
    """By configuration; `law` has what they have in common, which is what new configurations get."""

    def factors(self, N: float, D: float, R: float = 1.0, P: float = 0.0) -> dict[str, float]:
        """By name, the factor outside of what was seen."""
        values = {"N": N, "D": D}
        if isinstance(self.law, ConceptLaw):
            values |= {"R": R, "token_parameters": N * (1 - P), "concept_parameters": N * P}
        return {name: self.seen[name].factor(value) for name, value in values.items()}

    def predict(self, N: float, D: float, R: float = 1.0, P: float = 0.0, *, extrapolation: float | None = None
                ) -> Prediction:
        """The loss of a new run at constant learning rate. extrapolation: factor that is allowed, in place of the
        fit's own. ConfigError: further outside than that."""
        allowed = self.extrapolation if extrapolation is None else extrapolation
        factors = self.factors(N, D, R, P)
        name = max(factors, key=lambda one: factors[one])
        if factors[name] > allowed * (1 + 1e-9):
            seen = self.seen[name]
            raise ConfigError(
                f"{name} of N = {N:.4g}, D = {D:.4g}, R = {R:g}, P = {P:g}: lies {factors[name]:.3g} times outside "
                f"{seen.low:.4g} to {seen.high:.4g}, which the law has seen; add a rung nearer to it, or ask for "
                f"--extrapolation {1.006 * factors[name]:.3g}")
        loss = self.law.loss(N, D, R, P)
        low, high = interval([one.loss(N, D, R, P) for one in self.samples]) if self.samples else (loss, loss)
        return Prediction(loss, low, high, factors[name])


@dataclass(frozen=True)
class FittedDecay:
    """Eq. 23, fitted."""

    law: DecayLaw
    intervals: dict[str, tuple[float, float]]
    samples: tuple[DecayLaw, ...]
    quality: dict[str, Any]


@dataclass(frozen=True)
class LadderLaws:
    """Everything that `dlcm ladder fit` writes into law.json."""

    concept: FittedLaw | None
    dense: FittedLaw | None
    decay: FittedDecay | None
    """Of DLCMs."""
    dense_decay: FittedDecay | None
    origin: dict[str, Any]
    """The table's name and sha256, and every option of the fit."""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, name: str = "law.json") -> LadderLaws:
        """ConfigError: not what `to_json` writes."""
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ConfigError(f"{name}: format {content['format']!r}, and this version reads {FORMAT}; fit the "
                                  "table again")
            return LadderLaws(
                concept=_fitted(content["concept"], ConceptLaw), dense=_fitted(content["dense"], DenseLaw),
                decay=_fitted_decay(content["decay"]), dense_decay=_fitted_decay(content["dense_decay"]),
                origin=content["origin"])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{name}: not a law of dlcm ladder fit ({type(error).__name__}: {error}); fit the table "
                              "again") from error

    @staticmethod
    def read(file: Path) -> LadderLaws:
        """ConfigError: cannot be read, or is not a fitted law."""
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read ({error}); name the law.json that dlcm ladder fit wrote"
                              ) from error
        return LadderLaws.from_json(text, str(file))


def _intervals(content: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (float(low), float(high)) for name, (low, high) in content.items()}


def _constants(kind: type[Any], content: Mapping[str, float]) -> Any:
    return kind(**{field.name: float(content[field.name]) for field in fields(kind)})


def _fitted(content: Mapping[str, Any] | None, kind: type[ConceptLaw] | type[DenseLaw]) -> FittedLaw | None:
    if content is None:
        return None
    return FittedLaw(
        law=_constants(kind, content["law"]), intervals=_intervals(content["intervals"]),
        samples=tuple(_constants(kind, one) for one in content["samples"]),
        seen={name: Range(float(one["low"]), float(one["high"])) for name, one in content["seen"].items()},
        extrapolation=float(content["extrapolation"]), quality=dict(content["quality"]),
        offsets=tuple(Offsets(one["N"], one["P"], one["R"], dict(one["offsets"])) for one in content["offsets"]))


def _fitted_decay(content: Mapping[str, Any] | None) -> FittedDecay | None:
    if content is None:
        return None
    return FittedDecay(_constants(DecayLaw, content["law"]), _intervals(content["intervals"]),
                       tuple(_constants(DecayLaw, one) for one in content["samples"]), dict(content["quality"]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of values, between order statistics as NumPy's percentiles are."""
    ordered = sorted(values)
    return _quantile(ordered, (1 - COVERAGE) / 2), _quantile(ordered, (1 + COVERAGE) / 2)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def body_flops_per_token(N: float, R: float = 1.0, P: float = 0.0) -> float:
    """Training FLOPs of a token in matrices outside the embeddings, 6 N (1 - P + P / R): backbone parameters meet one
    token in R. A dense model has P = 0. Attention maps and the head come on top: `dlcm_lightning.flops` counts all."""
    return 6 * N * (1 - P + P / R)
