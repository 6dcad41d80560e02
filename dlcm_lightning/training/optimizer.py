"""AdamW with one parameter group per muP role; and what no step may be taken with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlcm_lightning.config import ModelConfig, OptimConfig
from dlcm_lightning.errors import RunError
from dlcm_lightning.model.mup import Role, hyperparameters_of, role_parameters


def build_optimizer(module: nn.Module, model: ModelConfig, optim: OptimConfig) -> torch.optim.AdamW:
    """Groups carry the role as `name`, which Lightning's LearningRateMonitor shows, and the peak rate as `lr`. The
    fused kernel is used where the parameters' device has one."""
    by_role: dict[Role, list[nn.Parameter]] = {}
    for _, owner in role_parameters(module):
        by_role.setdefault(owner.role, []).append(owner.weight)
    groups = []
    for role, parameters in by_role.items():
        line = hyperparameters_of(role, model, optim)
        groups.append({
            "params": parameters, "name": role.value, "lr": line.learning_rate, "weight_decay": line.weight_decay,
            "eps": line.epsilon,
        })
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in module.parameters())
    return torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), fused=fused)


class GradNorms:
    """Global norms of gradients, of the optimizer steps since somebody has looked. Added up on the device, so that one
    that is not finite is still seen after steps whose norms are, and nobody waits for it meanwhile."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, norm: Tensor) -> None:
        """norm: () of a step, before clipping."""
        self._sum = norm if self._sum is None else self._sum.to(norm.device) + norm

    def check(self, step: int) -> None:
        """step: the last that was added. Waits for the device. RunError: a norm since the last call that raised nothing
        is not finite. Weights that such a gradient has reached are lost; and an engine that leaves the step out would
        go on with counters that say otherwise."""
        norm = 0.0 if self._sum is None else self._sum.item()
        if not math.isfinite(norm):
            raise RunError(f"step {step}: the norm of the gradient is {norm}; the run can go on from its newest "
                           "checkpoint, and will come here again: begin another with lower rates (optim.lr_*) or a "
                           "lower optim.max_grad_norm, or look at the rows of this step (dlcm data inspect)")
        self._sum = None
