"""The oracle: a Dynamic Large Concept Model as slow, obvious loops over ONE document.

Everything the package does fast (packed documents, scans, fused and replicated attention, caches) is written here a
second time, straight from the paper (arXiv 2512.24617v2), one token, one head and one concept at a time, and the
tests hold the two against each other. So this file shares nothing with `dlcm_lightning.model` and
`dlcm_lightning.ops` but the names in the state dict. It is plain torch, differentiable by autograd, and computes
in whatever floating type the state has; tests use float64. Never make it faster: a loop that can be read is the point.

Where the paper is silent or would leak the next token, this is the reading:

* A boundary token CLOSES its concept. With boundaries at phi(1) = first token < phi(2) < ..., concept k is the mean of
  the tokens (phi(k-1), phi(k)], and it is visible from phi(k) on. Tokens after the last boundary are never pooled.
      <s>  The  cat  sat  on  the  mat       boundaries at <s>, cat, on
      `C1  `---C2--  `--C3--  `-unpooled     at "cat" the decoder already sees C2 and predicts "sat"
* Concept replication (Eq. 17) is not Eq. 14: key position i carries the newest concept visible at i, so concept m
  weighs n_m(t) exp(q.k_m), n_m(t) being the number of positions i <= t that carry it.
  `cross_attention_by_replicas` and `cross_attention_by_counts` say this in two ways.
* The language-model loss never reaches the boundary: the decision is discrete and the smoothing gate is detached.

One document per call: packing is then a loop over documents in the caller, and nothing can cross between them.

Axes: T tokens of the document, M its concepts, D = d_token, E = d_concept, H query heads, K key-value heads,
hd = head_dim, I FFN width, V vocabulary, R target tokens per concept. "width" is D or E, whichever stack is meant.
Token and concept indices count from 0 in code; the equations of the paper count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm_lightning.config import BoundaryConfig, ModelConfig

State = dict[str, Tensor]

COSINE_EPSILON = 1e-8
"""NgramBaseline under the PRODUCT of the two norms (not under each of them) in every cosine."""
GATE_EPSILON = 1e-4
"""The smoothing gate is clamped to [GATE_EPSILON, 1 - GATE_EPSILON]."""
IGNORE_INDEX = -100
"""Target of a token that predicts nothing. Any negative target is read this way."""


@dataclass(frozen=True)
class ReferenceOutput:
    """Everything worth comparing about one document, in the order in which it is computed."""

    hidden: Tensor
    """(T, D) encoder output, H of Eq. 1."""
    p: Tensor
    """(T,) boundary probability, Eq. 6 (after the bias, where the form has one); exactly 1 at the first token."""
    boundaries: Tensor
    """(T,) bool, b of Eq. 6; True at the first token."""
    closing: list[int]
    """M token indices phi(1) < phi(2) < ...: the boundary tokens, each closing its concept."""
    newest: list[int]
    """T concept indices j(t) - 1: the newest concept token t may see."""
    concepts: Tensor
    """(M, E) pooled and projected, C of Eq. 2 and 7."""
    backbone: Tensor
    """(M, E) backbone output after its final norm, Z of Eq. 3."""
    smoothed: Tensor
    """(M, E) Z~ of Eq. 11."""
    cross: Tensor
    """(T, D) output of the cross-attention, before H is added."""
    logits: Tensor
    """(T, V) scaled by 1 / s_token."""


@dataclass(frozen=True)
class ReferenceLosses:
    """Scalars of one global batch."""

    cross_entropy: Tensor
    """Nats per target, mean over all targets of all documents."""
    rate: Tensor
    """L_rate of Eq. 10."""
    total: Tensor
    """Eq. 15: cross_entropy + lambda * rate."""
    mean_p: Tensor
    """G of Eq. 8, over all tokens of all documents, whatever the scope of the rate loss."""
    mean_b: Tensor
    """F of Eq. 9, likewise."""


# ---------------------------------------------------------------------------------------------------------------
# LLaMA-like blocks
# ---------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x * rsqrt(mean x^2 + epsilon) * gain over the last axis. x: (..., n); gain: (n,)."""
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * gain


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x: (..., in); weight: (out, in) -> (..., out). There is no bias anywhere."""
    return x @ weight.T


def rotate(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary embedding of one position, half-split pairing: component i turns with component i + hd/2 by the angle
    position * base^(-2i/hd). x: (heads, hd) -> (heads, hd)."""
    head_dim = x.shape[-1]
    half = head_dim // 2
    angles = [position * base ** (-2 * i / head_dim) for i in range(half)]
    cos = torch.tensor([math.cos(angle) for angle in angles], dtype=x.dtype, device=x.device)
    sin = torch.tensor([math.sin(angle) for angle in angles], dtype=x.dtype, device=x.device)
    first, second = x[:, :half], x[:, half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: Tensor, keys: Tensor, values: Tensor, log_counts: Tensor | None = None) -> Tensor:
    """One query of one head over everything it may see: softmax(q.k / sqrt(hd) + log_counts) applied to the values.
    query: (hd,); keys, values: (S, hd); log_counts: (S,) -> (hd,)."""
    scores = keys @ query / math.sqrt(query.shape[0])
    if log_counts is not None:
        scores = scores + log_counts
    return torch.softmax(scores, dim=0) @ values


