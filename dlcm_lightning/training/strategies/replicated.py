"""One process, or DDP: every rank holds the whole model, gradients are averaged in buckets while they come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.training.module import whole_model
from dlcm_lightning.training.strategies.engine import Fill, TorchEngine
from dlcm_lightning.training.strategies.precision import Clipping


class OneProcess(SingleDeviceStrategy, TorchEngine):
    """What DDP is for one rank."""

    def __init__(self, device: torch.device) -> None:
        self._clipping = Clipping()
        super().__init__(device, precision_plugin=self._clipping)

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        return whole_model(assemble, fill)

    @property
    def torch_optimizer(self) -> Optimizer:
        return self.optimizers[0]

    @property
    def gradient_norm(self) -> Tensor:
        return self._clipping.gradient_norm


class Replicated(DDPStrategy, TorchEngine):
    """DDP. Buffers are functions of sums over all ranks, hence equal already and not broadcast."""

    def __init__(self) -> None:
        self._clipping = Clipping()
        super().__init__(precision_plugin=self._clipping, broadcast_buffers=False, gradient_as_bucket_view=True)

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        return whole_model(assemble, fill)

    @property
    def torch_optimizer(self) -> Optimizer:
        return self.optimizers[0]

    @property
    def gradient_norm(self) -> Tensor:
        return self._clipping.gradient_norm
