"""Which model, on how many tokens.

With a law: every shape on a grid of N and P, at every R, is given the tokens that the budget pays for, attention maps
and head included; the least predicted loss is taken. The law is smooth in all three, so a coarse grid over everything
that it allows is refined twice around its best. N goes as far as the law's extrapolation lets it; P and R stay within
what the ladder has seen (P between 0.2 and 0.8), because their terms are what a ladder knows least. The loss is flat
around its least: neighbouring sizes differ in its fourth digit.

Without one there is no loss to compare: P and R are those of the known model, and tokens follow from N at so many a
parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from dlcm_lightning.config import ConfigError, ModelConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.law.formula import FittedLaw, Prediction
from dlcm_lightning.scaling.shapes import model_of_size

LEAST_SHARE, MOST_SHARE = 0.2, 0.8
"""P that are searched, where the ladder has seen them."""
COARSE = 1.25
"""Factor between neighbouring sizes of the coarse grid."""
FARTHEST = 1e4
"""Outside of the sizes that a law has seen, up to which the factor is looked for that a refusal names."""
FAR_TOKENS = 1.3
"""By which tokens a parameter may miss what was wished: small models have few sizes."""
MOST_RATIOS = 33
"""R of a grid, in quarters or, over a wider range, in larger steps."""
SLACK = 1 + 1e-9
FLAT = 1e-4
"""Share of a loss by which shapes around the best differ."""


@dataclass(frozen=True)
class Choice:
    """A model and its budget."""

    model: ModelConfig
    """With R as its target."""
    tokens: float
    notes: tuple[str, ...] = ()
    """What to know of the choice."""
    tried: int = 0
    """Shapes that were compared."""


@dataclass(frozen=True)
class _Point:
    """A shape at a ratio, with what the budget pays for."""

    loss: float
    size: float
    """N that was asked for; the shape's own is within 10 % of it."""
    share: float
    ratio: float
    tokens: float
    model: ModelConfig


@dataclass
class _Search:
    """Shapes by (N, P), each made once, and what the law says of them."""

    like: ModelConfig
    law: FittedLaw
    allowed: float
    flops: float
    document_tokens: float
    shapes: dict[tuple[float, float], ModelConfig | None] = field(default_factory=dict)

    def shape(self, size: float, share: float) -> ModelConfig | None:
        """None where there is none of this size."""
        key = size, share
        if key not in self.shapes:
            try:
                self.shapes[key] = model_of_size(size, share, self.like)
            except ConfigError:
                self.shapes[key] = None
        return self.shapes[key]

    def points(self, sizes: Sequence[float], shares: Sequence[float], ratios: Sequence[float], allowed: float
               ) -> Iterator[_Point]:
        """Those that lie no further outside of what the law has seen than `allowed`."""
        for size in sizes:
            for share in shares:
                model = self.shape(size, share)
                if model is None:
                    continue
                weights = matrix_parameters(model)
                N, P = float(weights.non_embedding), weights.backbone_share
                for ratio in ratios:
                    D = self.flops / training_flops_per_token(model, self.document_tokens, 1 / ratio)
                    if max(self.law.factors(N, D, ratio, P).values()) <= allowed * SLACK:
                        yield _Point(self.law.law.loss(N, D, ratio, P), size, share, ratio, D, model)

    def outside(self, point: _Point) -> float:
        """The largest factor by which a point lies outside of what the law has seen."""
        weights = matrix_parameters(point.model)
        return max(self.law.factors(weights.non_embedding, point.tokens, point.ratio, weights.backbone_share).values())

    def best(self, sizes: Sequence[float], shares: Sequence[float], ratios: Sequence[float]) -> _Point | None:
        return min(self.points(sizes, shares, ratios, self.allowed), default=None,
                   key=lambda one: (one.loss, one.size, one.share, one.ratio))


