"""When a row is read: the order of samples inverted, at the same small cost anywhere in a run.

mixture.py says which row sample i is; here is which samples a row is. Every step of the way back has a closed form or
is a bisection: the place of a row in an epoch (both shuffles of order.py undone), its ordinal among all rows that its
source gives, the block that gives this ordinal, and its position there. A Feistel network is undone by its rounds
backwards; a walk that left [0, n) is walked back until it is inside again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dlcm_lightning.data.mixture import Mixture
from dlcm_lightning.data.order import BLOCK, ROUNDS, Order, key, splitmix64_of


def unpermute(index: int, size: int, permutation_key: int) -> int:
    """What `order.permute` maps to `index` in [0, size)."""
    if size < 2:
        return index
    half = (max(2, (size - 1).bit_length()) + 1) // 2
    mask = (1 << half) - 1
    rounds = [key(permutation_key, number) for number in reversed(range(ROUNDS))]
    while True:
        left, right = index >> half, index & mask
        for round_key in rounds:
            left, right = right ^ (splitmix64_of(left ^ round_key) & mask), left
        index = (left << half) | right
        if index < size:
            return index


def place_of(order: Order, epoch: int, row: int) -> int:
    """The place of a row in an epoch: `order.draw(epoch, [place])` is [row]."""
    drawn = order.epoch(epoch)
    shard = int(np.searchsorted(order.first_rows, row, side="right")) - 1
    at = int(np.flatnonzero(drawn.shards == shard)[0])
    position = int(drawn.ends[at] - (order.first_rows[shard + 1] - row))
    group = int(np.searchsorted(drawn.group_ends, position, side="right"))
    begin = int(drawn.group_ends[group - 1]) if group else 0
    size = int(drawn.group_ends[group]) - begin
    return begin + unpermute(position - begin, size, drawn.key + group)


def planned(mixture: Mixture, samples: int) -> int:
    """Of so many samples those that there are: fewer where every source is used up before."""
    return samples if mixture.samples is None else min(samples, mixture.samples)


def samples_of(mixture: Mixture, source: int, row: int, samples: int) -> Iterator[tuple[int, int]]:
    """(epoch, sample) of every time that a row of a source is among the first `samples` samples, epoch by epoch."""
    order, samples = mixture.parts[source].order, planned(mixture, samples)
    blocks = -(-samples // mixture.block_rows)
    given = mixture.given(blocks * mixture.block_rows)[source]
    for epoch in range(-(-given // order.rows)):
        ordinal = epoch * order.rows + place_of(order, epoch, row)
        if ordinal < given:
            sample = _sample(mixture, source, ordinal, blocks)
            if sample < samples:
                yield epoch, sample


def _sample(mixture: Mixture, source: int, ordinal: int, blocks: int) -> int:
    """The sample that is a source's row number `ordinal`, which the first `blocks` blocks hold."""
    size = mixture.block_rows
    low, high = 0, blocks - 1
    while low < high:  # the last block before which the source has given at most `ordinal` rows
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mixture.given(middle * size)[source] <= ordinal else (low, middle - 1)
    shares = mixture.shares(low)
    slot = sum(shares[:source]) + ordinal - mixture.given(low * size)[source]
    return low * size + unpermute(slot, sum(shares), key(mixture.seed, BLOCK, low))
