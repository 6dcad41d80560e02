"""How many parameters a model has and how many FLOPs a token costs, exactly, from its shapes alone; no torch.

A matrix of n weights costs 2n FLOPs for every vector it multiplies, so what matters is how often a matrix is met.
The stages of a DLCM run at two rates. With c concepts per token (1/R on target, but the *realised* number is what
a step really computes):

- per token: encoder, boundary W_q and W_k, cross-attention W_Q and W_O, decoder, unembedding;
- per concept, hence c times per token: W_up, backbone, cross-attention W_K and W_V (before replication).

Attention maps (Q K^T and A V) come on top: 4 x heads x head_dim FLOPs for every pair of a query and a key. A causal
query of a document of L tokens meets (L + 1) / 2 keys on average, in the backbone (c L + 1) / 2 concepts. The
cross-attention is counted in its replicated form (section 4.1): as many keys as tokens. Counting whole squares
instead would call masked work useful. Over packed documents of unequal lengths these means stay exact if L is the
*token-weighted* mean length, sum(L^2) / sum(L).

Not counted, being vectors and not matrices: norms, rotary embeddings, pooling, smoothing, the softmaxes.
The backward pass costs twice the forward pass; recomputed activations are the price of memory, not useful work.

Axes: D token width, E concept width, H heads, K key-value heads, I FFN width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config import ModelConfig


@dataclass(frozen=True)
class MatrixParameters:
    """Weights of all matrices by stage. Norm gains are vectors: see `norm_parameters`."""

    embedding: int
    encoder: int
    boundary: int
    """W_q and W_k of Eq. 5, 0 for forms without parameters."""
    up_projection: int
    backbone: int
    cross_query_output: int
    """W_Q and W_O of the cross-attention: token rate."""
    cross_key_value: int
    """W_K and W_V of the cross-attention: concept rate."""
    decoder: int
    unembedding: int

    @property
    def cross_attention(self) -> int:
        return self.cross_query_output + self.cross_key_value

    @property
    def body(self) -> int:
        """The three stacks, without what connects them."""
        return self.encoder + self.backbone + self.decoder

    @property
    def non_embedding(self) -> int:
        """N of the scaling law; the ladder's names are these sizes."""
        return self.body + self.boundary + self.up_projection + self.cross_attention

    @property
    def total(self) -> int:
        return self.non_embedding + self.embedding + self.unembedding

    @property
    def backbone_share(self) -> float:
        """P of the scaling law: the backbone's share of the three stacks (of `total` it is much less)."""
        return self.backbone / self.body


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass per token, by what causes them."""

    body: float
    """Matrices of encoder, backbone and decoder."""
    connections: float
    """Boundary, W_up and cross-attention matrices."""
    unembedding: float
    attention_maps: float

    @property
    def total(self) -> float:
        return self.body + self.connections + self.unembedding + self.attention_maps


def _layer_parameters(width: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> int:
    attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim
    return attention + 3 * width * ffn


def matrix_parameters(config: ModelConfig) -> MatrixParameters:
    """Counts every matrix of the model; a dense model has a decoder only."""
    d, e, head_dim = config.d_token, config.d_concept, config.head_dim
    token_layer = _layer_parameters(d, config.heads_token, config.kv_heads_token, head_dim, config.ffn_token)
    concept_layer = _layer_parameters(e, config.heads_concept, config.kv_heads_concept, head_dim, config.ffn_concept)
    dlcm = config.kind == "dlcm"
    return MatrixParameters(
        embedding=config.vocab_size * d,
        encoder=config.encoder_layers * token_layer if dlcm else 0,
        boundary=2 * d * d if dlcm and config.boundary.learned else 0,
        up_projection=d * e if dlcm else 0,
        backbone=config.backbone_layers * concept_layer if dlcm else 0,
        cross_query_output=2 * d * config.heads_token * head_dim if dlcm else 0,
        cross_key_value=2 * e * config.kv_heads_token * head_dim if dlcm else 0,
        decoder=config.decoder_layers * token_layer,
        unembedding=config.vocab_size * d,
    )


def norm_parameters(config: ModelConfig) -> int:
    """Gains of all RMSNorms: two a layer, one after backbone and decoder, four around the cross-attention."""
    d, e = config.d_token, config.d_concept
    decoder = (2 * config.decoder_layers + 1) * d
    if config.kind == "dense":
        return decoder
    backbone = (2 * config.backbone_layers + 1) * e
    cross_attention = d + e + 2 * config.head_dim
    return 2 * config.encoder_layers * d + backbone + cross_attention + decoder


def forward_flops(
    config: ModelConfig, document_tokens: float, concepts_per_token: float | None = None
) -> ForwardFlops:
    """Forward FLOPs per token in documents of `document_tokens` tokens (token-weighted mean).

    `concepts_per_token` is the realised number of concepts divided by that of tokens; without it the target 1/R is
    assumed. A dense model has no concepts and does not read it.
    """
    if concepts_per_token is None:
        concepts_per_token = 1 / config.boundary.target_ratio
    if not 0 < concepts_per_token <= 1:
        raise ValueError(f"concepts_per_token = {concepts_per_token!r}: must lie in (0, 1]; "
                         "pass concepts divided by tokens, not tokens per concept")
    if not document_tokens >= 1:
        raise ValueError(f"document_tokens = {document_tokens!r}: a document has at least one token")

    weights = matrix_parameters(config)
    token_map = 4 * config.heads_token * config.head_dim * (document_tokens + 1) / 2
    maps = config.decoder_layers * token_map
    if config.kind == "dlcm":
        document_concepts = max(1.0, document_tokens * concepts_per_token)
        concept_map = 4 * config.heads_concept * config.head_dim * (document_concepts + 1) / 2
        maps += (config.encoder_layers + 1) * token_map  # + 1: the replicated cross-attention
        maps += concepts_per_token * config.backbone_layers * concept_map
    per_token = weights.boundary + weights.cross_query_output
    per_concept = weights.up_projection + weights.cross_key_value
    return ForwardFlops(
        body=2 * (weights.encoder + weights.decoder + concepts_per_token * weights.backbone),
        connections=2 * (per_token + concepts_per_token * per_concept),
        unembedding=2 * weights.unembedding,
        attention_maps=maps,
    )


def forward_flops_per_token(
    config: ModelConfig, document_tokens: float, concepts_per_token: float | None = None
) -> float:
    """Sum of `forward_flops`."""
    return forward_flops(config, document_tokens, concepts_per_token).total


def training_flops_per_token(
    config: ModelConfig, document_tokens: float, concepts_per_token: float | None = None
) -> float:
    """Forward and backward: three times the forward pass."""
    return 3 * forward_flops_per_token(config, document_tokens, concepts_per_token)
