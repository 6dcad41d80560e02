"""Forms of the cross-attention, which let a token see the concepts that have closed: the paper's Table 6 and one more.

    replicated   keys and values repeated for each token of a visible run, then ordinary causal attention: what the
                 model does, and the paper (section 4.1)
    masked       FlexAttention over the concepts themselves under a mask, which is what the paper compares with; every
                 concept then counts once, so it is another function
    compact      the same, and log n_m(t) added to the scores, n_m(t) being how often concept m is repeated up to token
                 t: the replicated function over a sixth of the keys

Axes: T tokens, M concepts, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dlcm_lightning.ops.attention import attention
from dlcm_lightning.ops.pool_and_replicate import replicate
from dlcm_lightning.ops.segments import Concepts, Segments, concepts_from_boundaries


@dataclass(frozen=True)
class Case:
    """Tokens of documents of equal length, cut into concepts of equal length."""

    concepts: Concepts
    documents: Segments
    query: Tensor
    """(T, H, d)."""
    key: Tensor
    """(M, H, d)."""
    value: Tensor
    """(M, H, d)."""

    @staticmethod
    def make(tokens: int, heads: int, head_dim: int, run: int, document: int, device: torch.device, dtype: torch.dtype
             ) -> Case:
        """run: tokens of a concept. document: tokens of a document."""
        documents = Segments.from_lengths([document] * (tokens // document), device)
        boundaries = documents.positions(tokens) % run == 0
        concepts = concepts_from_boundaries(boundaries, documents)
        generator = torch.Generator().manual_seed(0)
        arrays = [torch.randn(size, heads, head_dim, generator=generator).to(device, dtype).requires_grad_()
                  for size in (tokens, len(concepts), len(concepts))]
        return Case(concepts, documents, *arrays)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def replicated(case: Case, backend: str) -> Tensor:
    """(T, H, d)."""
    key, value = (replicate(one.flatten(1), case.concepts).unflatten(-1, one.shape[1:])
                  for one in (case.key, case.value))
    return attention(case.query, key, value, case.documents, backend)


def visible(case: Case) -> BlockMask:
    """Which concepts a token sees: those of its document that have closed."""
    closing, tokens = case.concepts.closing, case.query.shape[0]
    of_token = case.documents.ids(tokens)
    of_concept = of_token[closing]

    def mask(batch: Tensor, head: Tensor, query: Tensor, concept: Tensor) -> Tensor:
        return (closing[concept] <= query) & (of_concept[concept] == of_token[query])

    return create_block_mask(mask, None, None, tokens, len(case.concepts), device=str(closing.device))


def masked(case: Case, mask: BlockMask, flex: Any) -> Tensor:
    """(T, H, d). flex: torch's flex_attention, compiled or not."""
    q, k, v = (one.transpose(0, 1)[None] for one in case.inputs)
    out: Tensor = flex(q, k, v, block_mask=mask)
    return out[0].transpose(0, 1)


def compact(case: Case, mask: BlockMask, flex: Any) -> Tensor:
    """(T, H, d). flex: as in `masked`."""
    begins = case.concepts.closing
    ends = torch.cat([begins[1:], begins.new_full((1,), case.query.shape[0])])
    runs = ends - begins

    def weighted(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, concept: Tensor) -> Tensor:
        repeated = torch.minimum(query - begins[concept] + 1, runs[concept])
        return score + repeated.clamp(min=1).to(torch.float32).log()

    q, k, v = (one.transpose(0, 1)[None] for one in case.inputs)
    out: Tensor = flex(q, k, v, score_mod=weighted, block_mask=mask)
    return out[0].transpose(0, 1)
