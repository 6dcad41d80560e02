"""Between tokens and concepts: mean over a concept (Eq. 7), replication of a concept over its tokens (Eq. 17).

Both are gathers and segment sums over sorted runs, each the other's adjoint, so both directions are written with the
same two functions and neither needs atomics: sums are fp32 (or wider), in order, and therefore reproducible.

Axes: T tokens, M concepts, D any trailing width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcm_lightning.ops.segments import Concepts


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """x (P, D), offsets (M + 1,) -> (M, D): sums of consecutive runs, at least in fp32. Empty runs give zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, initial=0)


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Tensor, closing: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(owner, lengths)
        # Runs are consecutive but for tails, which count as zeros in front of the concept after them.
        pooled = torch.where((owner >= 0)[:, None], x, 0.0)
        return (segment_sum(pooled, F.pad(closing + 1, (1, 0))) / lengths[:, None]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        owner, lengths = ctx.saved_tensors
        share = (grads[0] / lengths[:, None]).to(grads[0].dtype)  # (M, D)
        taken = share.index_select(0, owner.clamp(min=0))
        return taken.masked_fill_((owner < 0)[:, None], 0.0), None, None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, newest: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(starts)
        return z.index_select(0, newest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (starts,) = ctx.saved_tensors
        return segment_sum(grads[0], starts).to(grads[0].dtype), None, None


def mean_pool(x: Tensor, concepts: Concepts) -> Tensor:
    """x (T, D) -> (M, D): mean over the tokens (phi(k-1), phi(k)] of every concept (Eq. 7), its closing token last."""
    return _MeanPool.apply(x, concepts.owner, concepts.closing, concepts.lengths)


def replicate(z: Tensor, concepts: Concepts) -> Tensor:
    """z (M, D) -> (T, D): at every token the newest concept visible there (repeat_interleave over visible runs)."""
    tokens = concepts.newest.shape[0]
    starts = torch.cat([concepts.closing, concepts.closing.new_full((1,), tokens)])
    return _Replicate.apply(z, concepts.newest, starts)
