"""DDP: every rank holds the whole model, gradients are averaged in buckets while they come.

DDP fills its buckets anew after the first backward of a process, in the order in which gradients came. Where a gradient
lies in its bucket decides in which order the contributions of more than two ranks are added, so that the first step of
every attempt of a run would round differently from the same step of a run that was not interrupted. Hence one backward
through a sum of nothing in front of the first step: from there on the buckets are what they stay.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.training.strategies.full_state import Fill, TorchStateStrategy, whole_model

BUCKET_MEGABYTES = 256
"""That are reduced at once. With torch's 25 nearly every matrix of a large model is a reduction of its own, and costs a
latency between nodes. An assumption, not measured."""


class DdpStrategy(DDPStrategy, TorchStateStrategy):
    """DDP. Buffers are functions of sums over all ranks, hence equal already and not broadcast."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        known = inspect.signature(DistributedDataParallel).parameters  # which torch 2.13 renames
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False, "bucket_cap_mb": BUCKET_MEGABYTES}
        super().__init__(**options)

    @property
    def root_device(self) -> torch.device:
        return self._device

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        module = self.lightning_module
        assert module is not None and isinstance(self.model, nn.Module)
        nothing = self._forward_redirection(self.model, module, "sum_of_nothing")
        assert isinstance(nothing, Tensor)
        nothing.backward()
        for parameter in module.parameters():
            parameter.grad = None

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Lightning 2.6 makes it under another stream, which every gradient would then be added on: an event a
        parameter, and memory that waits for them."""
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        return whole_model(assemble, fill)

    @property
    def torch_optimizer(self) -> Optimizer:
        return self.optimizers[0]

    def teardown(self) -> None:
        if not self.stays_on_the_device():
            super().teardown()
