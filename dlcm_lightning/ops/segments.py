"""Consecutive pieces of a packed axis: documents of tokens, concepts of tokens, documents of concepts.

A batch is rows of tokens laid end to end; there is no padding and no mask. Everything that needs to know where a
document begins or which tokens a concept holds asks a `Segments`. Only this file converts one into another.

The causal reading of the paper (Fig. 1a, Eq. 14): **the boundary token closes its concept.** With boundaries at
phi(1) = 1 < phi(2) < ... inside one document, concept k

- *pools* the tokens (phi(k-1), phi(k)], and
- is *visible* from its closing token on, so that the newest concept at token t is j(t) = sum_{i<=t} b_i.

Two different partitions of the same tokens, one shifted against the other; swapping them leaks the next token.
Tokens after the last boundary of a document are pooled by nobody: by a running count their index would point at
the first concept of the *next* document, hence `owner` below leaves them out explicitly.

Axes: T tokens, N segments, M concepts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Segments:
    """A partition of an axis into consecutive pieces, none of them empty."""

    cu_seqlens: Tensor
    """(N + 1,) int32: the first position of every piece, and the length of the axis as last entry."""
    max_seqlen: int
    """An upper bound of the longest piece, known on the host: kernels size their grids by it without a sync."""

    def __len__(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of the given lengths, in order. Raises ValueError for an empty list or an empty piece."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segment lengths = {lengths}: need at least one piece and none empty")
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
        starts[1:] = torch.tensor(lengths, dtype=torch.int32, device="cpu").cumsum(0)
        return Segments(starts.to(device), max(lengths))

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.cu_seqlens.to(device), self.max_seqlen)

    def lengths(self) -> Tensor:
        """(N,) int32 length of every piece."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def ids(self, size: int) -> Tensor:
        """(size,) int64: the piece each position lies in; `size` is the length of the axis, known on the host."""
        def make() -> Tensor:
            pieces = torch.arange(len(self), device=self.cu_seqlens.device)
            return pieces.repeat_interleave(self.lengths(), output_size=size)

        return self.once(("ids", size), make)

    def positions(self, size: int) -> Tensor:
        """(size,) int64: offset of each position within its piece."""
        return self.once(("positions", size), lambda: (
            torch.arange(size, device=self.cu_seqlens.device) - self.cu_seqlens.long()[self.ids(size)]))

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """What follows from the partition alone, made when it is first asked for. Whoever has it must not change it."""
        what = what, torch.is_inference_mode_enabled()  # whose tensors no backward takes
        if what not in self._made:
            self._made[what] = make()
        found: T = self._made[what]
        return found

    @functools.cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}


class HostNumber:
    """A whole number on its way from the device to the host: `int()` waits for it, and whatever is enqueued between
    keeps the device busy meanwhile."""

    def __init__(self, number: Tensor) -> None:
        """number: () int64."""
        self._number, self._arrived = number, None
        if number.is_cuda:
            pinned = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=True)
            self._number = pinned.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(number.device))  # which need not be the current device

    def __int__(self) -> int:
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number.item())


class Decisions:
    """Boundaries of T tokens, and how many they are: asked for at once, needed later."""

    def __init__(self, boundaries: Tensor) -> None:
        """boundaries: (T,) bool, true at the first token of every document (every token then sees a concept)."""
        self.boundaries = boundaries
        self.count = boundaries.long().cumsum(0)
        """(T,) int64: j(t) over the whole batch, inclusive."""
        self.concepts = HostNumber(self.count[-1])
        """M."""


@dataclass(frozen=True)
class Concepts:
    """The concepts of a batch of T tokens, M in number."""

    closing: Tensor
    """(M,) int64: the token that closes each concept, phi."""
    lengths: Tensor
    """(M,) int64: tokens that each concept pools, those up to and including its closing one."""
    owner: Tensor
    """(T,) int64: the concept that pools each token; -1 in the tails of documents, which nobody pools."""
    newest: Tensor
    """(T,) int64: the newest concept visible at each token, j(t) - 1."""
    documents: Segments
    """Documents over concepts."""

    def __len__(self) -> int:
        return self.closing.shape[0]


def concepts_from_boundaries(decisions: Decisions | Tensor, documents: Segments) -> Concepts:
    """Turns decisions into concepts (Eq. 14 read inclusively).

    decisions: of the T tokens of documents, or the (T,) bool that they are made of.
    The number of concepts is read on the host, the one time that a step waits for the device.
    """
    if isinstance(decisions, Tensor):
        decisions = Decisions(decisions)
    boundaries, count = decisions.boundaries, decisions.count
    tokens, concepts = count.shape[0], int(decisions.concepts)
    closing = torch.searchsorted(count, torch.arange(1, concepts + 1, device=count.device))  # (M,)
    before = F.pad(count, (1, 0))[documents.cu_seqlens.long()]  # (N + 1,) concepts that lie before each document
    # The first token of a document is a concept of its own; each further one begins after the one before it.
    lengths = closing.diff(prepend=closing.new_full((1,), -1)).index_fill_(0, before[:-1], 1)
    last_closing = closing[before[1:] - 1]  # (N,) the last boundary of every document
    pooled = torch.arange(tokens, device=count.device) <= last_closing[documents.ids(tokens)]  # (T,)
    owner = torch.where(pooled, count - boundaries.long(), -1)  # boundaries strictly before the token
    longest = min(documents.max_seqlen, concepts)
    return Concepts(closing, lengths, owner, count - 1, Segments(before.to(torch.int32), longest))
