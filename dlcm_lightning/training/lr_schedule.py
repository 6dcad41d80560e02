"""The learning rate as a function of consumed tokens, and as the scheduler that Lightning steps and monitors."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

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


SCHEDULE = ("total_tokens", "schedule", "warmup_tokens", "decay_fraction", "final_fraction")
"""The fields of `optim` that the schedule is made of."""


def same_rates_until(tokens: int, a: OptimConfig, b: OptimConfig) -> bool:
    """Whether two schedules give the same share of the peak up to so many tokens: they are the same, or both are
    warm-up-stable and neither has begun to decay."""
    if all(getattr(a, name) == getattr(b, name) for name in SCHEDULE):
        return True
    if a.schedule != "wsd" or b.schedule != "wsd" or a.warmup_tokens != b.warmup_tokens:
        return False
    return all(is_stable(tokens, one) for one in (a, b))


def is_stable(tokens: int, config: OptimConfig) -> bool:
    """Whether a warm-up-stable schedule has not begun to decay by then. One that never decays is stable after its end
    too, where its last step may lie."""
    return tokens <= config.stable_tokens or config.stable_tokens == config.total_tokens


class TokenSchedule(LRScheduler):
    """Every group's peak rate times `learning_rate_factor` of the tokens consumed at the *end* of the step that comes
    next, so that the first step of a warm-up does not have rate zero. Its state is the number of steps taken."""

    def __init__(self, optimizer: Optimizer, config: OptimConfig, tokens_per_step: int) -> None:
        self.config, self.tokens_per_step = config, tokens_per_step
        super().__init__(optimizer)  # keeps each group's rate, the peak, as initial_lr

    def get_lr(self) -> list[Any]:
        factor = learning_rate_factor((self.last_epoch + 1) * self.tokens_per_step, self.config)
        return [peak * factor for peak in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The groups' rates follow: an optimizer's state may say nothing of them."""
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
