"""Which row of which source is sample i: pure functions of (seed, sources, i).

The global sequence of samples is cut into blocks. In a block every source gets its exact share (largest remainder of
weight x block_rows); a keyed permutation of the block's positions decides where. So sample i of source s is the
source's row number `block * share + rank`, its *ordinal*; ordinals run through the source epoch after epoch, each
epoch in an order of its own, again a keyed permutation.

A keyed permutation of n numbers is a Feistel network over the next even power of two, walked until it falls below n
(fewer than four rounds on average): any index costs the same, nothing is stored, nothing depends on the number of
ranks, workers or micro-batches. Resuming needs one integer.

All randomness is splitmix64, written out below in numpy's wrapping uint64: no generator of a library stands between
a seed and an order, so an order stays what it is when a library changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlcm_lightning.data.errors import DataError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 6
_MASK = (1 << 64) - 1
ORDER, BLOCK, NOISE = 1, 2, 3
"""What a key is for: the rows of a source, the positions of a block, the boundary noise."""


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Elementwise finaliser of splitmix64, uint64 to uint64: a bijection that looks random."""
    with np.errstate(over="ignore"):
        values = values + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def splitmix64_of(value: int) -> int:
    """The same for one number; numpy costs more than the arithmetic there."""
    value = (value + int(_GOLDEN)) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*parts: int | str) -> int:
    """64 bits out of the parts, in order; every part matters, texts by their sha256."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        state = splitmix64_of(state ^ splitmix64_of(part & _MASK))
    return state


def permute(indices: np.ndarray, size: int, permutation_key: int) -> np.ndarray:
    """Maps indices (n,) int64 in [0, size) by the permutation of [0, size) that the key names."""
    if size < 2:
        return indices.copy()
    half = np.uint64((max(2, (size - 1).bit_length()) + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    rounds = [np.uint64(key(permutation_key, number)) for number in range(_ROUNDS)]
    values = indices.astype(np.uint64)
    moving = np.arange(len(values))
    while len(moving):
        left, right = values[moving] >> half, values[moving] & mask
        for round_key in rounds:
            left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
        values[moving] = (left << half) | right
        moving = moving[values[moving] >= np.uint64(size)]
    return values.astype(np.int64)


def noise(seed: int, sample: int, row_tokens: int) -> np.ndarray:
    """(row_tokens,) float32 in [0, 1), 24 bits each: a hash of seed, sample index and offset in the row."""
    offsets = np.arange(row_tokens, dtype=np.uint64)
    with np.errstate(over="ignore"):
        hashed = splitmix64(np.uint64(key(NOISE, seed, sample)) + offsets * _GOLDEN)
    uniform: np.ndarray = (hashed >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return uniform


def shares(weights: Sequence[float], block_rows: int) -> np.ndarray:
    """(S,) int64 rows of each source in a block: largest remainder, ties to the earlier source. Sums to block_rows."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * block_rows
    rows = np.floor(exact).astype(np.int64)
    order = np.argsort(rows - exact, kind="stable")
    rows[order[:block_rows - int(rows.sum())]] += 1
    return rows


@dataclass(frozen=True)
class Drawn:
    """Where samples come from; three arrays (n,) int64, one entry per sample."""

    sources: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray


class Mixture:
    """The order of all samples of a run."""

    def __init__(self, seed: int, names: Sequence[str], rows: Sequence[int], weights: Sequence[float],
                 block_rows: int) -> None:
        """names, rows, weights: of every source; rows are those of one epoch. A source's order depends on its name,
        not on its place in the list. DataError: a source without rows, or with a weight too small for a block."""
        self.seed, self.names, self.rows = seed, list(names), [int(count) for count in rows]
        self.block_rows = block_rows
        self.shares = shares(weights, block_rows)
        for name, count, weight, share in zip(names, self.rows, weights, self.shares, strict=True):
            if count < 1:
                raise DataError(f"source {name!r}: no full row; lower data.row_tokens or leave the source out")
            if weight > 0 and share == 0:
                raise DataError(f"source {name!r}: weight {weight} gives no row in a block of {block_rows}; "
                                "raise data.block_rows or leave the source out")
        self._ends = np.cumsum(self.shares)

    def draw(self, samples: np.ndarray) -> Drawn:
        """samples: (n,) int64 global indices >= 0, in any order. The same cost at any index."""
        samples = np.asarray(samples, dtype=np.int64)
        blocks, positions = np.divmod(samples, self.block_rows)
        slots = np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            slots[chosen] = permute(positions[chosen], self.block_rows, key(self.seed, BLOCK, int(block)))
        sources = np.searchsorted(self._ends, slots, side="right")
        ordinals = blocks * self.shares[sources] + slots - (self._ends - self.shares)[sources]
        epochs, places = np.divmod(ordinals, np.array(self.rows)[sources])
        rows = np.empty_like(places)
        for source, epoch in sorted(set(zip(sources.tolist(), epochs.tolist(), strict=True))):
            chosen = (sources == source) & (epochs == epoch)
            order = key(self.seed, ORDER, self.names[source], epoch)
            rows[chosen] = permute(places[chosen], self.rows[source], order)
        return Drawn(sources, rows, epochs)
