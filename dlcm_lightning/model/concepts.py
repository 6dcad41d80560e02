"""The concept stage: pool, backbone, smoothing (Eq. 2, 3, 7, 11).

Tokens of a concept are averaged and lifted to the backbone's width, the backbone runs causally over the concepts of
each document, and its output is smoothed,

    z~_1 = z_1,   z~_m = g_m z_m + (1 - g_m) z~_{m-1}

with the closing token's p as gate g (H-Net Eq. 5; the paper names smoothing and gives no form), clamped to
[1e-4, 1 - 1e-4] and detached: otherwise the language-model loss would reach W_q and W_k.

The number of concepts M changes with every batch. Where `multiple` is above one, M is rounded up with a last document
of zero rows that nothing reads, because new matrix shapes cost a CPU several milliseconds each.

Axes: T tokens, M concepts, D token width, E concept width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm_lightning.model.boundary import document_starts
from dlcm_lightning.model.cache import ConceptState, DecodingState
from dlcm_lightning.model.mup import MupLinear, Role
from dlcm_lightning.ops.incremental import Extension
from dlcm_lightning.ops.pool_and_replicate import mean_pool, segment_sum
from dlcm_lightning.ops.scan import linear_scan
from dlcm_lightning.ops.segments import Concepts, Segments

GATE_MARGIN = 1e-4


@dataclass(frozen=True)
class ClosedConcepts:
    """The concepts that close at new tokens: M' of them, in rows that close one. Counted on the host.

    Every row's tokens are cut into *runs*, one after each boundary and one of what stays open, which may be empty. The
    first run of a row belongs to the concept that was open before.
    """

    concepts: Extension
    """Of the concept axis."""
    closing: Tensor
    """(M',) int64: the new token that closes each, counted over all rows."""
    tokens: Tensor
    """(M',) int64: the same, counted in its sequence."""
    lengths: Tensor
    """(M',) int64: tokens that each pools."""
    newest: Tensor
    """(N,) int64: how many of these concepts have closed at each new token, minus one."""
    run_ends: Tensor
    """(runs + 1,) int64: 0, and where each run ends."""
    closed_runs: Tensor
    """(M',) int64: the runs that a boundary ends."""
    first_runs: Tensor
    """(n,) int64: the first run of each row."""
    open_runs: Tensor
    """(n,) int64: its last."""
    longest: int
    """Concepts of the row that has most, these included."""

    @property
    def any(self) -> bool:
        return self.closing.shape[0] > 0


def close_concepts(boundaries: Tensor, new: Extension, state: DecodingState) -> ClosedConcepts:
    """boundaries (N,) bool of new tokens, read on the host, the one time that a step waits. The counts of the state go
    on; the arrays do not."""
    device, slots = boundaries.device, new.slots
    closing = boundaries.cpu().nonzero().squeeze(1)  # (M',)
    new_counts = torch.tensor(new.counts, device="cpu")
    row_ends = new_counts.cumsum(0)
    rows = torch.searchsorted(row_ends, closing, right=True)
    per_row = torch.bincount(rows, minlength=len(slots))  # (n,)
    run_ends = torch.cat([closing.new_zeros(1), torch.cat([closing + 1, row_ends]).sort()[0]])
    open_runs = (per_row + 1).cumsum(0) - 1
    first_runs = open_runs - per_row
    closed_runs = torch.arange(len(closing), device="cpu") + rows
    lengths = run_ends.diff()
    lengths[first_runs] += torch.tensor([state.open_tokens[slot] for slot in slots], device="cpu")
    starts = row_ends - new_counts
    tokens = closing - (starts - torch.tensor(new.before, device="cpu"))[rows]
    counts = per_row.tolist()
    active = [row for row, count in enumerate(counts) if count]
    concepts = Extension.of([slots[row] for row in active], [state.concepts[slots[row]] for row in active],
                            [counts[row] for row in active], device) if active else new
    for slot, count, still_open in zip(slots, counts, lengths[open_runs].tolist(), strict=True):
        state.concepts[slot] += count
        state.open_tokens[slot] = still_open
    longest = max(state.concepts[slot] for slot in slots)
    return ClosedConcepts(
        concepts, closing.to(device), tokens.to(device), lengths[closed_runs].to(device),
        boundaries.long().cumsum(0) - 1, run_ends.to(device), closed_runs.to(device), first_runs.to(device),
        open_runs.to(device), longest)


class Pool(nn.Module):
    """Mean over each concept, then W_up: (T, D) -> (M, E) (Eq. 7)."""

    def __init__(self, d_token: int, d_concept: int) -> None:
        super().__init__()
        self.up = MupLinear(Role.TOKEN_TO_CONCEPT, d_token, d_concept)

    def forward(self, hidden: Tensor, concepts: Concepts, multiple: int) -> Tensor:
        """Returns (M rounded up to `multiple`, E); the added rows are zero."""
        pooled = mean_pool(hidden, concepts)
        return self.up(F.pad(pooled, (0, 0, 0, -len(concepts) % multiple)))

    def extend(self, hidden: Tensor, closed: ClosedConcepts, new: Extension, state: ConceptState) -> Tensor:
        """The same of new tokens (N, D), whose concepts may have been open before -> (M', E)."""
        sums = segment_sum(hidden, closed.run_ends)  # (runs, D)
        sums[closed.first_runs] += state.open_sums[new.slot_index]
        state.open_sums[new.slot_index] = sums[closed.open_runs]
        return self.up((sums[closed.closed_runs] / closed.lengths[:, None]).to(hidden.dtype))


def smooth(z: Tensor, gates: Tensor, documents: Segments) -> Tensor:
    """z (M, E), gates (M,) the closing tokens' p, documents over M -> (M, E) in z's dtype, computed in fp32 or wider.

    The gate is used as it is given: detach it unless the language-model loss shall reach the boundary.
    """
    wide = torch.promote_types(z.dtype, gates.dtype)
    first = document_starts(documents, z.shape[0])
    gate = torch.where(first, 1.0, gates.clamp(GATE_MARGIN, 1 - GATE_MARGIN)).to(wide)
    return linear_scan(1 - gate, gate[:, None] * z.to(wide)).to(z.dtype)


def extend_smoothing(z: Tensor, gates: Tensor, new: Extension, state: Tensor) -> Tensor:
    """`smooth` of new concepts z (M', E) after the smoothed ones that state (S, E) holds, which is given the last."""
    wide = torch.promote_types(z.dtype, gates.dtype)
    gate = torch.where(new.positions == 0, 1.0, gates.clamp(GATE_MARGIN, 1 - GATE_MARGIN)).to(wide)
    mixed = gate[:, None] * z.to(wide)
    mixed[new.firsts] += (1 - gate[new.firsts])[:, None] * state[new.slot_index].to(wide)
    smoothed = mixed
    if not new.single:
        first = document_starts(new.segments, z.shape[0])
        smoothed = linear_scan(torch.where(first, 0.0, 1 - gate), mixed)
    state[new.slot_index] = smoothed[new.lasts].to(state.dtype)
    return smoothed.to(z.dtype)


def round_up(documents: Segments, concepts: int, multiple: int) -> Segments:
    """Documents over concepts, and one more for the rows that round M up."""
    added = -concepts % multiple
    if added == 0:
        return documents
    end = documents.cu_seqlens.new_full((1,), concepts + added)
    return Segments(torch.cat([documents.cu_seqlens, end]), max(documents.max_seqlen, added))
