"""FLOPs of a token: this model against a dense one, while reading (prefill) and while writing (decode).

*The dense partner* is made as the paper's Table 3 makes its own: the same width D, heads of the token stacks with as
many key-value heads, as many layers as the three stacks have together, and an FFN as wide as it takes for equal matrix
weights per token in the body,

    layers (4 D H d + 3 D I) = encoder + decoder + backbone / R

For Table 3 that gives exactly the printed baseline: 32 layers, I = 4096. Elsewhere I is no whole number, which a count
does not mind. The partner is made once, at the model's target R, and kept while R varies.

*Prefill* is the mean over the tokens of a text, by `flops.forward_flops`: cross-attention replicated, as many keys as
tokens; with the head on every token (`score`, as in training and evaluation), or without it (`prefill`: a server needs
it once a text). *Decode* is one more token after a text of L tokens, caches full: every attention meets L keys, in the
backbone L / R concepts and once in R tokens; cross-attention meets L / R concepts, with their counts of replicas as
weights. FLOPs are no time: decoding is bound by memory, and neither weights nor caches are counted here.

Axes: D token width, H heads, d head width, I FFN width, L tokens of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.flops import forward_flops, matrix_parameters

RATIOS = (2, 4, 8, 16)
CONTEXTS = tuple(2**power for power in range(10, 18))
TABLE_3 = ModelConfig()
"""The paper's model is what ModelConfig stands at."""
CLAIMED = 0.34
"""Share of inference FLOPs that the paper says are saved."""
CLAIM_CONTEXT = 8192
CLAIM_RATIOS = (2, 3, 4, 6, 8, 16, 32, 64)
Phase = Literal["score", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("score", "prefill", "decode")


@dataclass(frozen=True)
class DensePartner:
    """A dense model of equal matrix weights per token."""

    layers: int
    width: int
    heads: int
    head_dim: int
    ffn: float
    body: float
    """Matrix weights of its layers."""
    head: int
    """Of its unembedding."""

    def flops(self, phase: Phase, context: int) -> float:
        """Per token."""
        keys = context if phase == "decode" else (context + 1) / 2
        maps = self.layers * 4 * self.heads * self.head_dim * keys
        return 2 * self.body + maps + (0 if phase == "prefill" else 2 * self.head)


def dense_partner(config: ModelConfig) -> DensePartner:
    """Of a DLCM at its target R. Where so many layers of attention alone would weigh more than there is to spend, it
    has as many as leave it some FFN."""
    weights = matrix_parameters(config)
    body = weights.encoder + weights.decoder + weights.backbone / config.boundary.target_ratio
    attention = 4 * config.d_token * config.heads_token * config.head_dim
    layers = config.encoder_layers + config.backbone_layers + config.decoder_layers
    while layers > 1 and layers * (attention + 3 * config.d_token) > body:
        layers -= 1
    ffn = (body / layers - attention) / (3 * config.d_token)
    return DensePartner(layers, config.d_token, config.heads_token, config.head_dim, ffn, body, weights.unembedding)


def dlcm_flops(config: ModelConfig, phase: Phase, context: int, ratio: float) -> float:
    """Per token, at a realised number of tokens per concept."""
    counted = forward_flops(config, context, 1 / ratio)
    if phase != "decode":
        return counted.total - (counted.unembedding if phase == "prefill" else 0)
    concepts = max(1.0, context / ratio)
    token_map = 4 * config.heads_token * config.head_dim
    concept_map = 4 * config.heads_concept * config.head_dim
    maps = ((config.encoder_layers + config.decoder_layers) * token_map * context + token_map * concepts
            + config.backbone_layers * concept_map * concepts / ratio)
    return counted.body + counted.connections + counted.unembedding + maps


def compute(config: ModelConfig, realised: float | None) -> dict[str, Any]:
    """Costs over R and L, and what holds of the paper's claim. realised: tokens per concept on the validation rows;
    None for a dense model, which has no DLCM beside it: then the paper's model stands alone."""
    found: dict[str, Any] = {"contexts": list(CONTEXTS), "paper": claim()}
    if realised is not None:
        found["own"] = _costs(config, sorted({*map(float, RATIOS), config.boundary.target_ratio}), realised)
    return found


def _costs(config: ModelConfig, ratios: list[float], realised: float) -> dict[str, Any]:
    partner = dense_partner(config)
    lines = [{"ratio": ratio, "realised": False} for ratio in ratios] + [{"ratio": realised, "realised": True}]
    return {"target": config.boundary.target_ratio, "partner": _described(partner),
            "phases": {phase: {
                "dense": [partner.flops(phase, context) for context in CONTEXTS],
                "ratios": [{**line, "dlcm": [dlcm_flops(config, phase, context, line["ratio"]) for context in CONTEXTS],
                            "relative": [dlcm_flops(config, phase, context, line["ratio"])
                                         / partner.flops(phase, context) for context in CONTEXTS]}
                           for line in lines]} for phase in PHASES}}


def claim() -> dict[str, Any]:
    """Table 3's model at R = 4 against its baseline, and which R would save what is claimed."""
    partner = dense_partner(TABLE_3)
    target = TABLE_3.boundary.target_ratio

    def relative(phase: Phase, context: int, ratio: float) -> float:
        return dlcm_flops(TABLE_3, phase, context, ratio) / partner.flops(phase, context)

    weights, counted = matrix_parameters(TABLE_3), forward_flops(TABLE_3, CLAIM_CONTEXT)
    return {"claimed": CLAIMED, "target": target, "context": CLAIM_CONTEXT, "partner": _described(partner),
            "weights_per_token": {"dense": partner.body,
                                  "dlcm": weights.encoder + weights.decoder + weights.backbone / target,
                                  "same_parameters": weights.body},
            "backbone_share": 2 * weights.backbone / target / counted.body,
            "relative": {phase: [relative(phase, context, target) for context in CONTEXTS] for phase in PHASES},
            "at_context": {phase: relative(phase, CLAIM_CONTEXT, target) for phase in PHASES},
            "saved": {phase: 1 - relative(phase, CLAIM_CONTEXT, target) for phase in PHASES},
            "of_same_parameters": partner.body / weights.body, "ratios": list(CLAIM_RATIOS),
            "over_ratios": {phase: [relative(phase, CLAIM_CONTEXT, ratio) for ratio in CLAIM_RATIOS]
                            for phase in PHASES},
            "reached": {phase: next((ratio for ratio in CLAIM_RATIOS
                                     if relative(phase, CLAIM_CONTEXT, ratio) <= 1 - CLAIMED), None)
                        for phase in PHASES}}


def _described(partner: DensePartner) -> dict[str, Any]:
    return {"layers": partner.layers, "width": partner.width, "heads": partner.heads, "head_dim": partner.head_dim,
            "ffn": partner.ffn, "body": partner.body}