def self_attention(x: Tensor, state: State, prefix: str, heads: int, kv_heads: int, config: ModelConfig) -> Tensor:
    """Causal grouped-query self-attention with RoPE; query head h reads key-value head h // (H / K).
    x: (n, width) -> (n, width), n tokens or n concepts, positions 0 .. n-1."""
    n, head_dim = x.shape[0], config.head_dim
    rows = linear(x, state[f"{prefix}.qkv.weight"])  # (n, (H + 2K) hd): all queries, then all keys, then all values
    rows = rows.reshape(n, heads + 2 * kv_heads, head_dim)
    queries, keys, values = rows[:, :heads], rows[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]
    queries = torch.stack([rotate(queries[i], i, config.rope_base) for i in range(n)])
    keys = torch.stack([rotate(keys[i], i, config.rope_base) for i in range(n)])
    mixed = []
    for i in range(n):
        of_heads = []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            of_heads.append(attend(queries[i, head], keys[: i + 1, kv], values[: i + 1, kv]))
        mixed.append(torch.cat(of_heads))
    return linear(torch.stack(mixed), state[f"{prefix}.out.weight"])


def swiglu(x: Tensor, state: State, prefix: str) -> Tensor:
    """down(silu(gate x) * up x); gate_up holds the rows of gate, then those of up. x: (n, width) -> (n, width)."""
    gate, up = linear(x, state[f"{prefix}.gate_up.weight"]).chunk(2, dim=-1)
    return linear(gate * torch.sigmoid(gate) * up, state[f"{prefix}.down.weight"])


def stack(x: Tensor, state: State, name: str, layers: int, heads: int, kv_heads: int, config: ModelConfig) -> Tensor:
    """Pre-norm transformer layers, without the final norm. x: (n, width) -> (n, width)."""
    on_stream = config.backbone_layers if name == "backbone" else config.decoder_layers
    if name != "backbone" and config.kind == "dlcm":
        on_stream = on_stream + config.encoder_layers
    branch = (on_stream / config.mup.base_layers) ** -config.mup.depth_exponent
    for i in range(layers):
        prefix = f"{name}.layers.{i}"
        normed = rms_norm(x, state[f"{prefix}.attention_norm.weight"], config.norm_epsilon)
        x = x + branch * self_attention(normed, state, f"{prefix}.attention", heads, kv_heads, config)
        normed = rms_norm(x, state[f"{prefix}.ffn_norm.weight"], config.norm_epsilon)
        x = x + branch * swiglu(normed, state, f"{prefix}.ffn")
    return x


def encode(state: State, config: ModelConfig, tokens: Tensor) -> Tensor:
    """H = Encoder(x), Eq. 1; no final norm. tokens: (T,) int64 -> (T, D)."""
    x = state["embedding.weight"][tokens]
    return stack(x, state, "encoder", config.encoder_layers, config.heads_token, config.kv_heads_token, config)


def run_backbone(state: State, config: ModelConfig, concepts: Tensor) -> Tensor:
    """Z = Backbone(C), Eq. 3: causal over concepts, RoPE counts concepts, final norm. (M, E) -> (M, E)."""
    z = stack(concepts, state, "backbone", config.backbone_layers, config.heads_concept, config.kv_heads_concept,
              config)
    return rms_norm(z, state["backbone.norm.weight"], config.norm_epsilon)


