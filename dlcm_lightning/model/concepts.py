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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm_lightning.model.boundary import document_starts
from dlcm_lightning.model.mup import MupLinear, Role
from dlcm_lightning.ops.pool_and_replicate import mean_pool
from dlcm_lightning.ops.scan import linear_scan
from dlcm_lightning.ops.segments import Concepts, Segments

GATE_MARGIN = 1e-4


class Pool(nn.Module):
    """Mean over each concept, then W_up: (T, D) -> (M, E) (Eq. 7)."""

    def __init__(self, d_token: int, d_concept: int) -> None:
        super().__init__()
        self.up = MupLinear(Role.TOKEN_TO_CONCEPT, d_token, d_concept)

    def forward(self, hidden: Tensor, concepts: Concepts, multiple: int) -> Tensor:
        """Returns (M rounded up to `multiple`, E); the added rows are zero."""
        pooled = mean_pool(hidden, concepts)
        return self.up(F.pad(pooled, (0, 0, 0, -len(concepts) % multiple)))


def smooth(z: Tensor, gates: Tensor, documents: Segments) -> Tensor:
    """z (M, E), gates (M,) the closing tokens' p, documents over M -> (M, E) in z's dtype, computed in fp32 or wider.

    The gate is used as it is given: detach it unless the language-model loss shall reach the boundary.
    """
    wide = torch.promote_types(z.dtype, gates.dtype)
    first = document_starts(documents, z.shape[0])
    gate = torch.where(first, 1.0, gates.clamp(GATE_MARGIN, 1 - GATE_MARGIN)).to(wide)
    return linear_scan(1 - gate, gate[:, None] * z.to(wide)).to(z.dtype)


def round_up(documents: Segments, concepts: int, multiple: int) -> Segments:
    """Documents over concepts, and one more for the rows that round M up."""
    added = -concepts % multiple
    if added == 0:
        return documents
    end = documents.cu_seqlens.new_full((1,), concepts + added)
    return Segments(torch.cat([documents.cu_seqlens, end]), max(documents.max_seqlen, added))
