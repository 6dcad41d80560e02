"""What muP promises of coordinates and of the optimizer, and whether it is so.

Where a width grows, muP keeps the size of what every module gives, and how far a step moves it, as they are; and so the
part of the move that a module's own weights make. A slope is that of log size, move or own move over log width, of all
modules of a role together. Promised is 0, but for

    logits at first          -1/2 of D: embedding and unembedding have one deviation at every width, and 1 / s_token
    bridges at first         the square root of min(1, s_out / s_in), by their initialisation; it is divided out

A step moves what these give in two ways: by moving their weights, by as much at every width; and by moving what they
read, which their first weights hand on in those same proportions. So the slope of their moves may lie anywhere between.

The own move of a matrix is the sum, over the width that it reads, of as many changes of size 1 / width. Where they are
aligned with what is read, as gradients of these very rows are, that is 0; where they are not, their signs cancel as
those of random numbers do, -1/2. In the first steps it lies between.

A rule that is left out or doubled moves a slope by a half or by one. So a band of a quarter on both sides tells them
apart, and leaves room for what widths of a few dozen still lack of the limit.

What activations cannot show is read off the optimizer itself: decays act over thousands of steps, epsilons where
gradients are small, rates of norms are drowned by what norms are given. Learning rate, decay and epsilon of each role
are powers of the axis, by the table of model/mup.py written down here once more; their slopes have to be exact.

Along depth, with exponent a (0 where there is none), what is promised is that of blocks and of the streams that they
stand on; slopes of the rest are shown only. What a block's last matrices give is taken before depth scales it.

    own moves in blocks      a - 1, as their rates; 0 where a is 0
    size of a stream         1/2 - a, for branches begin independent; nearer to 0 where embeddings are large
    move of a stream         0 where branches move the same way, -1/2 where they move independently; without a rule up
                             to 1, which nobody promises

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.training.mup_check.sizes import Axis, Size

BAND = 0.25
EXACT = 1e-6
LEAST = 1e-12
"""Smaller moves are none."""
MEASURED = ("size", "own", "move")
QUANTITIES = (*MEASURED, "learning_rate", "weight_decay", "epsilon")
TOKEN_SIDE = ("token", "norm_token", "stream_token")
CONCEPT_SIDE = ("concept", "norm_concept", "stream_concept")
READS_CONCEPT = ("concept", "concept_to_token", "norm_concept")
VECTORS = ("embedding", "unembedding", "norm_token", "norm_concept")
"""Roles of one rate at every width."""
ONE_NUMBER = ("embedding", "norm_token", "norm_concept")
"""Roles whose every output has one parameter to itself."""
WITHOUT_DECAY = ("norm_token", "norm_concept", "boundary")


@dataclass(frozen=True)
class Seen:
    """What a run of one size has shown."""

    size: Size
    coordinates: Sequence[Mapping[str, Any]]
    """Of the probe: module, role, step, size, move."""
    groups: Sequence[Mapping[str, Any]]
    """Of the optimizer: role, learning_rate, weight_decay, epsilon."""


@dataclass(frozen=True)
class Line:
    """A quantity of a role along an axis."""

    axis: Axis
    role: str
    quantity: str
    values: tuple[float, ...]
    """At each size, divided by what is promised of it; moves are those of the last look."""
    slope: float
    promised: tuple[float, float] | None
    """The slope, or what it lies between. None: nothing is promised, and the slope is only shown."""
    band: float
    """Below the one and above the other."""

    @property
    def good(self) -> bool:
        if self.promised is None:
            return True
        low, high = self.promised
        return low - self.band <= self.slope <= high + self.band


def judge(axis: Axis, seen: Sequence[Seen]) -> list[Line]:
    """seen: the sizes of the axis, smallest first."""
    found = [*_coordinates(axis, seen), *_optimizer(axis, seen)]
    order = {name: place for place, name in enumerate(QUANTITIES)}
    return sorted(found, key=lambda line: order[line.quantity])


def _coordinates(axis: Axis, seen: Sequence[Seen]) -> Iterable[Line]:
    roles = list(dict.fromkeys(one["role"] for one in seen[0].coordinates))
    for role in roles:
        model = seen[0].size.model
        sizes = [_mean(one.coordinates, role, 0, "size") / bridge_share(role, one.size.model) for one in seen]
        yield _line(axis, role, "size", seen, sizes, promised_size(axis, role, model))
        last = max(one["step"] for one in seen[0].coordinates)
        moves = [_mean(one.coordinates, role, last, "move") for one in seen]
        yield _line(axis, role, "move", seen, moves, promised_move(axis, role, [one.size for one in seen]))
        if not role.startswith("stream"):
            own = [_mean(one.coordinates, role, last, "own") for one in seen]
            yield _line(axis, role, "own", seen, own, promised_own(axis, role, model))


def _optimizer(axis: Axis, seen: Sequence[Seen]) -> Iterable[Line]:
    for group in seen[0].groups:
        role = group["role"]
        for quantity in ("learning_rate", "weight_decay", "epsilon"):
            values = [next(one[quantity] for one in each.groups if one["role"] == role) for each in seen]
            if any(values):
                power = promised_power(axis, role, quantity, seen[0].size.model)
                yield _line(axis, role, quantity, seen, values, (power, power), EXACT)  # nan: there should be none


def _line(axis: Axis, role: str, quantity: str, seen: Sequence[Seen], values: Sequence[float],
          promised: tuple[float, float] | None, band: float = BAND) -> Line:
    return Line(axis, role, quantity, tuple(values), slope([one.size.value for one in seen], values), promised, band)


def _mean(coordinates: Iterable[Mapping[str, Any]], role: str, step: int, quantity: str) -> float:
    """Geometric, over the modules of a role."""
    logs = [math.log(max(one[quantity], LEAST)) for one in coordinates if one["role"] == role and one["step"] == step]
    return math.exp(sum(logs) / len(logs))


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of the least squares line through the logarithms; not a number where a value is not finite or not above 0."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        return math.nan
    x, y = [math.log(one) for one in sizes], [math.log(one) for one in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - middle_x) ** 2 for one in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread


def bridge_share(role: str, model: ModelConfig) -> float:
    """What the initialisation of a bridge leaves of a size of one."""
    into = {"token_to_concept": model.d_concept / model.d_token, "concept_to_token": model.d_token / model.d_concept}
    return min(1.0, into.get(role, 1.0)) ** 0.5


def promised_size(axis: Axis, role: str, model: ModelConfig) -> tuple[float, float] | None:
    """Ends of what is promised of the slope, here and below."""
    if axis == "depth":
        power = 0.5 - model.mup.depth_exponent
        return (min(0.0, power), max(0.0, power)) if role.startswith("stream") else None
    if role.startswith("stream"):  # it begins with what it is given, which is no part of it
        return None
    power = -0.5 if axis == "token" and role == "unembedding" else 0.0
    return power, power


def promised_move(axis: Axis, role: str, sizes: Sequence[Size]) -> tuple[float, float] | None:
    if axis == "depth":
        return (-0.5, 0.0) if sizes[0].model.mup.depth_exponent and role.startswith("stream") else None
    handed_on = slope([one.value for one in sizes], [bridge_share(role, one.model) for one in sizes])
    if axis == "token" and role == "unembedding":
        handed_on = -0.5
    return min(0.0, handed_on), max(0.0, handed_on)


def promised_own(axis: Axis, role: str, model: ModelConfig) -> tuple[float, float] | None:
    if axis != "depth":
        return (-0.5 if reads(role) == axis and role not in ONE_NUMBER else 0.0), 0.0
    if role not in (*TOKEN_SIDE, *CONCEPT_SIDE):
        return None
    power = promised_power(axis, role, "learning_rate", model)
    return power, power


def reads(role: str) -> Axis:
    """The width that a role's parameters are multiplied with."""
    return "concept" if role in READS_CONCEPT else "token"


def promised_power(axis: Axis, role: str, quantity: str, model: ModelConfig) -> float:
    """Exponent of the axis in a number of the optimizer; nan: the number is to be 0."""
    if quantity == "weight_decay" and role in WITHOUT_DECAY:
        return math.nan
    if axis == "depth":
        exponent = model.mup.depth_exponent
        if not exponent or role not in (*TOKEN_SIDE, *CONCEPT_SIDE):
            return 0.0
        return {"learning_rate": exponent - 1, "weight_decay": 1 - exponent, "epsilon": -exponent}[quantity]
    if reads(role) != axis:
        return 0.0
    if quantity == "epsilon":
        return -1.0
    if role in VECTORS:
        return 0.0
    return -1.0 if quantity == "learning_rate" else 1.0
