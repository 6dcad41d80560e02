"""The boundary-rate loss of a whole optimizer step (section 3.3, Eq. 8-10, 15).

    G = mean over all tokens of the global batch of p,    F = the same of b
    L_rate = R/(R-1) [(R-1) F G + (1-F)(1-G)] - 1,        L = L_CE + lambda L_rate

The global batch is every rank's micro-batches of one optimizer step. b carries no gradient, hence
dL_rate/dG = R/(R-1) (R F - 1): only the number F must be known before the backward, and the gradient on each p is a
constant. So the rate loss is back-propagated as `coefficient * sum of p`, while its value is computed for the log.

With one micro-batch a step, F is the step's own. With several it is not known at the first backward: then F of the
*previous* step is used (nothing at step 0), which gives the same gradient for every split of the batch.

F = G = 1/R is a saddle of this expression, which can go below zero; nothing is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcm_lightning.batch import COUNTS, Batch
from dlcm_lightning.config import BoundaryConfig
from dlcm_lightning.model.dlcm import Output


def rate_loss(rate: Tensor, mean_probability: Tensor, ratio: float) -> Tensor:
    """Eq. 10. rate F and mean probability G of equal shape; ratio R > 1."""
    agree = (ratio - 1) * rate * mean_probability + (1 - rate) * (1 - mean_probability)
    return ratio / (ratio - 1) * agree - 1


def rate_slope(rate: Tensor, ratio: float) -> Tensor:
    """dL_rate / dG = R/(R-1) (R F - 1)."""
    return ratio / (ratio - 1) * (ratio * rate - 1)


def sum_by_document(values: Tensor, batch: Batch) -> Tensor:
    """(T,) -> (N,) sums over documents."""
    offsets = batch.documents.cu_seqlens.long()
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0)


def rate_loss_surrogate(output: Output, batch: Batch, counts: Tensor, config: BoundaryConfig, rate: Tensor) -> Tensor:
    """() The rate loss as it is back-propagated: sum over this rank's tokens of (dL_rate / dp_t) p_t.

    counts: of the step, over all ranks. rate: () F, negative where there is none yet.
    """
    assert output.segmentation is not None
    p = output.segmentation.probabilities * batch.counted()
    if config.rate_scope == "document":
        lengths = batch.documents.lengths()
        decisions = output.segmentation.boundaries.to(p.dtype)
        slopes = rate_slope(sum_by_document(decisions, batch) / lengths, config.target_ratio)  # (N,)
        weight = slopes / lengths / counts[COUNTS.index("documents")].clamp(min=1).to(p.dtype)
        return (p * weight[batch.documents.ids(p.shape[0])]).sum()
    slope = torch.where(rate >= 0, rate_slope(rate, config.target_ratio), 0.0)
    return p.sum() * (slope / counts[COUNTS.index("tokens")].clamp(min=1)).to(p.dtype)
