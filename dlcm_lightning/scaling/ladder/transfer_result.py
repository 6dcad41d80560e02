"""What `dlcm ladder transfer` has found, as data."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from dlcm_lightning.scaling.ladder.descent import Descent
from dlcm_lightning.scaling.ladder.minimum import Minimum


@dataclass(frozen=True)
class Curve:
    """The loss of one width over factors of its rates."""

    sweep: str
    variant: str
    width: str
    times: float
    """Its width, as a multiple of the first one's."""
    N: int
    """Parameters outside the embeddings."""
    rates: dict[str, float]
    """Base rates at the factor 1, by field of `optim`."""
    factors: tuple[float, ...]
    losses: tuple[float | None, ...]
    """Validation nats a token, the mean over seeds; infinite where training diverged, None where it is not measured."""
    spreads: tuple[float | None, ...]
    """Standard deviation over seeds; None where there is one."""
    minimum: Minimum | None

    def alike(self, seeds: int) -> tuple[float, ...]:
        """Factors whose losses are no further above the least than two standard errors of a difference of means, the
        spread of seeds being that of all factors together; empty for one seed, of which nothing is known."""
        spreads = [spread for spread in self.spreads if spread is not None]
        losses = [loss for loss in self.losses if loss is not None]
        if seeds < 2 or not spreads or not losses:
            return ()
        error = math.sqrt(2 * statistics.fmean(spread**2 for spread in spreads) / seeds)
        return tuple(factor for factor, loss in zip(self.factors, self.losses, strict=True)
                     if loss is not None and loss <= min(losses) + 2 * error)


@dataclass(frozen=True)
class Verdict:
    """How far the best rates of a variant move."""

    sweep: str
    variant: str
    times: float
    """The last width over the first."""
    moves: tuple[float, ...]
    """Of the minimum, in grid steps from that of the first width, by width."""
    bound: bool
    """Whether a minimum lies at the edge of the factors, so that a move is a bound."""
    unclear: tuple[str, ...]
    """Widths whose seeds do not tell factors apart that lie more than two grid steps from one another, so that no move
    can be told."""
    cost: float | None
    """Nats that the best factor of the first width costs at the last one; None where training diverged there."""
    text: str


@dataclass(frozen=True)
class Result:
    """A report."""

    study: str
    seeds: int
    factor: float
    """Of the search."""
    grid_step: float
    """Ratio of neighbouring factors of the sweeps."""
    descent: Descent | None
    base_rates: dict[str, float]
    """With which the search began."""
    curves: tuple[Curve, ...]
    verdicts: tuple[Verdict, ...]
    missing: int
    """Points that are not measured."""

    @property
    def found_rates(self) -> dict[str, float]:
        """Where the search ended; empty where there was none."""
        if self.descent is None:
            return {}
        return {name: rate * self.factor ** self.descent.place.get(name, 0) for name, rate in self.base_rates.items()}
