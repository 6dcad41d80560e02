"""What differs between engines, in one place: how they build a model, and where they keep a parameter's four tensors.

A parameter has a weight, a gradient between backward and step, and AdamW's two moments. DDP keeps all of them whole on
every rank, FSDP2 cuts them into rows, ZeRO into pieces of flat buffers. Whoever saves, restores, initialises or checks
asks an `FullStateStrategy` for a whole tensor by name and gives it whole tensors back, so that a checkpoint is the same
file whatever engine wrote it, and may be read by another one on another number of ranks.

Reading is collective: all ranks ask for the same tensors in the same order. Every engine computes the same function:
parameters, sums of gradients and moments are fp32 everywhere, and the model casts what it multiplies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dlcm_lightning.model.dlcm import LanguageModel

Place = Callable[[nn.Parameter, Tensor], None]
"""Copies a whole tensor, the same on every rank, into a parameter of which this rank may hold a part."""
Fill = Callable[..., None]
"""fill(model, place=...) writes all parameters of a model."""
Moment = Literal["exp_avg", "exp_avg_sq"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)


class FullStateStrategy(ABC):
    """Mixed into Lightning's strategies."""

    @property
    def own_grad_norm(self) -> Tensor | None:
        """() Global norm before clipping of the last optimizer step, where the engine clips by itself; None where it
        leaves that to the module."""
        return None

    weights_stay = True
    """Whether a parameter is whole, and at the same place, for the whole of a step."""

    @abstractmethod
    def construct(self, assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
        """A model laid out as the engine wants it, and filled."""

    def stays_on_the_device(self) -> bool:
        """Whether the end of a run leaves model and moments where they are. Lightning copies them to the host, of 2.3 B
        parameters 28 GB a rank, in the seconds that a preempted job has left, and waits for whatever the device still
        has to do, which after an error may be a collective whose peers have gone."""
        return self.root_device.type == "cuda"  # type: ignore[attr-defined]

    @abstractmethod
    def reshard(self) -> None:
        """Parameters go back to where the optimizer has them; a forward without a backward may leave them elsewhere."""

    @abstractmethod
    def full_param(self, parameter: nn.Parameter) -> Tensor:
        """The whole weight, on every rank. Collective."""

    @abstractmethod
    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        """The whole gradient that the optimizer is about to use, on every rank. Collective."""

    @abstractmethod
    def full_optim_state(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        """The whole moment, on every rank; only after the first step. Collective."""

    @abstractmethod
    def load_full_state(self, parameter: nn.Parameter, weight: Tensor, moments: dict[Moment, Tensor]) -> None:
        """Takes whole tensors, the same on every rank; after `begin`."""

    @abstractmethod
    def init_optim_state(self, steps: int) -> None:
        """Makes the optimizer's state as after so many steps, moments zero."""


def whole_model(assemble: Callable[[], LanguageModel], fill: Fill) -> LanguageModel:
    """In one piece, on the device that is current."""
    model = assemble()
    fill(model)
    return model


def copy_whole(target: Tensor, value: Tensor) -> None:
    """target: a tensor, or one that is cut into rows; value: all of it, the same on every rank."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        mine = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(mine.to_local())
    else:
        target.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut into rows. Collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class TorchStateStrategy(FullStateStrategy):
    """Engines that leave parameters and torch's optimizer in place."""

    @property
    @abstractmethod
    def torch_optimizer(self) -> Optimizer:
        """The one optimizer."""

    def reshard(self) -> None:
        pass

    def full_param(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter.detach())

    def full_grad(self, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        return whole(parameter.grad)

    def full_optim_state(self, parameter: nn.Parameter, name: Moment) -> Tensor:
        return whole(self.torch_optimizer.state[parameter][name])

    def load_full_state(self, parameter: nn.Parameter, weight: Tensor, moments: dict[Moment, Tensor]) -> None:
        copy_whole(parameter.detach(), weight)
        for name, value in moments.items():
            copy_whole(self.torch_optimizer.state[parameter][name], value)

    def init_optim_state(self, steps: int) -> None:
        optimizer = self.torch_optimizer
        init_adamw_state(optimizer, [one for group in optimizer.param_groups for one in group["params"]], steps)


def init_adamw_state(optimizer: Optimizer, held: Iterable[Tensor], steps: int) -> None:
    """AdamW makes its state in its first step; this is that state, after so many steps of zero gradients. held: the
    tensors that it updates."""
    for tensor in held:
        device = tensor.device if optimizer.defaults["fused"] else torch.device("cpu")
        count = torch.full((), float(steps), dtype=torch.float32, device=device)
        optimizer.state[tensor] = {"step": count, **{name: torch.zeros_like(tensor) for name in MOMENTS}}
