"""Rows: the token stream of a source cut into equal lengths, and rows laid end to end as a `Batch`.

Row r of a source feeds the tokens [r * L, (r + 1) * L), L = sequence_length, and looks one token further for its last
target. Rows do not overlap, so an epoch feeds every token once (but for the tail that fills no row). Documents are
cut where a row ends; a piece counts as a document of its own. The last token of a document predicts nothing: its
successor belongs to another document.

The rows that a rank reads for some optimizer steps are one `Rows`: a few numpy arrays, which cross from a loader
process as bytes in a pipe. A tensor would take a file of shared memory each, milliseconds of a hand-over. Batches are
views of them: ids stay as they are stored until the device that computes with them widens them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlcm_lightning.batch import Batch, StepCounts, Unreadable
from dlcm_lightning.ops.segments import Segments


@dataclass(frozen=True)
class Rows:
    """The rows of one rank in consecutive optimizer steps: B rows of L tokens, S starts of documents in them."""

    stream: np.ndarray
    """(B, L + 1) uint16 or uint32 as stored, the token after the row included."""
    starts: np.ndarray
    """(S,) int64: where documents begin, counted over the B x L tokens laid end to end. Row b contributes those in
    (b L, (b + 1) L], so that of a document which begins right after it is among them, and its own first token is
    not."""
    begins: np.ndarray
    """(B + 1,) int64: the starts of row b are starts[begins[b]:begins[b + 1]]."""
    samples: np.ndarray
    """(B,) int64; -1 for padding rows."""
    domains: np.ndarray
    """(B,) int64."""
    noise_keys: np.ndarray
    """(B,) int64."""
    unreadable: tuple[tuple[int, Unreadable], ...]
    """Rows that could not be read, by their place, where the configuration allows for it: padding rows stand there."""


def batches(rows: Rows, steps: int, micro_batch_size: int) -> Iterator[Batch]:
    """The micro-batches of so many steps, each of as many rows, in order."""
    count, length = len(rows.stream), rows.stream.shape[1] - 1
    per_step = count // steps
    grid = np.arange(0, (count + 1) * length, length)
    documents = np.concatenate([grid, rows.starts[rows.starts % length != 0]])
    documents.sort()
    first_documents = np.searchsorted(documents, grid)
    longest = np.maximum.reduceat(np.diff(documents), first_documents[:-1:micro_batch_size]).tolist()
    real = np.add.reduceat(rows.samples >= 0, np.arange(0, count, per_step), dtype=np.int64)
    # A document, or a piece of one, begins with every row, padding rows too, and others inside; each start ends a
    # document.
    of_steps = [real * length - np.diff(rows.begins[::per_step]), real * length,
                np.diff(first_documents[::per_step]) - (per_step - real)]
    counts = [StepCounts(targets, tokens, among,
                         tuple(missed for place, missed in rows.unreadable if place // per_step == step))
              for step, (targets, tokens, among) in enumerate(np.stack(of_steps, axis=1).tolist())]
    of_document, of_start = first_documents.tolist(), rows.begins.tolist()
    stream, samples, domains, noise_keys = (
        torch.from_numpy(one).split(micro_batch_size)
        for one in (rows.stream, rows.samples, rows.domains, rows.noise_keys))
    for number, first in enumerate(range(0, count, micro_batch_size)):
        last, begin = first + micro_batch_size, first * length
        starts = (documents[of_document[first]:of_document[last] + 1] - begin).astype(np.int32)
        ends = rows.starts[of_start[first]:of_start[last]] - (begin + 1)
        yield Batch(
            stream=stream[number], ends=torch.from_numpy(ends),
            documents=Segments(torch.from_numpy(starts), longest[number]),
            noise_keys=noise_keys[number], domains=domains[number], samples=samples[number],
            step=counts[first // per_step],
        )