def decode(state: State, config: ModelConfig, x: Tensor) -> Tensor:
    """Decoder layers, final norm, unembedding, 1 / s_token. x: (T, D) -> (T, V)."""
    x = stack(x, state, "decoder", config.decoder_layers, config.heads_token, config.kv_heads_token, config)
    x = rms_norm(x, state["decoder.norm.weight"], config.norm_epsilon)
    return linear(x, state["unembedding.weight"]) / config.s_token


# ---------------------------------------------------------------------------------------------------------------
# Boundary
# ---------------------------------------------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a.b / max(|a| |b|, COSINE_EPSILON). a, b: (n,) -> ()."""
    norms: Tensor = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return (a @ b) / norms.clamp_min(COSINE_EPSILON)


def centre(hidden: Tensor, prior_mean: Tensor, prior_tokens: float) -> Tensor:
    """h_t - mean_t with mean_t = (n0 * prior_mean + sum_{i<=t} h_i) / (n0 + t), t from 1. The mean includes h_t itself
    and carries no gradient. hidden: (T, D); prior_mean: (D,) -> (T, D)."""
    total, features = prior_tokens * prior_mean, []
    for t in range(hidden.shape[0]):
        total = total + hidden[t]
        mean = total / (prior_tokens + t + 1)
        features.append(hidden[t] - mean.detach())
    return torch.stack(features)


def shift_odds(p: Tensor, delta: Tensor) -> Tensor:
    """sigmoid(logit p + delta), written so that 0 and 1 stay exactly where they are. p: () ; delta: () -> ()."""
    return p * torch.exp(delta) / (1 - p + p * torch.exp(delta))


def boundary_probabilities(state: State, config: ModelConfig, hidden: Tensor) -> Tensor:
    """p, Eq. 5-6, for every form; what the forms `rule` and `fixed` decide is their p. hidden: (T, D) -> (T,)."""
    boundary, length = config.boundary, hidden.shape[0]
    one = hidden.new_ones(())
    if boundary.form == "fixed":
        return torch.stack([one if t % int(boundary.target_ratio) == 0 else 0 * one for t in range(length)])
    if boundary.form == "rule":
        p = [one]
        for t in range(1, length):
            apart = bool(cosine(hidden[t - 1], hidden[t]) < boundary.rule_threshold)
            p.append(one if apart else 0 * one)
        return torch.stack(p)

    features = hidden
    if boundary.form in ("centred", "both"):
        features = centre(hidden, state["boundary.prior_mean"], boundary.centre_prior_tokens)
    queries = linear(features, state["boundary.query.weight"])
    keys = linear(features, state["boundary.key.weight"])
    p = [one]
    for t in range(1, length):
        p.append((1 - cosine(queries[t - 1], keys[t])) / 2)
    if boundary.form in ("biased", "both"):
        p = [shift_odds(each, state["boundary.rate_bias"]) for each in p]
    return torch.stack(p)


def sharpen(p: Tensor, tau: float) -> Tensor:
    """p^(1/tau) from one half on, 1 - (1-p)^(1/tau) below (ConceptMoE Eq. 5). p: () -> ()."""
    if p >= 0.5:
        return p ** (1 / tau)
    return 1 - (1 - p) ** (1 / tau)


def threshold_of(state: State, boundary: BoundaryConfig) -> float:
    """What p is compared with at inference: one half in the paper; or a saved number, kept as its log-odds."""
    if boundary.learned and boundary.threshold == "calibrated":
        return 1 / (1 + math.exp(-state["boundary.threshold"].item()))
    return 0.5


def decide(p: Tensor, noise: Tensor | None, boundary: BoundaryConfig, threshold: float = 0.5) -> Tensor:
    """b: True at the first token; elsewhere noise_t < sharpened p_t in training, p_t >= threshold where noise is None.
    p, noise: (T,) -> (T,) bool."""
    decisions = [True]
    for t in range(1, p.shape[0]):
        if noise is None:
            decisions.append(bool(p[t] >= threshold))
        else:
            decisions.append(bool(noise[t] < sharpen(p[t].detach(), boundary.sharpening)))
    return torch.tensor(decisions, device=p.device)


# ---------------------------------------------------------------------------------------------------------------
# Concepts
# ---------------------------------------------------------------------------------------------------------------


