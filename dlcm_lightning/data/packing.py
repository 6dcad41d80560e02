"""Rows: the token stream of a source cut into equal lengths, and rows laid end to end as a `Batch`.

Row r of a source feeds the tokens [r * L, (r + 1) * L), L = row_tokens, and looks one token further for its last
target. Rows do not overlap, so an epoch feeds every token once (but for the tail that fills no row). Documents are
cut where a row ends; a piece counts as a document of its own. The last token of a document predicts nothing: its
successor belongs to another document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dlcm_lightning.batch import NO_TARGET, Batch
from dlcm_lightning.data.mixture import noise
from dlcm_lightning.data.source import Source
from dlcm_lightning.ops.segments import Segments


@dataclass(frozen=True)
class Row:
    """One sample, L tokens."""

    tokens: np.ndarray
    """(L,) int64."""
    targets: np.ndarray
    """(L,) int64, NO_TARGET at the last token of a document."""
    lengths: np.ndarray
    """(pieces,) int64, sums to L."""
    noise: np.ndarray
    """(L,) float32 in [0, 1)."""
    domain: int
    sample: int
    """-1 for a filler."""

    @property
    def target_count(self) -> int:
        return int((self.targets != NO_TARGET).sum())


def cut_row(source: Source, row: int, row_tokens: int, *, domain: int, sample: int, seed: int) -> Row:
    """Row `row` of a source. seed and sample key the noise."""
    stream, starts = source.read(row * row_tokens, row_tokens + 1)
    targets = stream[1:].copy()
    targets[starts[starts > 0] - 1] = NO_TARGET
    inner = starts[(starts > 0) & (starts < row_tokens)]
    lengths = np.diff(np.concatenate([[0], inner, [row_tokens]]))
    return Row(stream[:-1], targets, lengths, noise(seed, sample, row_tokens), domain, sample)


def filler_row(row_tokens: int, bos_id: int) -> Row:
    """A row that predicts nothing and counts in no statistic: one document of BOS."""
    return Row(np.full(row_tokens, bos_id, dtype=np.int64), np.full(row_tokens, NO_TARGET, dtype=np.int64),
               np.array([row_tokens]), np.zeros(row_tokens, dtype=np.float32), 0, -1)


def pack(rows: Sequence[Row], token_bytes: np.ndarray, step: Sequence[Row]) -> Batch:
    """Rows laid end to end. token_bytes: (V,) int64 of the tokenizer; step: all rows of this rank's optimizer step."""
    real = [row for row in step if row.sample >= 0]
    targets = np.concatenate([row.targets for row in rows])
    target_bytes = np.where(targets == NO_TARGET, 0, token_bytes[np.maximum(targets, 0)])
    return Batch(
        tokens=torch.from_numpy(np.concatenate([row.tokens for row in rows])),
        targets=torch.from_numpy(targets),
        target_bytes=torch.from_numpy(target_bytes),
        documents=Segments.from_lengths(np.concatenate([row.lengths for row in rows]).tolist()),
        noise=torch.from_numpy(np.concatenate([row.noise for row in rows])),
        domains=torch.tensor([row.domain for row in rows]),
        samples=torch.tensor([row.sample for row in rows]),
        row_tokens=len(rows[0].tokens),
        step_targets=sum(row.target_count for row in real),
        step_tokens=sum(len(row.tokens) for row in real),
        step_documents=sum(len(row.lengths) for row in real),
    )
