"""Cross-attention from tokens to concepts (Eq. 12-17).

A token may see the concepts 1..j(t) of its document. Following section 4.1, keys and values are *replicated* along the
visible runs [phi(m), phi(m+1)), so that position i carries the newest concept visible at i, and ordinary causal
attention over tokens serves, in every backend. That is not Eq. 14 to the letter: concept m then weighs
n_m(t) exp(q . k_m), n_m(t) being the number of its replicas up to t. It is the form the paper ships, hence ours. A
decoder that remembers every concept once adds log n_m(t) to the scores instead.

Queries and keys are RMS-normalised per head with gains shared by the heads; no rotary angles; no FFN of its own.
Axes: T tokens, M concepts, D token width, E concept width, H heads, K key-value heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlcm_lightning.model.cache import ConceptMemory
from dlcm_lightning.model.concepts import ClosedConcepts
from dlcm_lightning.model.layers import RMSNorm
from dlcm_lightning.model.mup import MupLinear, Role
from dlcm_lightning.ops.attention import attention
from dlcm_lightning.ops.incremental import Extension, attend
from dlcm_lightning.ops.pool_and_replicate import replicate
from dlcm_lightning.ops.segments import Concepts, Segments


class CrossAttention(nn.Module):
    """Queries of T tokens, (M, E) concepts -> (T, D), to be added to the tokens."""

    def __init__(
        self, d_token: int, d_concept: int, heads: int, kv_heads: int, head_dim: int, norm_epsilon: float
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.token_norm = RMSNorm(Role.NORM_TOKEN, d_token, norm_epsilon)
        self.concept_norm = RMSNorm(Role.NORM_CONCEPT, d_concept, norm_epsilon)
        self.query = MupLinear(Role.TOKEN, d_token, heads * head_dim)
        self.key = MupLinear(Role.CONCEPT_TO_TOKEN, d_concept, kv_heads * head_dim)
        self.value = MupLinear(Role.CONCEPT_TO_TOKEN, d_concept, kv_heads * head_dim)
        self.out = MupLinear(Role.TOKEN, heads * head_dim, d_token)
        self.query_head_norm = RMSNorm(Role.NORM_TOKEN, head_dim, norm_epsilon)
        self.key_head_norm = RMSNorm(Role.NORM_TOKEN, head_dim, norm_epsilon)

    def queries(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, H, d): what does not depend on concepts."""
        return self.query_head_norm(self.query(self.token_norm(hidden)).unflatten(-1, (-1, self.head_dim)))

    def forward(self, query: Tensor, z: Tensor, concepts: Concepts, documents: Segments, backend: str) -> Tensor:
        """query: what `queries` gives."""
        split = (-1, self.head_dim)
        key, value = (replicate(one.flatten(1), concepts).unflatten(-1, split) for one in self._keys_values(z))
        return self.out(attention(query, key, value, documents, backend).flatten(1))  # key and value (T, K, d)

    def extend(self, query: Tensor, z: Tensor | None, closed: ClosedConcepts, new: Extension, memory: ConceptMemory,
               backend: str) -> Tensor:
        """The same of new tokens. z: (M', E) the concepts that close at them, which the memory is given; None where
        none does."""
        if z is not None:
            key, value = self._keys_values(z)
            memory.write(key, value, closed.concepts)
            memory.closing[closed.concepts.slot_index[closed.concepts.owner], closed.concepts.positions] = closed.tokens
            if new.fresh:
                key, value = (one.index_select(0, closed.newest) for one in (key, value))
                return self.out(attention(query, key, value, new.segments, backend).flatten(1))
        longest = closed.longest
        keys, values = (new.rows_of(one, longest) for one in (memory.keys, memory.values))
        phi = memory.closing[: len(new.counts)] if new.leading else memory.closing.index_select(0, new.slot_index)
        replicas = self.replicas(phi[:, : longest + 1], new.table(), longest)
        bias = replicas.to(torch.promote_types(query.dtype, torch.float32)).log()
        return self.out(attend(query, keys, values, new, bias).flatten(1))

    @staticmethod
    def replicas(closing: Tensor, positions: Tensor, concepts: int) -> Tensor:
        """n_m(t). closing (n, concepts or one more): the token that closes each concept; positions (n, P) of tokens ->
        (n, P, concepts) int64, 0 where a concept is not visible yet."""
        until = closing[:, 1 : concepts + 1]
        if until.shape[1] < concepts:
            until = torch.cat([until, positions[:, -1:] + 1], 1)
        end = torch.minimum(positions[..., None] + 1, until[:, None])
        return (end - closing[:, None, :concepts]).clamp(min=0)

    def _keys_values(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (M, E) -> keys and values (M, K, d)."""
        normed = self.concept_norm(z)
        split = (-1, self.head_dim)
        return self.key_head_norm(self.key(normed).unflatten(-1, split)), self.value(normed).unflatten(-1, split)
