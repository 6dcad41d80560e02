"""What the configured weights promise in every stretch of blocks, as exact fractions, and why a stretch begins.

The mixture gives whole rows: in a block a source gets its weight x block_rows, rounded. Here stands what was rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from dlcm_lightning.config import DataConfig
from dlcm_lightning.data.mixture import Mixture


@dataclass(frozen=True)
class Held:
    """The weights of a stretch."""

    first_block: int
    weights: tuple[Fraction, ...]
    """Of every source of the mixture; they sum to one."""
    changed: bool
    """It begins because data.weight_changes says so."""
    used_up: tuple[str, ...]
    """Sources that have a weight and get none from here on, for they have been read max_epochs times."""


def held(mixture: Mixture, config: DataConfig) -> Iterator[Held]:
    """One for each of mixture.stretches."""
    samples = [-(-change.at_tokens // config.sequence_length) for change in config.weight_changes]
    changes = [-(-sample // mixture.block_rows) for sample in samples]
    configured = [{part.name: part.weight for part in mixture.parts},
                  *(change.weights for change in config.weight_changes)]
    before = tuple(Fraction(1) for _ in mixture.parts)
    for stretch in mixture.stretches:
        wanted = configured[sum(block <= stretch.first_block for block in changes)]
        changed = stretch.first_block in changes
        used_up = tuple(part.name for part, weight, had in zip(mixture.parts, stretch.weights, before, strict=True)
                        if wanted.get(part.name, 0) and not weight and (had or changed))
        yield Held(stretch.first_block, stretch.weights, changed, used_up)
        before = stretch.weights


def promised(mixture: Mixture, config: DataConfig, samples: int) -> list[Fraction]:
    """Rows of every source that the weights promise among the first `samples` samples."""
    stretches = list(held(mixture, config))
    bounds = [*(min(samples, one.first_block * mixture.block_rows) for one in stretches), samples]
    rows = [Fraction(0)] * len(mixture.parts)
    for one, (begin, end) in zip(stretches, pairwise(bounds), strict=True):
        rows = [row + weight * (end - begin) for row, weight in zip(rows, one.weights, strict=True)]
    return rows
