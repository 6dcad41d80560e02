"""Sums over the tokens of an optimizer step, from which its losses are scaled and its metrics computed.

Everything that ranks have to know of each other travels in one small vector, summed over ranks once a step, in its
last micro-batch between forward and backward: the step's `MetricSums`, and how many targets, tokens and documents the
*next* step has, which every loss of that step is divided by. A rank back-propagates W x (its local sum) / (global
count), W ranks, because every engine averages gradients over ranks; and K times that, K micro-batches, because
Lightning divides by K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm_lightning.batch import Batch, StepCounts
from dlcm_lightning.config import BoundaryConfig
from dlcm_lightning.model.boundary import draw
from dlcm_lightning.model.dlcm import Output
from dlcm_lightning.ops.collectives import all_reduce_sum, rank, world_size
from dlcm_lightning.ops.segments import Concepts
from dlcm_lightning.training.rate_loss import rate_loss, sum_by_document

COLUMNS = ("tokens", "sampled", "calibrated", "half", "p", "p_squared", "near_half", "nll", "targets", "bytes")
"""What is summed per domain. calibrated and half count the p that are not below the calibrated threshold and 1/2,
near_half |p - 1/2| < 0.05; nll is in nats."""
SCALARS = ("squared_lengths", "concepts", "samples", "noise", "unreadable", "steps", "imbalance", "documents",
           "document_rate_loss")
"""What is summed once. squared_lengths: of documents, which attention's cost follows. concepts: padding rows included,
they are work too. samples, noise: digests of which rows these are and of what their noise is a function of, the same
for every split and order. unreadable: rows. Of whole steps only: their number, and the sum over them of the most
concepts that a rank had over the mean, this model's own straggler. documents, document_rate_loss: pieces, and the sum
of the rate losses of each, where the loss is taken by document."""
LENGTHS = 32
"""Concept lengths that are told apart; longer ones count as the last."""
NEAR_HALF = 0.05
_MIX = 6364136223846793005


@dataclass(frozen=True)
class MetricSums:
    """Sums over tokens. Adding two sums, or summing over ranks, gives the sums of the tokens together."""

    domains: Tensor
    """(number of domains, len(COLUMNS)) float64."""
    scalars: Tensor
    """(len(SCALARS),) float64."""
    features: Tensor
    """(D,) or (0,) float64: sum of hidden states, for the boundary's prior mean."""

    def __add__(self, other: MetricSums) -> MetricSums:
        return MetricSums(self.domains + other.domains, self.scalars + other.scalars, self.features + other.features)

    @staticmethod
    def nothing(domains: int, device: torch.device) -> MetricSums:
        """Of no tokens."""
        return MetricSums(torch.zeros(domains, len(COLUMNS), dtype=torch.float64, device=device),
                          torch.zeros(len(SCALARS), dtype=torch.float64, device=device),
                          torch.zeros((), dtype=torch.float64, device=device))

    def to(self, device: torch.device) -> MetricSums:
        return MetricSums(self.domains.to(device), self.scalars.to(device), self.features.to(device))

    def total(self, column: str) -> Tensor:
        """() float64: a column summed over domains."""
        return self.domains[:, COLUMNS.index(column)].sum()

    def scalar(self, name: str) -> Tensor:
        return self.scalars[SCALARS.index(name)]

    @property
    def rate(self) -> Tensor:
        """F: share of sampled boundaries among tokens; 0 where there are none."""
        return self.total("sampled") / self.total("tokens").clamp(min=1)

    @property
    def spread(self) -> Tensor:
        """Standard deviation of p, without the first tokens of documents, whose p is 1 whatever the model says."""
        starts = self.scalar("documents")
        counted = (self.total("tokens") - starts).clamp(min=1)
        mean, mean_square = (self.total("p") - starts) / counted, (self.total("p_squared") - starts) / counted
        return (mean_square - mean.square()).clamp(min=0).sqrt()

    @property
    def mean_probability(self) -> Tensor:
        """G."""
        return self.total("p") / self.total("tokens").clamp(min=1)


def counts_of(step: StepCounts, device: torch.device) -> Tensor:
    """(len(COUNTS),) float64 of one rank, written on the device without waiting for it."""
    return torch.stack([torch.full((), number, dtype=torch.float64, device=device) for number in step.counts])


