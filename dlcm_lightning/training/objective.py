"""The loss of a whole optimizer step, and the statistics it is made of (section 3, Eq. 8-10, 15).

    G = mean over all tokens of the global batch of p,    F = the same of b
    L_rate = R/(R-1) [(R-1) F G + (1-F)(1-G)] - 1,        L = L_CE + lambda L_rate

The global batch is every rank's micro-batches of one optimizer step. b carries no gradient, hence
dL_rate/dG = R/(R-1) (R F - 1): only the number F must be known before the backward, and the gradient on each p is a
constant. So the rate loss is back-propagated as `coefficient * sum of p`, while its value is computed for the log.

Everything a step has to know of the other ranks travels in one small vector, a `Tally`, summed over ranks once per
micro-batch. A rank then back-propagates W x (its local sum) / (global count), W ranks, because the engine averages
gradients over ranks; and K times that, K micro-batches, because Lightning divides by K.

With one micro-batch a step, F is the step's own. With several it is not known at the first backward: then F of the
*previous* step is used (nothing at step 0), which gives the same gradient for every split of the batch.

F = G = 1/R is a saddle of this expression, which can go below zero; nothing is clamped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import BoundaryConfig
from dlcm_lightning.model.boundary import decide
from dlcm_lightning.model.dlcm import Output
from dlcm_lightning.ops.collectives import all_reduce_sum

COLUMNS = ("tokens", "sampled", "thresholded", "p", "p_squared", "near_half", "nll", "targets", "bytes")
"""What is summed per domain. near_half counts |p - 1/2| < 0.05; nll is in nats."""
SCALARS = ("step_tokens", "step_targets", "step_documents", "step_unreadable", "squared_lengths")
"""What is summed once. All but the last describe the whole step and are equal in each of its micro-batches; the last is
the sum of squared document lengths, which attention's cost follows."""
NEAR_HALF = 0.05


@dataclass(frozen=True)
class Tally:
    """Sums over tokens. Adding two tallies, or summing over ranks, gives the tally of the tokens together."""

    domains: Tensor
    """(number of domains, len(COLUMNS)) float64."""
    scalars: Tensor
    """(len(SCALARS),) float64."""
    features: Tensor
    """(D,) or (0,) float64: sum of hidden states, for the boundary's prior mean."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.domains + other.domains, self.scalars + other.scalars, self.features + other.features)

    def to(self, device: torch.device) -> Tally:
        return Tally(self.domains.to(device), self.scalars.to(device), self.features.to(device))

    def total(self, column: str) -> Tensor:
        """() float64: a column summed over domains."""
        return self.domains[:, COLUMNS.index(column)].sum()

    def scalar(self, name: str) -> Tensor:
        return self.scalars[SCALARS.index(name)]

    def all_reduced(self) -> Tally:
        """The sum over ranks: one collective."""
        parts = (self.domains.flatten(), self.scalars, self.features)
        whole = all_reduce_sum(torch.cat(parts)).split([part.numel() for part in parts])
        return Tally(whole[0].view_as(self.domains), whole[1], whole[2])

    @property
    def rate(self) -> Tensor:
        """F: share of sampled boundaries among tokens; 0 where there are none."""
        return self.total("sampled") / self.total("tokens").clamp(min=1)

    @property
    def mean_probability(self) -> Tensor:
        """G."""
        return self.total("p") / self.total("tokens").clamp(min=1)


def rate_loss(rate: Tensor, mean_probability: Tensor, ratio: float) -> Tensor:
    """Eq. 10. rate F and mean probability G of equal shape; ratio R > 1."""
    agree = (ratio - 1) * rate * mean_probability + (1 - rate) * (1 - mean_probability)
    return ratio / (ratio - 1) * agree - 1


def rate_slope(rate: Tensor, ratio: float) -> Tensor:
    """dL_rate / dG = R/(R-1) (R F - 1)."""
    return ratio / (ratio - 1) * (ratio * rate - 1)


def _by_document(values: Tensor, batch: Batch) -> Tensor:
    """(T,) -> (N,) sums over documents."""
    offsets = batch.documents.starts.long()
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0)


def measure(
    output: Output, batch: Batch, nll: Tensor, config: BoundaryConfig, domains: int, token_bytes: Tensor
) -> Tally:
    """The tally of one micro-batch of one rank. nll (T,): the terms of the cross-entropy, in nats; token_bytes (V,):
    UTF-8 bytes of every id."""
    counted = batch.counted()
    columns = torch.zeros(len(COLUMNS), *batch.tokens.shape, dtype=torch.float64, device=nll.device)  # (C, T)
    columns[COLUMNS.index("tokens")] = 1
    columns[COLUMNS.index("nll")] = nll
    columns[COLUMNS.index("targets")] = batch.targets >= 0
    columns[COLUMNS.index("bytes")] = token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)
    step = (batch.step_tokens, batch.step_targets, batch.step_documents, len(batch.step_unreadable))
    lengths = batch.documents.lengths()
    real = counted[batch.documents.starts[:-1].long()]  # (N,)
    squared = (lengths.double().square() * real).sum()
    scalars = torch.cat([torch.tensor(step, dtype=torch.float64).to(nll.device), squared[None]])
    features = torch.zeros(0, dtype=torch.float64, device=nll.device)
    if output.segmentation is not None:
        p = output.segmentation.probabilities.detach()
        sampled = decide(p, batch.noise, config.sharpening) if config.learned else output.segmentation.boundaries
        columns[COLUMNS.index("sampled")] = sampled
        columns[COLUMNS.index("thresholded")] = decide(p, None, config.sharpening)
        columns[COLUMNS.index("p")] = p
        columns[COLUMNS.index("p_squared")] = p.square()
        columns[COLUMNS.index("near_half")] = (p - 0.5).abs() < NEAR_HALF
        if (states := output.segmentation.features) is not None:
            features = (counted.to(states.dtype) @ states).double()
    rows = (columns * counted).view(len(COLUMNS), -1, batch.row_tokens).sum(-1).t()  # (B, C)
    sums = torch.zeros(domains, len(COLUMNS), dtype=torch.float64, device=nll.device)
    return Tally(sums.index_add(0, batch.domains, rows), scalars, features)


def probability_sum(
    output: Output, batch: Batch, total: Tally, config: BoundaryConfig, previous_rate: Tensor | None
) -> Tensor:
    """() The rate loss as it is back-propagated: sum over this rank's tokens of (dL_rate / dp_t) p_t.

    total: the tally of this micro-batch over all ranks. previous_rate: () F of the step before, negative where there
    was none; None to use the F of `total`.
    """
    assert output.segmentation is not None
    p = output.segmentation.probabilities * batch.counted()
    if config.rate_scope == "document":
        lengths = batch.documents.lengths()
        decisions = output.segmentation.boundaries.to(p.dtype)
        slopes = rate_slope(_by_document(decisions, batch) / lengths, config.target_ratio)  # (N,)
        weight = slopes / lengths / total.scalar("step_documents").clamp(min=1).to(p.dtype)
        return (p * weight[batch.documents.ids(p.shape[0])]).sum()
    if previous_rate is None:
        slope = rate_slope(total.rate, config.target_ratio)
    else:
        slope = torch.where(previous_rate >= 0, rate_slope(previous_rate, config.target_ratio), 0.0)
    return p.sum() * (slope / total.scalar("step_tokens").clamp(min=1)).to(p.dtype)
