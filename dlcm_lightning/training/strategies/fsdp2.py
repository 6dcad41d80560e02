"""FSDP2: parameters, gradients and moments cut into rows over all ranks, gathered block by block when they are needed.

The model is constructed without memory (meta), cut, and only then filled: no rank ever holds all of it. With several
micro-batches a step, gradients are summed in whole and reduced once.

What is gathered together is the attention of a block, its feed-forward, the embedding, the head, and, for the whole
forward, the little that is left. Where the model multiplies in bf16, the matrices of blocks are gathered in bf16, half
as many bytes: to cast and gather is to gather and cast. Gradients are reduced in fp32, and norms, embedding and head
stay fp32 altogether. With `train.shard_ranks` the cut goes over so many neighbouring ranks, the GPUs of a node say, and
is repeated on the others: parameters then travel inside a node, and between nodes only the sum of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.model.layers import Block
from dlcm_lightning.training.strategies.full_state import Fill, TorchStateStrategy, copy_whole


class Fsdp2Strategy(ModelParallelStrategy, TorchStateStrategy):
    """See above."""

    weights_stay = False

    def __init__(self, ranks: int, device: torch.device, shard_ranks: int = 0) -> None:
        """shard_ranks: over how many ranks the model is cut, a divisor of all; 0: over all."""
        self.ranks, self.shard_ranks = ranks, shard_ranks or ranks
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1)
        self._device = device
        self._root: FSDPModule | None = None

    @property
    def root_device(self) -> torch.device:
        return self._device

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        with torch.device("meta"):
            model = assemble()
        mesh = self._mesh()
        low = MixedPrecisionPolicy()
        if model.compute_dtype == torch.bfloat16:
            low = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in list(model.modules()):
            if isinstance(module, Block):
                fully_shard(module.attention, mesh=mesh, mp_policy=low)
                fully_shard(module.ffn, mesh=mesh, mp_policy=low)
        fully_shard(model.embedding, mesh=mesh)
        fully_shard(model.unembedding, mesh=mesh)
        self._root = fully_shard(model, mesh=mesh)
        model.to_empty(device=self.root_device)
        for buffer in model.buffers():
            buffer.zero_()  # as every buffer of the model begins
        fill(model, place=copy_whole)
        return model

    def _mesh(self) -> DeviceMesh:
        """Of all ranks, or of replicas by ranks that share one."""
        if self.shard_ranks == self.ranks:
            return self.device_mesh["data_parallel"]
        shape = (self.ranks // self.shard_ranks, self.shard_ranks)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

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

    def teardown(self) -> None:
        if not self.stays_on_the_device():
            super().teardown()
