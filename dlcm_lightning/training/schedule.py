"""The learning rate as a function of consumed tokens: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dlcm_lightning.config import OptimConfig


def learning_rate_factor(tokens: int, config: OptimConfig) -> float:
    """Share of the peak rate after `tokens` tokens: linear warm-up, then

    wsd: one, and a linear fall to `final_fraction` over the last `decay_fraction` of the run;
    cosine: half a cosine from one to `final_fraction`.
    """
    if tokens < config.warmup_tokens:
        return tokens / config.warmup_tokens
    tokens = min(tokens, config.total_tokens)
    if config.schedule == "cosine":
        length = max(1, config.total_tokens - config.warmup_tokens)
        shape = (1 + math.cos(math.pi * (tokens - config.warmup_tokens) / length)) / 2
    else:
        decay = config.decay_fraction * config.total_tokens
        shape = min(1.0, (config.total_tokens - tokens) / decay) if decay > 0 else 1.0
    return config.final_fraction + (1 - config.final_fraction) * shape
