"""FSDP2: parameters, gradients and moments cut into rows over all ranks, gathered block by block when they are needed.

The model is constructed without memory (meta), cut, and only then filled: no rank ever holds all of it. With several
micro-batches a step, gradients are summed in whole and reduced once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.model.layers import Block
from dlcm_lightning.training.strategies.full_state import Fill, TorchStateStrategy, copy_whole


class Fsdp2Strategy(ModelParallelStrategy, TorchStateStrategy):
    """A unit of gathering is a block of a stack; what is outside the blocks is gathered for the whole forward."""

    weights_stay = False

    def __init__(self, ranks: int, device: torch.device) -> None:
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1)
        self._device = device
        self._root: FSDPModule | None = None

    @property
    def root_device(self) -> torch.device:
        return self._device

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        with torch.device("meta"):
            model = assemble()
        mesh = self.device_mesh["data_parallel"]
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        self._root = fully_shard(model, mesh=mesh)
        model.to_empty(device=self.root_device)
        for buffer in model.buffers():
            buffer.zero_()  # as every buffer of the model begins
        fill(model, place=copy_whole)
        return model

    def reshard(self) -> None:
        assert self._root is not None
        self._root.reshard()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's own does nothing for FSDP2, which would reduce in every micro-batch."""
        assert self._root is not None
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @property
    def torch_optimizer(self) -> Optimizer:
        return self.optimizers[0]
