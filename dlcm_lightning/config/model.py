"""Knobs of the model: shapes, segmentation, widths at which the base rates hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dlcm_lightning.config.checks import require, require_member, require_positive, require_range

BoundaryForm = Literal["paper", "centred", "biased", "both", "rule", "fixed"]
Threshold = Literal["calibrated", "half"]
AttentionBackend = Literal["auto", "flex", "varlen", "flash4", "flash3", "flash", "sdpa", "reference"]
WIDEST, MOST_LAYERS = 2**24, 10_000
"""What no model comes near, and arithmetic on shapes still holds."""


@dataclass(frozen=True)
class BoundaryConfig:
    """How a document is cut into concepts (sections 3.2-3.3) and how the cut is steered towards its target."""

    form: BoundaryForm = "both"
    """paper: Eq. 5-6 to the letter. centred: W_q, W_k read features minus their causal running mean.
    biased: the paper's p shifted by a controlled log-odds bias. both: centred and biased.
    rule: cosine of neighbouring states against `rule_threshold`, no parameters. fixed: every R-th token."""
    target_ratio: float = 4.0
    """R, tokens per concept the rate loss and the bias aim at (Eq. 10)."""
    rate_weight: float = 0.03
    """lambda of Eq. 15. The paper prints none; H-Net and ConceptMoE use 0.03."""
    rate_scope: Literal["global", "document"] = "global"
    """global: F and G are means over the whole global batch ("Global Parser"). document: the same formula per
    document, then averaged over documents ("Normal", the ablation of Table 4)."""
    previous_rate: bool = False
    """Take F of the previous optimizer step in the rate loss even where one micro-batch a step would allow the
    current one. Always so with several micro-batches a step: only then is the gradient independent of the split."""
    sharpening: float = 6.0
    """tau: training samples from p^(1/tau) above one half, mirrored below (ConceptMoE Eq. 5)."""
    centre_prior_tokens: float = 8.0
    """Weight, in tokens, of the prior in the causal running mean of a document (forms centred and both)."""
    bias_step: float = 0.2
    """Gain of the rate bias: delta += bias_step * log((1/R) / F) after every optimizer step (biased and both)."""
    threshold: Threshold = "calibrated"
    """What p is compared with where boundaries are not drawn: in validation, generation, evaluation and every export.
    half: 1/2, the paper's. calibrated: a threshold that training steers so that as many p lie above it as the target
    says. It is steered and saved either way, and no gradient depends on it."""
    threshold_step: float = 0.1
    """Gain of the calibrated threshold: its log-odds += threshold_step * log(R x the share of p above it) after every
    optimizer step. Less where p hardly spreads, and at most threshold_step at a time."""
    rule_threshold: float = 0.5
    """Form `rule`: a token is a boundary where cos(h_{t-1}, h_t) falls below this value."""

    def __post_init__(self) -> None:
        require_member("model.boundary.form", self.form, BoundaryForm)
        require(self.target_ratio > 1, "model.boundary.target_ratio", self.target_ratio,
                "tokens per concept must be above 1 (the rate loss divides by R - 1)")
        require_range("model.boundary.target_ratio", self.target_ratio, 1, 2**20)
        require_range("model.boundary.rate_weight", self.rate_weight, 0, 10**6)
        require_range("model.boundary.sharpening", self.sharpening, 1, 10**6)
        require_positive("model.boundary.centre_prior_tokens", self.centre_prior_tokens, 10**9)
        require_positive("model.boundary.bias_step", self.bias_step, 10**3)
        require_member("model.boundary.threshold", self.threshold, Threshold)
        require_positive("model.boundary.threshold_step", self.threshold_step, 10**3)
        require(-1 <= self.rule_threshold <= 1, "model.boundary.rule_threshold", self.rule_threshold,
                "a cosine lies between -1 and 1")
        if self.form == "fixed":
            require(self.target_ratio == int(self.target_ratio), "model.boundary.target_ratio", self.target_ratio,
                    "form `fixed` needs a whole number of tokens")

    @property
    def learned(self) -> bool:
        """Whether the segmentation has parameters of its own."""
        return self.form in ("paper", "centred", "biased", "both")

    @property
    def centred(self) -> bool:
        return self.form in ("centred", "both")

    @property
    def biased(self) -> bool:
        return self.form in ("biased", "both")


@dataclass(frozen=True)
class MupConfig:
    """Decoupled muP (section 6.1): widths at which the base rates and the base variance hold."""

    d_base: int = 256
    """Width at which s = 1 for the token and the concept stacks alike."""
    sigma: float = 1 / 16
    """Standard deviation of hidden matrices at the base width (variance 1/256)."""
    sigma_embedding: float = 0.02
    """Standard deviation of embedding and unembedding, at every width."""
    depth_exponent: float = 0.0
    """How residual branches shrink with depth: with L layers on a residual stream, each branch is multiplied by
    (L / base_layers)^-depth_exponent, and rates, decays and epsilons of the layers follow (CompleteP is 1; model/mup.py
    has the table). 0: depth changes nothing, as in the paper."""
    base_layers: int = 16
    """Layers at which the base rates hold, on the tokens' stream (encoder and decoder together) and on the concepts'
    alike. Read only where depth_exponent is not 0."""

    def __post_init__(self) -> None:
        require_range("model.mup.d_base", self.d_base, 1, WIDEST)
        require_positive("model.mup.sigma", self.sigma, 10**3)
        require_positive("model.mup.sigma_embedding", self.sigma_embedding, 10**3)
        require_range("model.mup.depth_exponent", self.depth_exponent, 0, 1)
        require_range("model.mup.base_layers", self.base_layers, 1, MOST_LAYERS)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of a four-stage DLCM, or of the dense LLaMA baseline built from the same blocks (Table 3)."""

    kind: Literal["dlcm", "dense"] = "dlcm"
    """dense uses `decoder_layers` and the token widths only."""
    vocab_size: int = 128_815
    """V, rows of the embedding and of the unembedding."""
    d_token: int = 1536
    """D, width of encoder and decoder."""
    d_concept: int = 3072
    """E, width of the backbone."""
    encoder_layers: int = 10
    backbone_layers: int = 16
    decoder_layers: int = 6
    heads_token: int = 24
    """H of encoder, decoder and cross-attention."""
    kv_heads_token: int = 12
    """K of encoder, decoder and cross-attention."""
    heads_concept: int = 48
    kv_heads_concept: int = 24
    head_dim: int = 64
    """Width of one head, everywhere."""
    ffn_token: int = 6144
    """I of encoder and decoder."""
    ffn_concept: int = 6144
    """I of the backbone."""
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    attention: AttentionBackend = "auto"
    """auto picks what the machine has: on a GPU flex with `train.compile`, else varlen, else FlashAttention 4, 3 or 2;
    sdpa on a CPU."""
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    mup: MupConfig = field(default_factory=MupConfig)

    def __post_init__(self) -> None:
        require_member("model.kind", self.kind, Literal["dlcm", "dense"])
        require_member("model.attention", self.attention, AttentionBackend)
        for name in ("vocab_size", "d_token", "d_concept", "heads_token", "kv_heads_token", "heads_concept",
                     "kv_heads_concept", "ffn_token", "ffn_concept"):
            require_range(f"model.{name}", getattr(self, name), 1, WIDEST)
        for name in ("decoder_layers", "encoder_layers", "backbone_layers"):
            least = 0 if self.kind == "dense" and name != "decoder_layers" else 1
            require_range(f"model.{name}", getattr(self, name), least, MOST_LAYERS)
        require(0 < self.head_dim <= WIDEST and self.head_dim % 2 == 0, "model.head_dim", self.head_dim,
                "rotary embeddings need an even head width")
        for stack in ("token", "concept"):
            heads, kv_heads = getattr(self, f"heads_{stack}"), getattr(self, f"kv_heads_{stack}")
            require(heads % kv_heads == 0, f"model.kv_heads_{stack}", kv_heads,
                    f"must divide model.heads_{stack} = {heads}")
        require_positive("model.norm_epsilon", self.norm_epsilon, 1)
        require_positive("model.rope_base", self.rope_base, 1e12)

    @property
    def s_token(self) -> float:
        """Width multiplier of the token stacks, D / d_base."""
        return self.d_token / self.mup.d_base

    @property
    def s_concept(self) -> float:
        """Width multiplier of the backbone, E / d_base."""
        return self.d_concept / self.mup.d_base

    @property
    def m_token(self) -> float:
        """Depth multiplier of the tokens' residual stream, which runs through encoder and decoder."""
        layers = self.decoder_layers + (self.encoder_layers if self.kind == "dlcm" else 0)
        return layers / self.mup.base_layers

    @property
    def m_concept(self) -> float:
        """Depth multiplier of the backbone."""
        return self.backbone_layers / self.mup.base_layers
