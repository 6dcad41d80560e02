"""Which row of which source is sample i: pure functions of (seed, sources, i).

The global sequence of samples is cut into blocks. In a block every source gets its exact share: weight x block_rows,
rounded by the largest remainder, hence never more than a row off. A keyed permutation of the block's positions decides
where its rows stand. Numbering the rows of a source through the run gives each its *ordinal*; ordinals run through the
source epoch after epoch, each in an order of its own (order.py).

Shares hold for a *stretch* of blocks. A new stretch begins where the configuration changes the weights at a token
count, rounded up to a block, and where a source comes to the end of the times that it may be read. It is read to that
row: in the block that it cannot fill it gives what it has left, and the others share out the rest, and from there on
all of it, in proportion. Where every source ends, the last block is as short as it must be. All of that is known before
the first step and follows from the configuration, so resuming needs one integer.

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
    weights: tuple[Fraction, ...]
    """The shares before they were rounded to rows, as parts of one."""


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
    """Times its rows may be read, in whole rows and at least one; 0 for no limit."""


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
                raise DataError(f"source {part.name!r}: no full row; lower data.sequence_length or leave the source "
                                f"out")
        self.stretches: list[Stretch] = []
        self.samples: int | None = None
        """Until every source is used up; None where that never happens."""
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
        """Appends the stretches of [block, until), a new one wherever a source comes to its end."""
        while self.samples is None and (until is None or block < until):
            begins = tuple(self._given_before(block))
            left = [self._left(source, begin) for source, begin in enumerate(begins)]
            weights = [Fraction(0) if rows == 0 else weight for weight, rows in zip(weights, left, strict=True)]
            if not any(weights):
                self.samples = block * self.block_rows
                return
            whole = shares(weights, self.block_rows)
            lasting = min((rows // share for rows, share in zip(left, whole, strict=True)
                           if rows is not None and share), default=None)
            if lasting == 0:
                last = self._ending(block, begins, weights, left)
                self.stretches.append(last)
                if sum(last.shares) < self.block_rows:
                    self.samples = block * self.block_rows + sum(last.shares)
            else:
                self.stretches.append(Stretch(block, whole, begins, tuple(weight / sum(weights) for weight in weights)))
            if lasting is None:
                return
            block += max(1, lasting)

    def _left(self, source: int, given: int) -> int | None:
        """Rows that a source may still give; None: any number."""
        part = self.parts[source]
        if not part.max_epochs:
            return None
        return max(1, int(Fraction(repr(float(part.max_epochs))) * part.order.rows)) - given

    def _ending(self, block: int, begins: tuple[int, ...], weights: list[Fraction], left: list[int | None]) -> Stretch:
        """The one block in which sources end that cannot fill their share of it."""
        rows = [0] * len(weights)
        exact = [Fraction(0)] * len(weights)
        free, ending = {source for source, weight in enumerate(weights) if weight}, set[int]()
        while free:
            rest = self.block_rows - sum(rows[source] for source in ending)
            total = sum(weights[source] for source in free)
            parts = shares([weights[source] if source in free else Fraction(0) for source in range(len(weights))], rest)
            over = {source for source in free if left[source] is not None and parts[source] > left[source]}  # type: ignore
            if not over:
                for source in free:
                    rows[source], exact[source] = parts[source], weights[source] / total * rest
                break
            for source in over:
                rows[source] = left[source] or 0
                exact[source] = Fraction(rows[source])
            free, ending = free - over, ending | over
        return Stretch(block, tuple(rows), begins, tuple(one / sum(exact) for one in exact))

    def stretch(self, block: int) -> Stretch:
        """The stretch a block lies in. DataError: every source has been used up before."""
        self.check_lasts(block * self.block_rows + 1)
        return self.stretches[bisect_right(self._starts, block) - 1]

    def check_lasts(self, samples: int) -> None:
        """DataError: every source has been used up before so many samples."""
        if self.samples is not None and samples > self.samples:
            raise DataError(f"every source has been read max_epochs times after {self.samples} rows; raise "
                            "data.sources[].max_epochs or lower optim.total_tokens")

    def shares(self, block: int) -> tuple[int, ...]:
        """Rows of each source in a block; they sum to block_rows, but in a last block where every source ends."""
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
        self.check_lasts(int(samples.max(initial=-1)) + 1)
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
        rows = int(ends[-1])
        slots = permute(np.arange(rows), rows, key(self.seed, BLOCK, number))
        sources = np.searchsorted(ends, slots, side="right")
        ordinals = slots + (np.array(self._given_before(number)) - ends + stretch.shares)[sources]
        epochs, places = np.divmod(ordinals, np.array([part.order.rows for part in self.parts])[sources])
        drawn = np.empty_like(places)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            chosen = (sources == source) & (epochs == epoch)
            drawn[chosen] = self.parts[source].order.draw(epoch, places[chosen])
        return Drawn(sources, drawn, epochs)