def all_reduce_sums(sums: MetricSums, following: StepCounts) -> tuple[MetricSums, Tensor]:
    """The sum over ranks of a step's sums, and (len(COUNTS),) the counts of the step after it: one collective."""
    concepts = torch.zeros(world_size(), dtype=torch.float64, device=sums.scalars.device)
    concepts[rank()] = sums.scalar("concepts")  # of a number, such a line would wait for the device
    parts = (sums.domains.flatten(), sums.scalars, sums.features, counts_of(following, concepts.device), concepts)
    domains, scalars, features, counts, concepts = all_reduce_sum(torch.cat(parts)).split(
        [part.numel() for part in parts])
    scalars = scalars.clone()
    whole = MetricSums(domains.view_as(sums.domains), scalars, features)
    whole.scalar("steps").fill_(1)
    whole.scalar("imbalance").copy_(concepts.max() / concepts.mean().clamp(min=1))
    return whole, counts


def digest(numbers: Tensor, counted: Tensor) -> Tensor:
    """() float64: a sum of 24 mixed bits a number (B,) int64, of those that count; whole, hence exact in any order."""
    mixed = numbers * _MIX  # wraps
    mixed = (mixed ^ (mixed >> 29)) * _MIX
    return (((mixed >> 33) & 0xFFFFFF) * counted).sum().double()


def measure_batch(
    output: Output, batch: Batch, config: BoundaryConfig, domains: int, token_bytes: Tensor
) -> MetricSums:
    """The sums of one micro-batch of one rank. token_bytes (V,): UTF-8 bytes of every id."""
    counted, device = batch.counted(), output.nll.device
    has_target = batch.targets >= 0
    columns = {"tokens": counted, "nll": output.nll, "targets": has_target,
               "bytes": token_bytes[batch.targets.clamp(min=0)] * has_target}  # (T,) each
    real = counted[batch.documents.cu_seqlens[:-1].long()]  # (N,)
    scalars = {"squared_lengths": (batch.documents.lengths().double().square() * real).sum(),
               "samples": digest(batch.samples, batch.samples >= 0),
               "noise": digest(batch.noise_keys, batch.samples >= 0), "documents": real.sum()}
    if output.concepts is not None:
        scalars["concepts"] = torch.full((), len(output.concepts), dtype=torch.float64, device=device)
    features = torch.zeros(0, dtype=torch.float64, device=device)
    if output.segmentation is not None:
        p = output.segmentation.probabilities.detach()
        sampled = draw(p, batch.noise, config.sharpening) if config.learned else output.segmentation.boundaries
        columns |= {"sampled": sampled, "calibrated": p >= output.segmentation.threshold, "half": p >= 0.5, "p": p,
                    "p_squared": p.square(), "near_half": (p - 0.5).abs() < NEAR_HALF}
        if config.learned and config.rate_scope == "document":
            lengths = batch.documents.lengths()
            rates, means = (sum_by_document(one.to(p.dtype), batch) / lengths for one in (sampled, p))  # (N,)
            losses = rate_loss(rates, means, config.target_ratio)
            scalars["document_rate_loss"] = (losses.double() * real).sum()
        if (states := output.segmentation.features) is not None:
            features = (counted.to(states.dtype) @ states).double()
    nothing = torch.zeros_like(counted)
    values = torch.stack([columns.get(name, nothing).double() for name in COLUMNS])  # (C, T)
    rows = (values * counted).view(len(COLUMNS), -1, batch.sequence_length).sum(-1).t()  # (B, C)
    belongs = torch.arange(domains, device=device)[:, None] == batch.domains  # (domains, B)
    sums = belongs.double() @ rows
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return MetricSums(sums, torch.stack([scalars.get(name, zero).double() for name in SCALARS]), features)


def count_lengths(concepts: Concepts, batch: Batch) -> Tensor:
    """(LENGTHS,) int64: entry i counts the concepts of i + 1 tokens, those of padding rows left out; no host sync."""
    lengths = concepts.lengths.clamp(max=LENGTHS)  # (M,)
    bins = torch.arange(1, LENGTHS + 1, device=lengths.device)
    return ((lengths[:, None] == bins) & batch.counted()[concepts.closing, None]).sum(0)