def by_law(flops: float, like: ModelConfig, law: FittedLaw, document_tokens: float, *, extrapolation: float | None,
           size: float | None = None, share: float | None = None, ratio: float | None = None) -> Choice:
    """The least predicted loss for so many training FLOPs. size, share, ratio: N, P, R where they are given.

    ConfigError: everything that the budget pays for lies further outside of what the law has seen than it allows.
    """
    allowed = law.extrapolation if extrapolation is None else extrapolation
    search = _Search(like, law, allowed, flops, document_tokens)
    seen = law.seen
    sizes = [size] if size else _powers(seen["N"].low / allowed, seen["N"].high * allowed, COARSE)
    shares = [share] if share else _tenths(max(LEAST_SHARE, seen["P"].low), min(MOST_SHARE, seen["P"].high))
    ratios = [ratio] if ratio else _ratios(seen["R"].low, seen["R"].high, like)
    best = search.best(sizes, shares, ratios[:: max(1, len(ratios) // 8)])
    best = best or _least_outside(search, shares, ratios, size)
    for parts in (4, 8, 12):
        near = [size] if size else [best.size * COARSE ** (step / parts) for step in range(-4, 5)]
        found = search.best(near, _beside(best.share, shares), ratios)
        assert found is not None  # the best so far is among them
        best = found
    notes = [*_edges(search, best, sizes, shares, ratios), *_ends(best, shares, ratios)]
    model = replace(best.model, boundary=replace(like.boundary, target_ratio=best.ratio))
    return Choice(model, best.tokens, tuple(notes), sum(one is not None for one in search.shapes.values()))


def by_convention(like: ModelConfig, document_tokens: float, *, flops: float | None, size: float | None,
                  tokens: float | None, tokens_per_parameter: float, share: float | None, ratio: float | None
                  ) -> Choice:
    """Of size N, or of the size that spends the FLOPs on so many tokens a parameter. share, ratio: P and R, `like`'s
    where they are not given. ConfigError: no such shape."""
    if ratio is not None:
        like = replace(like, boundary=replace(like.boundary, target_ratio=ratio))
    if size is None:
        assert flops is not None
        model, notes = _of_budget(flops, like, document_tokens, tokens_per_parameter, share)
    else:
        model, notes = _near(size, share, like), ()
    if tokens is None:
        tokens = (flops / training_flops_per_token(model, document_tokens) if flops is not None else
                  tokens_per_parameter * matrix_parameters(model).non_embedding)
    return Choice(model, tokens, notes, 1)


def _near(size: float, share: float | None, like: ModelConfig) -> ModelConfig:
    """Of this size, and of this P; where none was given, of the P nearest to `like`'s that the size has."""
    if share is not None:
        return model_of_size(size, share, like)
    wanted = matrix_parameters(like).backbone_share
    refusal: ConfigError | None = None
    for step in range(10):
        for one in (wanted - 0.1 * step, wanted + 0.1 * step):
            try:
                return model_of_size(size, min(0.95, max(0.05, one)), like)
            except ConfigError as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _of_budget(flops: float, like: ModelConfig, document_tokens: float, tokens_per_parameter: float,
               share: float | None) -> tuple[ModelConfig, tuple[str, ...]]:
    """The shape whose tokens a parameter are nearest to the wished ones: from the largest that can be downwards, and
    then around. Where all are too large, the smallest. ConfigError: none at all."""
    wanted = share if share is not None else matrix_parameters(like).backbone_share

    def miss(model: ModelConfig) -> float:
        """Logarithm of the tokens a parameter over the wished; rises as models shrink."""
        tokens = flops / training_flops_per_token(model, document_tokens)
        return math.log(tokens / matrix_parameters(model).non_embedding / tokens_per_parameter)

    def shapes(sizes: Iterable[float]) -> Iterator[tuple[float, float]]:
        for size in sizes:
            try:
                yield miss(model_of_size(size, wanted, like)), size
            except ConfigError:
                continue

    # With neither head nor attention maps, a token costs 6 N (1 - P + P / R): no model is larger than that.
    most = math.sqrt(flops / (6 * tokens_per_parameter * (1 - wanted + wanted / like.boundary.target_ratio)))
    best = next(shapes(1.2 * most * COARSE**step for step in range(60)), None)
    if best is None:
        raise ConfigError(f"{flops:.3g} FLOPs: there is no shape of P = {wanted:.3f} for them; give another "
                          "--backbone-share, or another --like")
    for found in shapes(1.2 * most / COARSE**step for step in range(24)):
        best = min(best, found, key=lambda one: abs(one[0]))
        if found[0] > 0:
            break
    off, size = min([best, *shapes(best[1] * 1.03**step for step in range(-7, 8))], key=lambda one: abs(one[0]))
    notes = [] if abs(off) <= math.log(FAR_TOKENS) else [
        f"{tokens_per_parameter * math.exp(off):.3g} tokens a parameter, not {tokens_per_parameter:g}: no shape of "
        "this kind has a size for that; another --like, such as smoke, may be smaller"]
    return model_of_size(size, wanted, like), tuple(notes)


def _least_outside(search: _Search, shares: Sequence[float], ratios: Sequence[float], size: float | None) -> _Point:
    """The point that lies least far outside of what the law has seen. ConfigError: further than allowed; it is the
    law's own refusal, which names the factor to ask for."""

    seen = search.law.seen["N"]
    sizes = [size] if size else _powers(seen.low / FARTHEST, seen.high * FARTHEST, 1.5)
    few = ratios[:: max(1, len(ratios) // 4)]
    nearest = min(search.points(sizes, shares, few, math.inf), key=search.outside, default=None)
    if nearest is None:
        if size is not None:
            model_of_size(size, shares[len(shares) // 2], search.like)  # says why there is none
        raise ConfigError(f"no shape has a size that the law allows ({seen.low:.3g} to {seen.high:.3g} parameters, "
                          f"times {search.allowed:g}); take the shape of another model with --like")
    around = [size] if size else [nearest.size * 1.05**step for step in range(-8, 9)]
    nearest = min(search.points(around, _beside(nearest.share, shares), ratios, math.inf),
                  key=search.outside)
    weights = matrix_parameters(nearest.model)
    search.law.predict(weights.non_embedding, nearest.tokens, nearest.ratio, weights.backbone_share,
                       extrapolation=search.allowed)
    return nearest


def _beside(share: float, shares: Sequence[float]) -> list[float]:
    """A share and its neighbours half a step away, within what is searched."""
    return [one for one in (share - 0.05, share, share + 0.05)
            if one == share or shares[0] - 1e-9 <= one <= shares[-1] + 1e-9]


def _edges(search: _Search, best: _Point, sizes: Sequence[float], shares: Sequence[float], ratios: Sequence[float]
           ) -> Iterator[str]:
    """Whether something near that the law does not allow would be better."""
    near = sizes if len(sizes) == 1 else [best.size / COARSE, best.size, best.size * COARSE]
    some = {*ratios[:: max(1, len(ratios) // 8)], best.ratio}
    better = min((point for point in search.points(near, _beside(best.share, shares), sorted(some), math.inf)
                  if search.outside(point) > search.allowed * SLACK), default=best, key=lambda one: one.loss)
    if better.loss < best.loss * (1 - FLAT):
        yield (f"{search.allowed:g} times outside of what the law has seen is an edge here: {better.size:.3g} "
               f"parameters, P = {better.share:.2f} and R = {better.ratio:g} on {better.tokens:.3g} tokens lie beyond "
               "it, and would be predicted to be better; add a rung nearer to them, or ask for more --extrapolation")


def _ends(best: _Point, shares: Sequence[float], ratios: Sequence[float]) -> Iterator[str]:
    """Whether the best lies at an end of what was searched."""
    for name, value, searched in (("P", best.share, shares), ("R", best.ratio, ratios)):
        if len(searched) > 1 and (value <= searched[0] + 1e-9 or value >= searched[-1] - 1e-9):
            end = "least" if value <= searched[0] + 1e-9 else "largest"
            yield (f"{name} = {value:g} is the {end} that was searched ({searched[0]:g} to {searched[-1]:g}): a bound, "
                   "the best may lie beyond")


def _powers(low: float, high: float, factor: float) -> list[float]:
    """From low to high, by at most the factor, both included."""
    steps = max(1, math.ceil(math.log(high / low) / math.log(factor) - 1e-9))
    return [low * (high / low) ** (step / steps) for step in range(steps + 1)]


def _tenths(low: float, high: float) -> list[float]:
    """From low to high in steps of about 0.1; one value where that is all there is."""
    if high - low < 0.01:
        return [(low + high) / 2]
    steps = max(1, round((high - low) / 0.1))
    return [low + (high - low) * step / steps for step in range(steps + 1)]


def _ratios(low: float, high: float, like: ModelConfig) -> list[float]:
    """Quarters from low to high, or coarser; whole numbers for boundaries at fixed places. Realised R lie a little off
    their targets, so the ends are rounded."""
    step = 1.0 if like.boundary.form == "fixed" else 0.25
    while (high - low) / step >= MOST_RATIOS:
        step *= 2
    least, most = round(low / step), round(high / step)
    return [step * count for count in range(max(1, least), max(1, least, most) + 1) if step * count > 1] or [2.0]


def predicted(model: ModelConfig, tokens: float, law: FittedLaw, extrapolation: float | None) -> Prediction:
    """Of a model at its target R. ConfigError: too far outside of what the law has seen."""
    weights = matrix_parameters(model)
    ratio = model.boundary.target_ratio if model.kind == "dlcm" else 1.0
    return law.predict(weights.non_embedding, tokens, ratio, weights.backbone_share, extrapolation=extrapolation)
