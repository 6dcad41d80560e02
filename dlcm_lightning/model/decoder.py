"""Cross-attention from tokens to concepts (Eq. 12-17).

A token may see the concepts 1..j(t) of its document. Following section 4.1, keys and values are *replicated* along the
visible runs [phi(m), phi(m+1)), so that position i carries the newest concept visible at i, and ordinary causal
attention over tokens serves, in every backend. That is not Eq. 14 to the letter: concept m then weighs
n_m(t) exp(q . k_m), n_m(t) being the number of its replicas up to t. It is the form the paper ships, hence ours.

Queries and keys are RMS-normalised per head with gains shared by the heads; no rotary angles; no FFN of its own.
Axes: T tokens, M concepts, D token width, E concept width, H heads, K key-value heads, d head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from dlcm_lightning.model.layers import RMSNorm
from dlcm_lightning.model.mup import MupLinear, Role
from dlcm_lightning.ops.attention import attention
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
        normed = self.concept_norm(z)
        key = self.key_head_norm(self.key(normed).unflatten(-1, split)).flatten(1)  # (M, K d)
        key = replicate(key, concepts).unflatten(-1, split)  # (T, K, d)
        value = replicate(self.value(normed), concepts).unflatten(-1, split)
        return self.out(attention(query, key, value, documents, backend).flatten(1))
