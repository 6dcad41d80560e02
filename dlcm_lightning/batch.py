"""What the data side hands to the model side: rows of tokens laid end to end, and what goes with them.

The only contract between the two. Nothing here depends on how the rows were read or on what will be computed
from them. T = rows x sequence_length tokens, N documents, B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dlcm_lightning.ops.noise import uniform
from dlcm_lightning.ops.segments import Segments

IGNORE_INDEX = -100
"""Target of a token that predicts nothing: the last of its document, and every token of a padding row."""


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be read."""

    sample: int
    """Its index in the global sequence."""
    source: str
    reason: str


COUNTS = ("targets", "tokens", "documents")
"""What `StepCounts` counts, in the order of tensors of counts."""


@dataclass(frozen=True)
class StepCounts:
    """What one rank reads for one optimizer step, all its micro-batches together, padding rows left out."""

    targets: int = 0
    tokens: int = 0
    documents: int = 0
    """Pieces counted as such."""
    unreadable: tuple[Unreadable, ...] = ()
    """Rows that could not be read and are padding rows instead."""

    @property
    def counts(self) -> tuple[int, ...]:
        """In the order of `COUNTS`."""
        return self.targets, self.tokens, self.documents


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    stream: Tensor
    """(B, sequence_length + 1) uint16 or uint32: the rows as they are stored, each with the token after it."""
    ends: Tensor
    """(S,) int64: tokens whose successor belongs to another document."""
    documents: Segments
    """Documents over tokens; a piece of a document in a row counts as one."""
    noise_keys: Tensor
    """(B,) int64: what each row's boundary noise is a function of, a hash of (seed, sample index)."""
    domains: Tensor
    """(B,) int64: index of each row's domain in `DataConfig.domains`."""
    samples: Tensor
    """(B,) int64: index of each row in the global sequence; -1 for padding rows, which count in no statistic."""
    step: StepCounts
    """Of the optimizer step it belongs to."""
    following: StepCounts = StepCounts()
    """Of the step after that one, so that ranks can tell each other while they speak anyway; empty after the last."""

    @property
    def sequence_length(self) -> int:
        """T / B."""
        return self.stream.shape[1] - 1

    @cached_property
    def tokens(self) -> Tensor:
        """(T,) int64, on the batch's device: two or four bytes a token travel there, not sixteen."""
        return self.stream[:, :-1].long().view(-1)

    @cached_property
    def targets(self) -> Tensor:
        """(T,) int64, on the batch's device: the next token of the same document, or IGNORE_INDEX."""
        following = self.stream[:, 1:].long().masked_fill_((self.samples < 0)[:, None], IGNORE_INDEX)
        return following.view(-1).index_fill_(0, self.ends, IGNORE_INDEX)

    @cached_property
    def noise(self) -> Tensor:
        """(T,) float32 in [0, 1), on the batch's device. A token is sampled as a boundary where its noise is below
        its sharpened probability."""
        return uniform(self.noise_keys, self.sequence_length).view(-1)

    def token_domains(self) -> Tensor:
        """(T,) int64 domain of each token."""
        return self.domains.repeat_interleave(self.sequence_length)

    def counted(self) -> Tensor:
        """(T,) bool: whether a token counts in statistics, i.e. is not of a padding row."""
        return (self.samples >= 0).repeat_interleave(self.sequence_length)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which a GPU can be fed without the host waiting. DataLoader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        documents = Segments(change(self.documents.cu_seqlens), self.documents.max_seqlen)
        return replace(
            self, stream=change(self.stream), ends=change(self.ends), documents=documents,
            noise_keys=change(self.noise_keys), domains=change(self.domains), samples=change(self.samples),
        )
