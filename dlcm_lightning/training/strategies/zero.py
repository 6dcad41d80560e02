"""DeepSpeed ZeRO: moments (stage 1), gradients (2) and parameters (3) in pieces of flat buffers over all ranks.

DeepSpeed runs in full precision and the model casts what it multiplies, so that every stage computes the function that
DDP computes; its bf16 mode would round parameters that the boundary and the norms must not lose.

What is not as Lightning has it. The loss is divided by the number of micro-batches once: Lightning does it, DeepSpeed
would do it again, which AdamW hides and clipping does not. A CPU is allowed (over gloo), so that the real engine runs
in tests and on a laptop; there DeepSpeed must not compile its shared-memory collective at the first start, half a
minute that a kill can leave a lock on. Its own checkpoints are not used: loading them means unpickling, and the number
of ranks that wrote them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn, zeros

from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.collectives import all_reduce_sum
from dlcm_lightning.ops.device import on_gpu
from dlcm_lightning.training.strategies.full_state import Fill, FullStateStrategy, Moment, init_adamw_state, whole_model

if not on_gpu():
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

BUCKET_ELEMENTS = 2**27
"""fp32 numbers that travel at once, half a gibibyte."""


class ZeroPrecision(DeepSpeedPrecision):
    """Full precision. Keeps the global norm before clipping of the last optimizer step."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self.grad_norm: Tensor = zeros(())

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        engine: Any = model.trainer.model
        engine.backward(tensor, scale_wrt_gas=False)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        engine: Any = model.trainer.model
        norm = engine.get_global_grad_norm()
        if norm is not None:
            self.grad_norm = torch.as_tensor(norm).detach()
        return result


def _place(parameter: nn.Parameter, value: Tensor) -> None:
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)


class ZeroStrategy(DeepSpeedStrategy, FullStateStrategy):
    """Stages 1, 2 and 3."""

    def __init__(self, stage: int, offload: bool, device: torch.device) -> None:
        """offload (stage 3): parameters, gradients and moments stay in the host's memory."""
        self._on_gpu = device.type == "cuda"
        self._device = device if self._on_gpu else torch.device("cpu", 0)  # DeepSpeed asks for an index
        zero: dict[str, Any] = {
            "stage": stage, "overlap_comm": self._on_gpu, "contiguous_gradients": True, "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS,
        }
        if offload:
            where = {"device": "cpu", "pin_memory": self._on_gpu}
            zero |= {"offload_optimizer": where, "offload_param": where}
        super().__init__(
            config={
                "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
                "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
            },
            logging_level=logging.WARNING,
        )
        self.precision_plugin = self._precision = ZeroPrecision()
        self.stage = stage
        self.weights_stay = stage < 3

    @property
    def own_grad_norm(self) -> Tensor:
        return self._precision.grad_norm

    @property
    def root_device(self) -> torch.device:
        return self._device

    def setup_environment(self) -> None:
        if self._on_gpu:
            super().setup_environment()
        else:
            ParallelStrategy.setup_environment(self)
            self.setup_distributed()

    def setup_distributed(self) -> None:
        """Without Lightning's look at the indices of devices, which takes them for those of all processes."""
        if not self._on_gpu:
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        """DeepSpeed does not move what `zero.Init` has made, and so forgets the buffers beside it."""
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, buffer.to(self.root_device),
                                       persistent=name not in module._non_persistent_buffers_set)
        super().setup(trainer)

    def teardown(self) -> None:
        if not self.stays_on_the_device():
            super().teardown()

    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        """Stage 3: called inside `zero.Init`, which cuts every parameter as soon as its module is made."""
        if self.stage < 3:
            return whole_model(assemble, fill)
        model = assemble()
        fill(model, place=_place)
        return model

    def reshard(self) -> None:
        pass

    def full_param(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_fp32_param(parameter)

    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        return safe_get_full_grad(parameter)

    def full_optim_state(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        if self.stage == 3:
            return safe_get_full_optimizer_state(parameter, name)
        flat = torch.zeros(parameter.numel(), device=parameter.device)
        for place, mine in self._held(parameter, name):
            flat[place] = mine
        return all_reduce_sum(flat).view_as(parameter)

    def _held(self, parameter: Any, name: Moment) -> Iterator[tuple[slice, Tensor]]:
        """Stages 1 and 2: what this rank holds of a moment, if anything, and its place in the whole. DeepSpeed's own
        way to it knows the first parameter group only."""
        if (piece := parameter._hp_mapping) is None:
            return
        optimizer: Any = self.optimizers[0]
        flat = optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[piece.param_group_index]][name]
        there, here = piece.hp_fragment_address, piece.lp_fragment_address
        yield slice(here.start, here.start + here.numel), flat.narrow(0, there.start, there.numel)

    def load_full_state(self, parameter: nn.Parameter, weight: Tensor, moments: dict[Moment, Tensor]) -> None:
        if self.stage < 3:
            parameter.data.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for name, value in moments.items():
                for place, mine in self._held(parameter, name):
                    mine.copy_(value.flatten()[place])
            return
        _place(parameter, weight)
        safe_set_local_fp32_param(parameter, self._piece(parameter, weight))
        for name, value in moments.items():
            safe_set_local_optimizer_state(parameter, self._piece(parameter, value), name)

    def _piece(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's piece of a whole tensor; the last one is filled up with zeros."""
        size: int = parameter.ds_tensor.ds_numel
        flat = value.flatten()
        filled = torch.cat([flat, flat.new_zeros(size * self.world_size - flat.numel())])
        return filled[size * self.global_rank:size * (self.global_rank + 1)]

    def init_optim_state(self, steps: int) -> None:
        optimizer: Any = self.optimizers[0]
        held = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        init_adamw_state(optimizer.optimizer, held, steps)
