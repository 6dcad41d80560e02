"""Clipping that keeps the norm it found. Lightning's precision plugins are where gradients are clipped."""

from __future__ import annotations

from lightning.pytorch.plugins import Precision
from torch import Tensor, nn, zeros
from torch.optim import Optimizer

from dlcm_lightning.training.strategies.engine import whole


class Clipping(Precision):
    """Leaves every number as it is: the model casts for itself."""

    def __init__(self) -> None:
        self.gradient_norm: Tensor = zeros(())
        """() Global norm before clipping, of the last optimizer step."""

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        norm = nn.utils.clip_grad_norm_(list(self.main_params(optimizer)), float(clip_val))
        self.gradient_norm = whole(norm).detach()
