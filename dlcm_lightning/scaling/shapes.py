"""A model of a wanted size: widths and layers from a number of parameters and the shape of a model that is known.

Whatever is no shape is that of the known model, `like`: vocabulary, boundary, muP, width of a head. So are the ratios
within a stack: FFN / width, heads / width, key-value heads / heads. muP carries learning rates across widths, and only
across models that differ in nothing else. A stack is therefore `like`'s, divided by the greatest number that divides
its width, heads, key-value heads and FFN alike, times a whole number of such *units*. dlcm_2b has units of 128.

With i and j units in the token stacks and the backbone, T and B layers,

    N = T t i^2 + B c j^2 + u i^2 + v i j          P = B c j^2 / (T t i^2 + B c j^2)

where t and c are the parameters of a layer one unit wide, u and v what connects the stacks. N and P fix T and B for any
i and j; what is left is a wish, and the shape nearest to it is taken among those that meet N within 3 % and P within
0.02:

- E / D is that of `like`; a factor of 1.5 costs as much as a factor of 1.5 in depth;
- encoder and decoder share their layers as `like`'s do;
- T + B grows with width. Least squares over the logarithms of dlcm_{87m,274m,468m,833m,2b} (13, 18, 23, 24 and 32
  layers at D = 512, 768, 896, 1152 and 1536) give layers ~ D^0.80, here through `like`'s own depth. But for the largest
  these are shapes of ours: a convention, not a measurement.

`like`'s own N and P give `like` back. Where no shape is that near, the nearest within 10 % and 0.05 is taken: small
models have few layers, and no widths below one unit. Neither wish is missed by more than a factor of 3.

Axes: N non-embedding parameters, P the backbone's share of the three stacks, D token width, E concept width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from dlcm_lightning.config import ConfigError, ModelConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token

GROWTH = 0.8
"""Layers grow with width to this power."""
CLOSE_SIZE, CLOSE_SHARE, CLOSE_FLOPS = 0.03, 0.02, 0.02
"""Of N and of FLOPs relative, of P absolute: what is met where some shape meets it."""
FAR_SIZE, FAR_SHARE = 0.10, 0.05
"""Beyond which no shape is returned."""
EASY_FACTOR = 1.5
"""By which depth, or E / D, may leave the wish at a cost of one."""
MOST_FACTOR = 3.0
"""By which either may leave it at all."""
ROUNDING = 1e-9
WIDTHS = 48
"""Token widths that are tried on either side of the one that the wish asks for."""


@dataclass(frozen=True)
class Stack:
    """One unit of a stack: the smallest one with `like`'s ratios."""

    width: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int

    @property
    def layer(self) -> int:
        """Parameters of a layer; n units have n^2 times as many."""
        return 2 * self.width * (self.heads + self.kv_heads) * self.head_dim + 3 * self.width * self.ffn


