"""Rows: the token stream of a source cut into equal lengths, and rows laid end to end as a `Batch`.

Row r of a source feeds the tokens [r * L, (r + 1) * L), L = row_tokens, and looks one token further for its last
target. Rows do not overlap, so an epoch feeds every token once (but for the tail that fills no row). Documents are
cut where a row ends; a piece counts as a document of its own. The last token of a document predicts nothing: its
successor belongs to another document.

The rows that a rank reads for some optimizer steps are one `Rows`: a few numpy arrays, which cross from a loader
process as bytes in a pipe. A tensor would take a file of shared memory each, milliseconds of a hand-over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dlcm_lightning.batch import NO_TARGET, Batch, Unreadable
from dlcm_lightning.ops.segments import Segments


@dataclass(frozen=True)
class Rows:
    """The rows of one rank in consecutive optimizer steps: B rows of L tokens, S starts of documents in them."""

    stream: np.ndarray
    """(B, L + 1) uint16 or uint32 as stored, the token behind the row included."""
    starts: np.ndarray
    """(S,) int64: where documents begin, counted over the B x L tokens laid end to end. Row b contributes those in
    (b L, (b + 1) L], so that of a document which begins right behind it is among them, and its own first token is
    not."""
    begins: np.ndarray
    """(B + 1,) int64: the starts of row b are starts[begins[b]:begins[b + 1]]."""
    samples: np.ndarray
    """(B,) int64; -1 for fillers."""
    domains: np.ndarray
    """(B,) int64."""
    noise_keys: np.ndarray
    """(B,) int64."""
    fillers: bool
    """Whether there are any."""
    unreadable: tuple[tuple[int, Unreadable], ...]
    """Rows that could not be read, by their place, where the configuration allows for it: fillers stand there."""


@dataclass(frozen=True)
class StepCounts:
    """What every batch says of its whole step; the fields of `Batch`."""

    step_targets: int
    step_tokens: int
    step_documents: int
    step_unreadable: tuple[Unreadable, ...]


def count(rows: Rows, first: int, last: int) -> StepCounts:
    """Of the step whose rows are [first, last)."""
    length = rows.stream.shape[1] - 1
    real = int(np.count_nonzero(rows.samples[first:last] >= 0)) if rows.fillers else last - first
    starts = rows.starts[rows.begins[first]:rows.begins[last]]
    unreadable = tuple(missed for place, missed in rows.unreadable if first <= place < last)
    # A document, or a piece of one, begins with every row, and others inside.
    return StepCounts(real * length - len(starts), real * length, real + int(np.count_nonzero(starts % length)),
                      unreadable)


def pack(rows: Rows, first: int, last: int, step: StepCounts) -> Batch:
    """Rows [first, last) laid end to end. step: of the optimizer step they belong to."""
    length = rows.stream.shape[1] - 1
    stream = rows.stream[first:last]
    starts = rows.starts[rows.begins[first]:rows.begins[last]] - first * length
    samples = rows.samples[first:last]
    targets = stream[:, 1:].astype(np.int64)
    if rows.fillers:
        targets[samples < 0] = NO_TARGET
    targets = targets.reshape(-1)
    targets[starts - 1] = NO_TARGET
    documents = np.concatenate([np.arange(0, (last - first + 1) * length, length), starts[starts % length != 0]])
    documents.sort()
    return Batch(
        tokens=torch.from_numpy(stream[:, :-1].astype(np.int64).reshape(-1)),
        targets=torch.from_numpy(targets),
        documents=Segments(torch.from_numpy(documents.astype(np.int32)), int((documents[1:] - documents[:-1]).max())),
        noise_keys=torch.from_numpy(rows.noise_keys[first:last]),
        domains=torch.from_numpy(rows.domains[first:last]),
        samples=torch.from_numpy(samples),
        row_tokens=length,
        step_targets=step.step_targets, step_tokens=step.step_tokens, step_documents=step.step_documents,
        step_unreadable=step.step_unreadable,
    )