def segment(boundaries: Tensor) -> tuple[list[int], list[int]]:
    """Boundaries (T,) bool -> (closing, newest): the M closing tokens, and per token the newest visible concept,
    j(t) - 1 of Eq. 14."""
    closing: list[int] = []
    newest: list[int] = []
    for t, is_boundary in enumerate(boundaries.tolist()):
        if is_boundary:
            closing.append(t)
        newest.append(len(closing) - 1)
    return closing, newest


def pool(hidden: Tensor, closing: Sequence[int], up: Tensor) -> Tensor:
    """Concept k: the mean of h over (phi(k-1), phi(k)], then W_up (Eq. 2, 7). hidden: (T, D); up: (E, D) -> (M, E)."""
    concepts, start = [], 0
    for last in closing:
        concepts.append(linear(hidden[start : last + 1].mean(dim=0), up))
        start = last + 1
    return torch.stack(concepts)


def smooth(z: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Eq. 11: z~_1 = z_1; z~_m = g_m z_m + (1 - g_m) z~_{m-1}, g the closing token's p, detached and clamped.
    z: (M, E); gates: M scalars (the first has no effect) -> (M, E)."""
    smoothed = [z[0]]
    for m in range(1, z.shape[0]):
        gate = gates[m].detach().clamp(GATE_EPSILON, 1 - GATE_EPSILON)
        smoothed.append(gate * z[m] + (1 - gate) * smoothed[m - 1])
    return torch.stack(smoothed)


# ---------------------------------------------------------------------------------------------------------------
# Cross-attention, Eq. 12-17
# ---------------------------------------------------------------------------------------------------------------


def project_cross(state: State, config: ModelConfig, hidden: Tensor, smoothed: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, hd) from H, keys and values (M, K, hd) from Z~ (Eq. 12): both inputs are pre-normed, queries and
    keys get an RMSNorm per head whose gain all heads share; no RoPE."""
    prefix, epsilon, head_dim = "cross_attention", config.norm_epsilon, config.head_dim
    of_tokens = rms_norm(hidden, state[f"{prefix}.token_norm.weight"], epsilon)
    of_concepts = rms_norm(smoothed, state[f"{prefix}.concept_norm.weight"], epsilon)
    queries = linear(of_tokens, state[f"{prefix}.query.weight"]).reshape(-1, config.heads_token, head_dim)
    keys = linear(of_concepts, state[f"{prefix}.key.weight"]).reshape(-1, config.kv_heads_token, head_dim)
    values = linear(of_concepts, state[f"{prefix}.value.weight"]).reshape(-1, config.kv_heads_token, head_dim)
    queries = rms_norm(queries, state[f"{prefix}.query_head_norm.weight"], epsilon)
    keys = rms_norm(keys, state[f"{prefix}.key_head_norm.weight"], epsilon)
    return queries, keys, values


def cross_attention_by_replicas(state: State, config: ModelConfig, hidden: Tensor, smoothed: Tensor,
                                newest: Sequence[int]) -> Tensor:
    """Eq. 17 to the letter: position i holds a copy of the newest concept visible at i, and token t attends causally to
    positions 0 .. t. hidden: (T, D); smoothed: (M, E) -> (T, D), without the residual."""
    queries, keys, values = project_cross(state, config, hidden, smoothed)
    keys = torch.stack([keys[m] for m in newest])  # (T, K, hd)
    values = torch.stack([values[m] for m in newest])
    mixed = []
    for t in range(hidden.shape[0]):
        of_heads = []
        for head in range(config.heads_token):
            kv = head // (config.heads_token // config.kv_heads_token)
            of_heads.append(attend(queries[t, head], keys[: t + 1, kv], values[: t + 1, kv]))
        mixed.append(torch.cat(of_heads))
    return linear(torch.stack(mixed), state["cross_attention.out.weight"])


def cross_attention_by_counts(state: State, config: ModelConfig, hidden: Tensor, smoothed: Tensor,
                              newest: Sequence[int]) -> Tensor:
    """The same without copies: token t attends to concepts 0 .. newest[t], each with log n_m(t) added to its score,
    n_m(t) the number of positions i <= t whose newest concept is m. Shapes as above."""
    queries, keys, values = project_cross(state, config, hidden, smoothed)
    mixed = []
    for t in range(hidden.shape[0]):
        visible = newest[t] + 1
        counts = [list(newest[: t + 1]).count(m) for m in range(visible)]
        log_counts = torch.tensor([math.log(count) for count in counts], dtype=hidden.dtype, device=hidden.device)
        of_heads = []
        for head in range(config.heads_token):
            kv = head // (config.heads_token // config.kv_heads_token)
            of_heads.append(attend(queries[t, head], keys[:visible, kv], values[:visible, kv], log_counts))
        mixed.append(torch.cat(of_heads))
    return linear(torch.stack(mixed), state["cross_attention.out.weight"])


# ---------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------


def forward(state: State, config: ModelConfig, tokens: Tensor, noise: Tensor | None = None) -> ReferenceOutput:
    """One document through the four stages, Eq. 1-4. tokens: (T,) int64, T >= 1; noise: (T,) in [0, 1), or None for
    the thresholded decisions of inference."""
    hidden = encode(state, config, tokens)
    p = boundary_probabilities(state, config, hidden)
    boundaries = decide(p, noise, config.boundary, threshold_of(state, config.boundary))
    closing, newest = segment(boundaries)
    concepts = pool(hidden, closing, state["pool.up.weight"])
    backbone = run_backbone(state, config, concepts)
    smoothed = smooth(backbone, [p[t] for t in closing])
    cross = cross_attention_by_replicas(state, config, hidden, smoothed, newest)
    logits = decode(state, config, cross + hidden)
    return ReferenceOutput(hidden=hidden, p=p, boundaries=boundaries, closing=closing, newest=newest,
                           concepts=concepts, backbone=backbone, smoothed=smoothed, cross=cross, logits=logits)


def dense_forward(state: State, config: ModelConfig, tokens: Tensor) -> Tensor:
    """The LLaMA baseline: embedding, decoder, unembedding. tokens: (T,) int64 -> logits (T, V)."""
    return decode(state, config, state["embedding.weight"][tokens])


# ---------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------


def next_tokens(tokens: Tensor) -> Tensor:
    """Targets of a whole document: the next token, none for the last. (T,) -> (T,)."""
    return torch.cat([tokens[1:], tokens.new_tensor([IGNORE_INDEX])])


def cross_entropy(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum over all targets of all documents, divided once by their number, in nats. logits: (T, V) and targets: (T,)
    per document; there must be at least one target."""
    terms = []
    for of_document, wanted in zip(logits, targets, strict=True):
        for t, target in enumerate(wanted.tolist()):
            if target >= 0:
                terms.append(torch.logsumexp(of_document[t], dim=0) - of_document[t, target])
    return torch.stack(terms).sum() / len(terms)


def rate_loss(mean_b: Tensor, mean_p: Tensor, ratio: float) -> Tensor:
    """Eq. 10: R/(R-1) * [(R-1) F G + (1-F)(1-G)] - 1. A saddle at F = G = 1/R, where it is 0; it can be negative."""
    return ratio / (ratio - 1) * ((ratio - 1) * mean_b * mean_p + (1 - mean_b) * (1 - mean_p)) - 1


def losses(outputs: Sequence[ReferenceOutput], targets: Sequence[Tensor], config: ModelConfig,
           previous_rate: float | None = None) -> ReferenceLosses:
    """Losses of a global batch given as its documents (a piece of a document in a row is one; no padding rows).

    rate_scope `global` (the "Global Parser"): F and G are means over all tokens of the batch, Eq. 8-9.
    rate_scope `document` ("Normal"): Eq. 10 per document, then the mean over documents, short and long alike.
    previous_rate, if given, stands in for F in the global form: then dL/dp_t = lambda R/(R-1) (R previous_rate - 1) / T
    over all T tokens of the batch. 1/R makes that 0, as at the first step of a run. targets: (T,) per document."""
    boundary, ratio = config.boundary, config.boundary.target_ratio
    p = torch.cat([output.p for output in outputs])
    b = torch.cat([output.boundaries for output in outputs]).to(p.dtype)
    mean_p, mean_b = p.sum() / p.shape[0], b.sum() / b.shape[0]
    if boundary.rate_scope == "global":
        rate = rate_loss(mean_b if previous_rate is None else p.new_tensor(previous_rate), mean_p, ratio)
    else:
        rate = torch.stack([rate_loss(output.boundaries.to(p.dtype).mean(), output.p.mean(), ratio)
                            for output in outputs]).mean()
    of_tokens = cross_entropy([output.logits for output in outputs], targets)
    return ReferenceLosses(cross_entropy=of_tokens, rate=rate, total=of_tokens + boundary.rate_weight * rate,
                           mean_p=mean_p, mean_b=mean_b)


# ---------------------------------------------------------------------------------------------------------------
# States for tests
# ---------------------------------------------------------------------------------------------------------------


def state_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and float buffer of the model that `config` describes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add_stack(name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, final_norm: bool) -> None:
        for i in range(layers):
            prefix = f"{name}.layers.{i}"
            shapes[f"{prefix}.attention_norm.weight"] = (width,)
            shapes[f"{prefix}.attention.qkv.weight"] = ((heads + 2 * kv_heads) * config.head_dim, width)
            shapes[f"{prefix}.attention.out.weight"] = (width, heads * config.head_dim)
            shapes[f"{prefix}.ffn_norm.weight"] = (width,)
            shapes[f"{prefix}.ffn.gate_up.weight"] = (2 * ffn, width)
            shapes[f"{prefix}.ffn.down.weight"] = (width, ffn)
        if final_norm:
            shapes[f"{name}.norm.weight"] = (width,)

    vocabulary, d, e, hd = config.vocab_size, config.d_token, config.d_concept, config.head_dim
    token_stack = (d, config.heads_token, config.kv_heads_token, config.ffn_token)
    shapes["embedding.weight"] = (vocabulary, d)
    if config.kind == "dlcm":
        add_stack("encoder", config.encoder_layers, *token_stack, final_norm=False)
        if config.boundary.learned:
            shapes["boundary.query.weight"] = shapes["boundary.key.weight"] = (d, d)
            shapes["boundary.threshold"] = ()
        if config.boundary.biased:
            shapes["boundary.rate_bias"] = ()
        if config.boundary.centred:
            shapes["boundary.prior_mean"] = (d,)
        shapes["pool.up.weight"] = (e, d)
        add_stack("backbone", config.backbone_layers, e, config.heads_concept, config.kv_heads_concept,
                  config.ffn_concept, final_norm=True)
        shapes["cross_attention.token_norm.weight"] = (d,)
        shapes["cross_attention.concept_norm.weight"] = (e,)
        shapes["cross_attention.query.weight"] = (config.heads_token * hd, d)
        shapes["cross_attention.key.weight"] = (config.kv_heads_token * hd, e)
        shapes["cross_attention.value.weight"] = (config.kv_heads_token * hd, e)
        shapes["cross_attention.out.weight"] = (d, config.heads_token * hd)
        shapes["cross_attention.query_head_norm.weight"] = (hd,)
        shapes["cross_attention.key_head_norm.weight"] = (hd,)
    add_stack("decoder", config.decoder_layers, *token_stack, final_norm=True)
    shapes["unembedding.weight"] = (vocabulary, d)
    return shapes


def random_state(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> State:
    """A state in which every term matters: gains away from 1, delta, threshold and prior_mean away from 0, W_q and W_k
    near but not at the identity, logits of order 1 / s_token. Embeddings share one axis with random signs, so that the
    cosine of neighbours, hence p, spreads over most of its range in every form. Drawn in float64, then cast: one seed
    is one model in every type. This is not the initialisation of training."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    state: State = {}
    for name, shape in state_shapes(config).items():
        if name == "embedding.weight":
            tensor = normal(*shape) + 1.5 * normal(shape[0], 1) * normal(1, shape[1])
        elif name == "boundary.rate_bias":
            tensor = torch.tensor(-0.4, dtype=torch.float64)
        elif name == "boundary.threshold":
            tensor = torch.tensor(0.3, dtype=torch.float64)
        elif name == "boundary.prior_mean":
            tensor = 0.5 * normal(*shape)
        elif name.startswith("boundary."):
            tensor = torch.eye(shape[0], dtype=torch.float64) + 0.5 * normal(*shape) / math.sqrt(shape[1])
        elif len(shape) == 1:
            tensor = 1 + 0.2 * normal(*shape)
        else:
            tensor = normal(*shape) / math.sqrt(shape[1])
        state[name] = tensor.to(dtype)
    return state
