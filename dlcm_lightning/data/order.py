"""The order of a source's rows in every epoch: a function of (seed, name, epoch, place), at the same cost anywhere.

An epoch shuffles twice. The shards are put in a random order and taken in groups of `group` shards; the rows of a
group are shuffled as one. So at any moment a source is read from a few shards only, which a cache can hold, and a
random row is still drawn from group x shard bytes of text. A source of no more shards than a group is shuffled whole.

Both shuffles are keyed permutations: a Feistel network over the next even power of two, walked until it falls below n
(fewer than four rounds on average). Any index costs the same, nothing but the order of the shards is stored, nothing
depends on the number of ranks, workers or micro-batches.

All randomness is splitmix64, written out below in numpy's wrapping uint64: no generator of a library stands between
a seed and an order, so an order stays what it is when a library changes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
ROUNDS = 6
_MASK = (1 << 64) - 1
ORDER, BLOCK, NOISE, SHARDS = 1, 2, 3, 4
"""What a key is for: the rows of a source, the positions of a block, the boundary noise, the shards of a source."""
KEPT_EPOCHS = 4


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Elementwise finaliser of splitmix64, (n,) uint64 to (n,) uint64: a bijection that looks random."""
    values = values + _GOLDEN
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
    return values


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


def keys_of(begun: int, last: np.ndarray) -> np.ndarray:
    """(n,) uint64: key(*parts, i) for every i of last, (n,) int64; begun: key(*parts)."""
    return splitmix64(splitmix64(last.view(np.uint64)) ^ np.uint64(begun))


def permute(indices: np.ndarray, size: int, permutation_key: int) -> np.ndarray:
    """Maps indices (n,) int64 in [0, size) by the permutation of [0, size) that the key names."""
    if size < 2:
        return indices.copy()
    half = np.uint64((max(2, (size - 1).bit_length()) + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    rounds = [np.uint64(key(permutation_key, number)) for number in range(ROUNDS)]
    values = indices.astype(np.uint64)
    moving = np.arange(len(values))
    while len(moving):
        left, right = values[moving] >> half, values[moving] & mask
        for round_key in rounds:
            left, right = right, left ^ (splitmix64(right ^ round_key) & mask)
        values[moving] = (left << half) | right
        moving = moving[values[moving] >= np.uint64(size)]
    return values.astype(np.int64)


@dataclass(frozen=True)
class Epoch:
    """One epoch's order of the shards that hold rows."""

    key: int
    shards: np.ndarray
    """(S,) shard numbers in the order they are read, ascending within a group."""
    ends: np.ndarray
    """(S,) rows up to and including each of them."""
    group_ends: np.ndarray
    """(groups,) rows up to and including each group."""


class Order:
    """The rows of one source, epoch after epoch."""

    def __init__(self, seed: int, name: str, first_rows: np.ndarray, group: int) -> None:
        """first_rows: (S + 1,) int64, the first row of every shard and the number of rows. group: shards."""
        self.seed, self.name, self.group = seed, name, group
        self.first_rows = np.asarray(first_rows, dtype=np.int64)
        self.rows = int(self.first_rows[-1])
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()

    def draw(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Rows at `places` (n,) int64 of an epoch, places in [0, rows): over all places, every row once."""
        order = self.epoch(epoch)
        groups = np.searchsorted(order.group_ends, places, side="right")
        positions = np.empty_like(places)
        for group in np.unique(groups).tolist():
            chosen = groups == group
            begin = int(order.group_ends[group - 1]) if group else 0
            size = int(order.group_ends[group]) - begin
            positions[chosen] = begin + permute(places[chosen] - begin, size, (order.key + group) & _MASK)
        at = np.searchsorted(order.ends, positions, side="right")
        shards = order.shards[at]
        rows: np.ndarray = self.first_rows[shards + 1] - (order.ends[at] - positions)
        return rows

    def epoch(self, epoch: int) -> Epoch:
        """O(shards), once per epoch."""
        if epoch not in self._epochs:
            epoch_key = key(self.seed, ORDER, self.name, epoch)
            count = len(self.first_rows) - 1
            shards = np.arange(count)
            if count > self.group:
                shards = permute(shards, count, key(epoch_key, SHARDS))
                padded = np.full(-(-count // self.group) * self.group, count)
                padded[:count] = shards
                shards = np.sort(padded.reshape(-1, self.group), axis=1).reshape(-1)
                shards = shards[shards < count]
            ends = np.cumsum(np.diff(self.first_rows)[shards])
            lasts = np.minimum(np.arange(self.group, count + self.group, self.group), count) - 1
            self._epochs[epoch] = Epoch(epoch_key, shards, ends, ends[lasts])
            while len(self._epochs) > KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
