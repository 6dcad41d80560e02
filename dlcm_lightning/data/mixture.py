"""Which row of which source is sample i: pure functions of (seed, sources, i).

The global sequence of samples is cut into blocks. In a block every source gets its exact share: weight x block_rows,
rounded by the largest remainder, hence never more than a row off. A keyed permutation of the block's positions decides
where its rows stand. Numbering the rows of a source through the run gives each its *ordinal*; ordinals run through the
source epoch after epoch, each in an order of its own (order.py).

Shares hold for a *stretch* of blocks. A new stretch begins where the configuration changes the weights at a token
count, rounded up to a block, and where a source has been read as many times as it may: from the block that it could
not fill, its weight goes to the others in proportion. All of that is known before the first step and follows from the
configuration, so resuming needs one integer.

Weights are fractions of whole numbers, as they are written (0.1 is 1/10), so that no rounding of a sum decides a share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dlcm_lightning.data.order import BLOCK, Order, key, permute
from dlcm_lightning.errors import DataError

KEPT_BLOCKS = 4


@dataclass(frozen=True)
class Drawn:
    """Where samples come from; three arrays (n,) int64, one entry per sample."""

    sources: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray


@dataclass(frozen=True)
class Stretch:
    """Blocks in which every source has the same share."""

    first_block: int
    shares: tuple[int, ...]
    """Rows of each source in a block."""
    begins: tuple[int, ...]
    """Rows each source has given before."""


def shares(weights: Sequence[Fraction], block_rows: int) -> tuple[int, ...]:
    """Rows of each source in a block: largest remainder, ties to the earlier source. They sum to block_rows."""
    exact = [weight / sum(weights) * block_rows for weight in weights]
    rows = [int(one) for one in exact]
    short = sorted(range(len(rows)), key=lambda source: rows[source] - exact[source])[:block_rows - sum(rows)]
    return tuple(count + (source in short) for source, count in enumerate(rows))


@dataclass(frozen=True)
class Part:
    """One source as the mixture sees it."""

    name: str
    weight: float
    order: Order
    max_epochs: float = 0
    """Times its rows may be read; 0 for no limit."""


class Mixture:
    """The order of all samples of a run."""

    def __init__(self, seed: int, parts: Sequence[Part], block_rows: int,
                 changes: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        """changes: (sample, weights by name) in order; sources that are not named get none.

        A source's order depends on its name, not on its place in the list. DataError: a source without rows, a
        weight too small for a block.
        """
        self.seed, self.parts, self.block_rows = seed, list(parts), block_rows
        self.names = [part.name for part in parts]
        for part in parts:
            if part.order.rows < 1:
                raise DataError(f"source {part.name!r}: no full row; lower data.row_tokens or leave the source out")
        self.stretches: list[Stretch] = []
        self.blocks: int | None = None
        """Blocks until every source is used up; None where that never happens."""
        planned = [(0, {part.name: part.weight for part in parts}), *changes]
        for number, (sample, weights) in enumerate(planned):
            until = -(-planned[number + 1][0] // block_rows) if number + 1 < len(planned) else None
            self._plan(-(-sample // block_rows), until, self._fractions(weights))
        self._drawn: OrderedDict[int, Drawn] = OrderedDict()

    def _fractions(self, weights: Mapping[str, float]) -> list[Fraction]:
        exact = [Fraction(repr(float(weights.get(name, 0)))) for name in self.names]
        for name, weight, share in zip(self.names, exact, shares(exact, self.block_rows), strict=True):
            if weight and not share:
                raise DataError(f"source {name!r}: weight {float(weight)} gives no row in a block of "
                                f"{self.block_rows}; raise data.block_rows or leave the source out")
        return exact

    def _plan(self, block: int, until: int | None, weights: list[Fraction]) -> None:
        """Appends the stretches of [block, until), a new one wherever a source has been used up."""
        while self.blocks is None and (until is None or block < until):
            if not any(weights):
                self.blocks = block
                return
            stretch = Stretch(block, shares(weights, self.block_rows), tuple(self._given_before(block)))
            lasting = [self._blocks_left(stretch, source) for source in range(len(self.parts))]
            left = min((blocks for blocks in lasting if blocks is not None), default=None)
            weights = [Fraction(0) if blocks is not None and blocks == left else weight
                       for weight, blocks in zip(weights, lasting, strict=True)]
            if left != 0:
                self.stretches.append(stretch)
            if left is None:
                return
            block += left

    def _blocks_left(self, stretch: Stretch, source: int) -> int | None:
        """Whole blocks the stretch could last before a source would be read more often than it may."""
        part = self.parts[source]
        if not part.max_epochs or not stretch.shares[source]:
            return None
        rows = int(Fraction(repr(float(part.max_epochs))) * part.order.rows) - stretch.begins[source]
        return rows // stretch.shares[source]

    def stretch(self, block: int) -> Stretch:
        """The stretch a block lies in. DataError: every source has been used up before."""
        if self.blocks is not None and block >= self.blocks:
            raise DataError(f"every source has been read max_epochs times after {self.blocks * self.block_rows} rows; "
                            "raise data.sources[].max_epochs or lower optim.total_tokens")
        return self.stretches[bisect_right(self._starts, block) - 1]

    def shares(self, block: int) -> tuple[int, ...]:
        """Rows of each source in a block; they sum to block_rows."""
        return self.stretch(block).shares

    def given(self, samples: int) -> list[int]:
        """Rows of each source among the first `samples` samples."""
        block, rest = divmod(samples, self.block_rows)
        whole = self._given_before(block)
        if not rest:
            return whole
        inside = np.bincount(self._block(block).sources[:rest], minlength=len(self.parts)).tolist()
        return [before + some for before, some in zip(whole, inside, strict=True)]

    def _given_before(self, block: int) -> list[int]:
        """Rows of each source in the blocks before `block`, which may be the end of the last stretch."""
        if block == 0:
            return [0] * len(self.parts)
        stretch = self.stretches[bisect_right(self._starts, block - 1) - 1]
        return [begin + (block - stretch.first_block) * share
                for begin, share in zip(stretch.begins, stretch.shares, strict=True)]

    @property
    def _starts(self) -> list[int]:
        return [stretch.first_block for stretch in self.stretches]

    def draw(self, samples: np.ndarray) -> Drawn:
        """samples: (n,) int64 global indices >= 0, in any order. The same cost at any index."""
        samples = np.asarray(samples, dtype=np.int64)
        blocks, positions = np.divmod(samples, self.block_rows)
        numbers = np.unique(blocks).tolist()
        if len(numbers) == 1:
            block = self._block(numbers[0])
            return Drawn(block.sources[positions], block.rows[positions], block.epochs[positions])
        found = np.empty((3, len(samples)), dtype=np.int64)
        for number in numbers:
            chosen, block = blocks == number, self._block(number)
            found[:, chosen] = np.stack([block.sources, block.rows, block.epochs])[:, positions[chosen]]
        return Drawn(*found)

    def _block(self, number: int) -> Drawn:
        """All samples of a block; drawn once for all steps that read from it."""
        if number not in self._drawn:
            self._drawn[number] = self._draw_block(number)
            while len(self._drawn) > KEPT_BLOCKS:
                self._drawn.popitem(last=False)
        return self._drawn[number]

    def _draw_block(self, number: int) -> Drawn:
        stretch = self.stretch(number)
        ends = np.cumsum(stretch.shares)
        slots = permute(np.arange(self.block_rows), self.block_rows, key(self.seed, BLOCK, number))
        sources = np.searchsorted(ends, slots, side="right")
        ordinals = slots + (np.array(self._given_before(number)) - ends + stretch.shares)[sources]
        epochs, places = np.divmod(ordinals, np.array([part.order.rows for part in self.parts])[sources])
        rows = np.empty_like(places)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            chosen = (sources == source) & (epochs == epoch)
            rows[chosen] = self.parts[source].order.draw(epoch, places[chosen])
        return Drawn(sources, rows, epochs)