def stack_of(width: int, heads: int, kv_heads: int, ffn: int, head_dim: int) -> Stack:
    """The unit of a stack."""
    units = math.gcd(width, heads, kv_heads, ffn)
    return Stack(width // units, heads // units, kv_heads // units, ffn // units, head_dim)


def depth(width: int, like: ModelConfig) -> float:
    """Layers of all stacks together that the wish has at a token width D."""
    layers = like.decoder_layers if like.kind == "dense" else (
        like.encoder_layers + like.backbone_layers + like.decoder_layers)
    return layers * (width / like.d_token) ** GROWTH


def model_of_size(parameters: float, backbone_share: float, like: ModelConfig) -> ModelConfig:
    """A DLCM with N `parameters` outside the embeddings, of which P = `backbone_share` of the stacks is the backbone.

    ConfigError: `like` is no DLCM; no number of parameters or no share; no shape within 10 % of N and 0.05 of P.
    """
    _require_positive("parameters", parameters)
    if not 0 < backbone_share < 1:
        raise ConfigError(f"backbone_share = {backbone_share!r}: a share lies between 0 and 1, such as 0.7")
    if like.kind != "dlcm":
        raise ConfigError(f"model.kind = {like.kind!r}: has no backbone; take the shape of a DLCM, such as dlcm_2b")
    lattice = _lattice(like)
    best: _Shape | None = None
    for token in _token_units(parameters, backbone_share, lattice):
        for concept in _outward(max(1, round(lattice.ratio * token))):
            strained = abs(math.log(concept / (lattice.ratio * token)))
            if strained > math.log(MOST_FACTOR) + ROUNDING:
                break
            if best is not None and best.close and (strained / math.log(EASY_FACTOR)) ** 2 > best.strain:
                break
            for shape in lattice.shapes(token, concept, parameters, backbone_share):
                if best is None or shape.rank < best.rank:
                    best = shape
    if best is None or best.miss > 1:
        raise ConfigError(_refusal(parameters, backbone_share, lattice, best))
    return lattice.model(best)


def dense_of_size(parameters: float, like: ModelConfig) -> ModelConfig:
    """A dense model with N `parameters` outside the embeddings; of a DLCM's shape, it takes that of the token stacks.

    ConfigError: no number of parameters, or no shape within 10 % of them.
    """
    _require_positive("parameters", parameters)
    return _dense(parameters, like, CLOSE_SIZE, "parameters",
                  lambda model: float(matrix_parameters(model).non_embedding))


def dense_of_flops(flops_per_token: float, like: ModelConfig, document_tokens: float) -> ModelConfig:
    """A dense model whose training costs so many FLOPs a token, in documents of `document_tokens` tokens; otherwise as
    `dense_of_size`. ConfigError: no shape within 10 % of them."""
    _require_positive("flops_per_token", flops_per_token)
    return _dense(flops_per_token, like, CLOSE_FLOPS, "flops_per_token",
                  lambda model: training_flops_per_token(model, document_tokens))


@dataclass(frozen=True)
class _Shape:
    """Units and layers that were tried."""

    token: int
    concept: int
    encoder_layers: int
    backbone_layers: int
    decoder_layers: int
    size: int
    """N."""
    share: float
    """P."""
    close: bool
    """Whether N and P are met within the near bounds."""
    miss: float
    """N's or P's distance, the larger one, in units of the far bounds."""
    strain: float
    """Distance from the wish, squared."""

    @property
    def rank(self) -> tuple[float, ...]:
        """Least for the shape that is taken. Whole numbers at the end, so that no two are equal."""
        first = (0.0, self.strain, self.miss) if self.close else (1.0, self.miss, self.strain)
        return *first, self.token, self.concept, self.backbone_layers


@dataclass(frozen=True)
class _Lattice:
    """Every shape that has the ratios of `like`."""

    like: ModelConfig
    token: Stack
    concept: Stack
    ratio: float
    """Units of the backbone for one of the token stacks, in `like`."""
    squares: int
    """u: boundary, W_Q and W_O of the cross-attention."""
    products: int
    """v: W_up, W_K and W_V of the cross-attention."""

    def shapes(self, token: int, concept: int, parameters: float, share: float) -> Iterator[_Shape]:
        """At these widths, with the numbers of layers around those that N and P ask for."""
        token_layer, concept_layer = self.token.layer * token**2, self.concept.layer * concept**2
        connections = self.squares * token**2 + self.products * token * concept
        body = max(0.0, parameters - connections)
        wish = max(3.0, depth(token * self.token.width, self.like))
        stretched = (math.log(concept / (self.ratio * token)) / math.log(EASY_FACTOR)) ** 2
        encoder_share = self.like.encoder_layers / (self.like.encoder_layers + self.like.decoder_layers)
        for layers in _around((1 - share) * body / token_layer, 2):
            for backbone in _around(share * body / concept_layer, 1):
                stacks = layers * token_layer + backbone * concept_layer
                off_size = abs((stacks + connections) / parameters - 1)
                off_share = abs(backbone * concept_layer / stacks - share)
                encoder = min(layers - 1, max(1, round(encoder_share * layers)))
                if not 1 / MOST_FACTOR <= (layers + backbone) / wish <= MOST_FACTOR:
                    continue
                deep = (math.log((layers + backbone) / wish) / math.log(EASY_FACTOR)) ** 2
                yield _Shape(token, concept, encoder, backbone, layers - encoder, stacks + connections,
                             backbone * concept_layer / stacks, off_size <= CLOSE_SIZE and off_share <= CLOSE_SHARE,
                             max(off_size / FAR_SIZE, off_share / FAR_SHARE),
                             stretched + deep + (encoder / layers - encoder_share) ** 2)

    def model(self, shape: _Shape) -> ModelConfig:
        token, concept = shape.token, shape.concept
        return replace(
            self.like, d_token=token * self.token.width, d_concept=concept * self.concept.width,
            encoder_layers=shape.encoder_layers, backbone_layers=shape.backbone_layers,
            decoder_layers=shape.decoder_layers, heads_token=token * self.token.heads,
            kv_heads_token=token * self.token.kv_heads, heads_concept=concept * self.concept.heads,
            kv_heads_concept=concept * self.concept.kv_heads, ffn_token=token * self.token.ffn,
            ffn_concept=concept * self.concept.ffn)


def _lattice(like: ModelConfig) -> _Lattice:
    token = _token_stack(like)
    concept = stack_of(like.d_concept, like.heads_concept, like.kv_heads_concept, like.ffn_concept, like.head_dim)
    boundary = 2 * token.width**2 if like.boundary.learned else 0
    return _Lattice(
        like, token, concept, ratio=like.d_concept / concept.width / (like.d_token / token.width),
        squares=boundary + 2 * token.width * token.heads * token.head_dim,
        products=concept.width * (token.width + 2 * token.kv_heads * token.head_dim))


def _token_stack(like: ModelConfig) -> Stack:
    return stack_of(like.d_token, like.heads_token, like.kv_heads_token, like.ffn_token, like.head_dim)


def _token_units(parameters: float, share: float, lattice: _Lattice) -> Iterator[int]:
    """Units of the token stacks, from those outward that have the wished depth at the wished E / D."""
    like, unit = lattice.like, lattice.token
    layers_per_body = (1 - share) / unit.layer + share / (lattice.concept.layer * lattice.ratio**2)
    # layers = N / i^2 * layers_per_body, but for the connections, and layers ~ i^GROWTH
    wished = (parameters * layers_per_body / depth(unit.width, like)) ** (1 / (2 + GROWTH))
    stride = max(1, math.ceil(wished / WIDTHS))
    for units in _outward(max(1, round(wished)), stride):
        if units > max(2.0, 2 * wished):
            return
        if units >= wished / 2:
            yield units


def _outward(centre: int, stride: int = 1) -> Iterator[int]:
    """The centre and the whole numbers above zero around it, the nearest first, the larger first; without end."""
    yield centre
    offset = stride
    while True:
        yield centre + offset
        if centre - offset > 0:
            yield centre - offset
        offset += stride


def _around(wanted: float, least: int) -> Iterator[int]:
    """The whole numbers below and above, none below the least."""
    below = max(least, math.floor(wanted))
    yield below
    if wanted > below:
        yield below + 1


def _dense(wanted: float, like: ModelConfig, close: float, name: str, measure: Callable[[ModelConfig], float]
           ) -> ModelConfig:
    """The dense model of `like`'s ratios that measures as wanted, and is as deep as the wish has it.

    What is measured grows by the same amount with each layer, so that two depths say all about a width.
    """
    stack = _token_stack(like)

    def model(units: int, layers: int) -> ModelConfig:
        return replace(like, kind="dense", d_token=units * stack.width, heads_token=units * stack.heads,
                       kv_heads_token=units * stack.kv_heads, ffn_token=units * stack.ffn, encoder_layers=0,
                       backbone_layers=0, decoder_layers=layers)

    best: tuple[tuple[float, ...], int, int] | None = None
    for units in _dense_units(wanted, stack, like, lambda units: measure(model(units, 1))):
        one, two = measure(model(units, 1)), measure(model(units, 2))
        for layers in _around(1 + (wanted - one) / (two - one), 1):
            off = abs((one + (layers - 1) * (two - one)) / wanted - 1)
            strain = abs(math.log(layers / max(1.0, depth(units * stack.width, like))))
            if strain > math.log(MOST_FACTOR):
                continue
            rank = (0.0, strain, off, units) if off <= close else (1.0, off, strain, units)
            if best is None or rank < best[0]:
                best = rank, units, layers
    if best is not None and abs(measure(found := model(*best[1:])) / wanted - 1) <= FAR_SIZE:
        return found
    nearest = "" if best is None else f"ask for {measure(model(*best[1:])):.4g}, which is the nearest, or "
    vocabulary = ", or one with a smaller vocabulary" if name == "flops_per_token" else ""
    raise ConfigError(f"{name} = {wanted:.4g}: no dense model in steps of {stack.width} in width lies within "
                      f"{100 * FAR_SIZE:g} %; {nearest}take the shape of a model with a smaller head_dim than "
                      f"{like.head_dim}, which has finer steps{vocabulary}")


def _dense_units(wanted: float, stack: Stack, like: ModelConfig, shallowest: Callable[[int], float]) -> Iterator[int]:
    """Widths in units, from the narrowest that can be as deep as needed to the widest that one layer allows; at most
    some hundred of them."""
    most = 1
    while most < 2**20 and shallowest(2 * most) < 1.5 * wanted:
        most *= 2
    least = 1
    while least < most and depth(least * stack.width, like) * stack.layer * least**2 * 64 < wanted / 6:
        least += max(1, least // 16)
    units = max(1, least // 2)
    while units <= 2 * most:
        yield units
        units += max(1, units // 64)


def _refusal(parameters: float, share: float, lattice: _Lattice, best: _Shape | None) -> str:
    nearest = "" if best is None else f"ask for N = {best.size:,} and P = {best.share:.3f}, which is the nearest; or "
    return (f"parameters = {parameters:.4g}, backbone_share = {share:g}: no shape in steps of {lattice.token.width} "
            f"and {lattice.concept.width} in width lies within {100 * FAR_SIZE:g} % and {FAR_SHARE:g}; {nearest}take "
            f"the shape of a model with a smaller head_dim than {lattice.like.head_dim}, which has finer steps; or "
            "another backbone_share")


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} = {value!r}: give a number above zero, such as 2e9")
