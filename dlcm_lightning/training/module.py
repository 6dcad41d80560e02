"""The LightningModule: the four-stage model, its objective, and what happens at an optimizer step.

Nothing here draws random numbers, reads clocks or depends on how the batch was split: a step is a function of
(weights, optimizer state, buffers, batch). Beside the model's own state are kept: the boundaries and tokens of the
previous step, whose F serves where a step has several micro-batches; what the step under way has to be divided by; its
running tally; and the last whole one for whoever logs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import BoundaryConfig, Config
from dlcm_lightning.model import mup
from dlcm_lightning.model.dlcm import DLCM, LanguageModel, Output, assemble
from dlcm_lightning.ops.collectives import all_reduce_sum, world_size
from dlcm_lightning.ops.segments import Concepts
from dlcm_lightning.training.objective import (
    COLUMNS,
    COUNTS,
    SCALARS,
    Tally,
    counts_of,
    measure,
    over_ranks,
    probability_sum,
)
from dlcm_lightning.training.optim import build_optimizer
from dlcm_lightning.training.schedule import learning_rate_factor

Construct = Callable[[Callable[[], LanguageModel], Callable[..., None]], LanguageModel]
"""(assemble, fill) -> a filled model, as `Engine.construct` does it."""
LENGTHS = 32
"""Concept lengths that are told apart; longer ones count as the last."""


def count_lengths(concepts: Concepts, batch: Batch) -> Tensor:
    """(LENGTHS,) int64: entry i counts the concepts of i + 1 tokens, those of filler rows left out; no host sync."""
    lengths = concepts.pooled.diff().clamp(max=LENGTHS)  # (M,)
    bins = torch.arange(1, LENGTHS + 1, device=lengths.device)
    return ((lengths[:, None] == bins) & batch.counted()[concepts.closing, None]).sum(0)


def whole_model(assemble: Callable[[], LanguageModel], fill: Callable[..., None]) -> LanguageModel:
    """In one piece, on the device that is current."""
    model = assemble()
    fill(model)
    return model


class PretrainModule(LightningModule):
    """Four stages, two losses, one optimizer."""

    model: LanguageModel
    previous_counts: Tensor
    token_bytes: Tensor

    def __init__(self, config: Config, compute_dtype: torch.dtype, backend: str, token_bytes: Tensor,
                 construct: Construct = whole_model) -> None:
        """token_bytes: (V,) int64, UTF-8 bytes of every id of the tokenizer: the denominator of bits per byte.
        construct: an engine's, for a model that is spread over processes."""
        super().__init__()
        self.config = config
        self._assemble = partial(assemble, config.model, compute_dtype, backend, config.train.recompute)
        self._fill = partial(mup.initialise, model=config.model, seed=config.seed)
        self._construct: Construct | None = construct
        self.register_buffer("previous_counts", torch.zeros(2, dtype=torch.int64))  # no engine casts whole numbers
        self.register_buffer("token_bytes", token_bytes, persistent=False)
        self.counts: Tensor | None = None
        """(len(COUNTS),) what the optimizer step under way has, over all ranks; None before the first of this life."""
        self.step_tally: Tally | None = None
        """Sum over its micro-batches so far, of this rank; over all ranks from the last one's forward on."""
        self.next_counts: Tensor | None = None
        """Of the step behind it, known from then on too."""
        self.last_step: Tally | None = None
        """The tally of the last whole optimizer step, over all ranks."""
        self.concept_lengths: Tensor | None = None
        """(LENGTHS,) int64: concepts of this rank's last micro-batch by the number of tokens they pool."""

    def configure_model(self) -> None:
        """Makes `model`. Lightning calls it where the engine wants the model to be made; a second call does nothing."""
        if self._construct is not None:
            self.model = self._construct(self._assemble, self._fill)
            self._construct = None

    def finishes_step(self, batch_idx: int) -> bool:
        """Whether micro-batch `batch_idx` of the run is the last of its optimizer step."""
        return (batch_idx + 1) % self.config.micro_batches == 0

    @property
    def device(self) -> torch.device:
        """Where its buffers are. Lightning's own answer is not told of a model that ZeRO-3 has cut."""
        return self.previous_counts.device

    @property
    def boundary(self) -> BoundaryConfig | None:
        """None for a dense model."""
        return self.config.model.boundary if self.config.model.kind == "dlcm" else None

    @property
    def consumed_tokens(self) -> int:
        """Tokens of all optimizer steps so far, over all ranks."""
        return self.trainer.global_step * self.config.data.tokens_per_step

    def tally(self, batch: Batch, noise: Tensor | None) -> tuple[Tally, Output]:
        """Forward: this rank's tally, and the model's output, whose loss carries the gradient."""
        output: Output = self.model(batch.tokens, batch.documents, noise, batch.targets)
        domains = len(self.config.data.domains)
        return measure(output, batch, self.config.model.boundary, domains, self.token_bytes), output

    @property
    def previous_rate(self) -> Tensor:
        """() float64: F of the step before; negative where there was none."""
        sampled, tokens = self.previous_counts.double()
        return torch.where(tokens > 0, sampled / tokens.clamp(min=1), -1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss whose average over ranks and micro-batches has the gradient of the whole step's loss."""
        if self.counts is None:
            self.counts = all_reduce_sum(counts_of(batch.step, self.device))
        local, output = self.tally(batch, batch.noise)
        self.step_tally = local if self.step_tally is None else self.step_tally + local
        if self.finishes_step(batch_idx):
            self.step_tally.scalars[SCALARS.index("unreadable")] = len(batch.step.unreadable)
            self.step_tally, self.next_counts = over_ranks(self.step_tally, batch.following)
        loss = output.nll_sum / self.counts[COUNTS.index("targets")].clamp(min=1).to(output.nll_sum.dtype)
        boundary = self.config.model.boundary
        if output.segmentation is not None and boundary.learned:  # with a weight of 0 too: engines miss gradients
            rate = self.previous_rate if self.config.uses_previous_rate else self.step_tally.rate
            loss = loss + boundary.rate_weight * probability_sum(output, batch, self.counts, boundary, rate)
        if output.concepts is not None:
            self.concept_lengths = count_lengths(output.concepts, batch)
        return loss * (world_size() * self.config.micro_batches)

    def sum_of_nothing(self) -> Tensor:
        """Zero, whose backward gives every parameter a gradient of zeros, the last stage of the model first: as the
        backward of a step does."""
        stages = ("embedding", "encoder", "boundary", "pool", "backbone", "cross_attention", "decoder", "unembedding")
        found = dict(self.model.named_children())
        total = torch.zeros((), device=self.device)
        for stage in stages:
            for parameter in found[stage].parameters() if stage in found else ():
                total = total + (parameter * 0).sum()
        return total

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.model, self.config.model, self.config.optim)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        reached = self.consumed_tokens + self.config.data.tokens_per_step
        factor = learning_rate_factor(reached, self.config.optim)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step(closure=optimizer_closure)
        if self.finishes_step(batch_idx):  # DeepSpeed is asked after every micro-batch
            self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Closes the step: F for the next one, the rate bias, the prior mean. All stay as they are after a step none
        of whose rows could be read."""
        assert self.step_tally is not None
        step, self.step_tally, self.counts = self.step_tally, None, self.next_counts
        self.last_step = step
        if isinstance(self.model, DLCM):
            tokens = step.total("tokens")
            buffers = [self.previous_counts, *self.model.boundary.buffers()]
            before = [buffer.clone() for buffer in buffers]
            self.previous_counts.copy_(torch.stack([step.total("sampled"), tokens]))
            self.model.boundary.after_step(step.rate, step.features / tokens.clamp(min=1))
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(tokens > 0, buffer, old))  # decided on the device

    def empty_tally(self) -> Tally:
        """A tally of nothing, on this module's device."""
        domains = torch.zeros(len(self.config.data.domains), len(COLUMNS), dtype=torch.float64, device=self.device)
        scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=self.device)
        return Tally(domains, scalars, torch.zeros((), dtype=torch.float64, device=self.device))
