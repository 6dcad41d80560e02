"""One process: what DDP is for one rank."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.training.strategies.full_state import Fill, TorchStateStrategy, whole_model


class SingleStrategy(SingleDeviceStrategy, TorchStateStrategy):
    """Lightning's, whose tensors can be asked for by name."""

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        return whole_model(assemble, fill)

    @property
    def torch_optimizer(self) -> Optimizer:
        return self.optimizers[0]

    def teardown(self) -> None:
        if not self.stays_on_the_device():
            super().teardown()
