"""Consecutive pieces of a packed axis: documents of tokens, concepts of tokens, documents of concepts.

A batch is rows of tokens laid end to end; there is no padding and no mask. Everything that needs to know where a
document begins or which tokens a concept holds asks a `Segments`. Only this file converts one into another.

The causal reading of the paper (Fig. 1a, Eq. 14): **the boundary token closes its concept.** With boundaries at
phi(1) = 1 < phi(2) < ... inside one document, concept k

- *pools* the tokens (phi(k-1), phi(k)], and
- is *visible* from its closing token on, so that the newest concept at token t is j(t) = sum_{i<=t} b_i.

Two different partitions of the same tokens, one shifted against the other; swapping them leaks the next token.
Tokens behind the last boundary of a document are pooled by nobody: by a running count their index would point at
the first concept of the *next* document, hence `pooled_tokens` below leaves them out explicitly.

Axes: T tokens, N segments, M concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return Segments(starts.to(device), max(lengths))

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.cu_seqlens.to(device), self.max_seqlen)

    def lengths(self) -> Tensor:
        """(N,) int32 length of every piece."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def ids(self, size: int) -> Tensor:
        """(size,) int64: the piece each position lies in; `size` is the length of the axis, known on the host."""
        pieces = torch.arange(len(self), device=self.cu_seqlens.device)
        return pieces.repeat_interleave(self.lengths(), output_size=size)

    def positions(self, size: int) -> Tensor:
        """(size,) int64: offset of each position within its piece."""
        return torch.arange(size, device=self.cu_seqlens.device) - self.cu_seqlens.long()[self.ids(size)]


@dataclass(frozen=True)
class Concepts:
    """The concepts of a batch of T tokens, M in number."""

    closing: Tensor
    """(M,) int64: the token that closes each concept, phi."""
    pooled: Tensor
    """(M + 1,) int64 offsets into `pooled_tokens`: concept m pools pooled_tokens[pooled[m]:pooled[m + 1]]."""
    pooled_tokens: Tensor
    """(P,) int64, P <= T: the tokens that some concept pools, in order; the tails of documents are missing."""
    newest: Tensor
    """(T,) int64: the newest concept visible at each token, j(t) - 1."""
    documents: Segments
    """Documents over concepts."""

    def __len__(self) -> int:
        return self.closing.shape[0]


def concepts_from_boundaries(boundaries: Tensor, documents: Segments) -> Concepts:
    """Turns decisions into concepts (Eq. 14 read inclusively).

    boundaries: (T,) bool, true at the first token of every document (every token then sees a concept).
    documents: documents over the same T tokens.
    The numbers of concepts and of pooled tokens are read on the host, which waits for the device twice.
    """
    tokens = boundaries.shape[0]
    closing = boundaries.nonzero().squeeze(1)  # (M,)
    count = boundaries.long().cumsum(0)  # (T,) j(t) over the whole batch, inclusive
    starts = documents.cu_seqlens.long()
    before = torch.cat([count.new_zeros(1), count])[starts]  # (N + 1,) concepts that lie before each document
    last_closing = closing[before[1:] - 1]  # (N,) the last boundary of every document
    ids = documents.ids(tokens)
    kept = (torch.arange(tokens, device=closing.device) <= last_closing[ids]).nonzero().squeeze(1)  # (P,)
    owner = (count - boundaries.long())[kept]  # (P,) the concept that pools the token: boundaries strictly before it
    pooled = torch.searchsorted(owner, torch.arange(closing.shape[0] + 1, device=closing.device))
    return Concepts(
        closing=closing,
        pooled=pooled,
        pooled_tokens=kept,
        newest=count - 1,
        documents=Segments(before.to(torch.int32), documents.max_seqlen),
    )
