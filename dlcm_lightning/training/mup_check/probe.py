"""How large activations are, and how far the first optimizer steps move them, while a run trains as it does.

A `Probe` looks at a model through hooks: forward passes without gradients over the same tokens, cut into the same
concepts, before the first step and after each of them. It keeps the root mean square (RMS) of what every module gives,
of its difference from what it gave at first, and of the part of it that is the module's own doing: what its weights of
now give for its input of then. Cut alike means every R-th token, whatever the boundary says: a
boundary that moves would change which tokens a concept pools, and concepts of different looks could not be compared.
What the boundary computes is measured all the same.

Modules are called as in training, so that a strategy which has cut the weights gathers them; what they give for their
first input is asked for inside such a call, where weights are whole. The logits are taken for the first few positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.batch import Batch
from dlcm_lightning.config import ConfigError
from dlcm_lightning.model.boundary import Segmentation
from dlcm_lightning.model.dlcm import LanguageModel, Unembedding
from dlcm_lightning.model.layers import AddNorm, Block, BranchLinear
from dlcm_lightning.model.mup import Role, RoleModule
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.module import PretrainModule

LOGIT_POSITIONS = 64
STREAM = {Role.TOKEN: "stream_token", Role.CONCEPT: "stream_concept"}
"""What the residual stream after a block is called, by the role of the block's matrices."""


@dataclass(frozen=True)
class Coordinate:
    """One module at one look."""

    module: str
    role: str
    """Of its parameter; stream_token and stream_concept: the residual stream after a block."""
    step: int
    """Optimizer steps before the look."""
    size: float
    """RMS of what the module gives."""
    move: float
    """RMS of its difference from step 0."""
    own: float
    """RMS of the difference that the module's own weights make, its input being that of step 0; 0 for streams, which
    have none."""


class Probe:
    """Looks of one model at the same tokens."""

    def __init__(self, model: LanguageModel, tokens: Tensor, documents: Segments, targets: Tensor) -> None:
        """tokens (T,) int64, documents over T, targets (T,) int64 for the head's call."""
        self.model, self.tokens, self.documents, self.targets = model, tokens, documents, targets
        self.found: list[Coordinate] = []
        self._inputs: dict[str, tuple[Any, ...]] = {}
        """Of step 0, by module."""
        self._before: dict[str, Tensor] = {}
        self._again: dict[str, Tensor] = {}
        """What modules give now for their inputs of step 0."""
        self._now: dict[str, tuple[str, Tensor]] = {}

    @torch.no_grad()
    def look(self, step: int) -> None:
        """One forward pass; adds a coordinate a module to `found`. step: optimizer steps so far; 0 comes first."""
        training = self.model.training
        self.model.eval()
        with self._hooks():
            self.model(self.tokens, self.documents, None, self.targets)
        self.model.train(training)
        for name, (role, value) in self._now.items():
            first = self._before.setdefault(name, value)
            own = _rms(self._again[name] - first) if name in self._again else 0.0
            self.found.append(Coordinate(name, role, step, _rms(value), _rms(value - first), own))
        self._now, self._again = {}, {}

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = list(self._hooked())
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self) -> Iterator[RemovableHandle]:
        for name, module in self.model.named_modules():
            if isinstance(module, Unembedding):
                yield module.register_forward_pre_hook(self._take_logits(name))
            elif isinstance(module, Block):
                yield module.register_forward_hook(self._keep(name, STREAM[module.ffn.down.role], _stream))
            elif isinstance(module, RoleModule):
                part = _second if isinstance(module, AddNorm) else _unscaled if isinstance(module, BranchLinear
                                                                                           ) else _itself
                yield module.register_forward_pre_hook(self._ask_again(name, part))
                yield module.register_forward_hook(self._keep(name, module.role.value, part))
            elif name == "boundary":
                yield module.register_forward_hook(self._cut_alike)

    def _keep(self, name: str, role: str, part: Any) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._now[name] = role, part(module, output).float().clone()

        return hook

    def _ask_again(self, name: str, part: Any) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            first = self._inputs.setdefault(name, inputs)
            self._again[name] = part(module, module.forward(*first)).float()

        return hook

    def _take_logits(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(module, Unembedding)
            hidden = inputs[0][:LOGIT_POSITIONS]
            first = self._inputs.setdefault(name, (hidden,))[0]
            self._now[name] = module.role.value, module.logits(hidden).float()
            self._again[name] = module.logits(first).float()

        return hook

    def _cut_alike(self, module: nn.Module, inputs: Any, output: Segmentation) -> Segmentation:
        every = round(self.model.config.boundary.target_ratio)
        return replace(output, boundaries=self.documents.positions(len(self.tokens)) % every == 0)


def _itself(module: nn.Module, output: Tensor) -> Tensor:
    return output


def _second(module: nn.Module, output: tuple[Tensor, Tensor]) -> Tensor:
    return output[1]


def _unscaled(module: nn.Module, output: Tensor) -> Tensor:
    """What a branch's last matrix gives, before depth scales it."""
    assert isinstance(module, BranchLinear)
    return output / module.scale


def _stream(module: nn.Module, output: tuple[Tensor, Tensor]) -> Tensor:
    """What a block leaves to be summed, summed."""
    return output[0] + output[1]


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


class ProbeCallback(Callback):
    """Looks before the first optimizer step and after each, at the rows of this rank's first micro-batch, and writes
    what the first rank saw, and what its optimizer holds, when the run ends."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.probe: Probe | None = None
        self.groups: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        assert isinstance(module, PretrainModule)
        if self.probe is not None:
            return
        if batch_idx:
            raise ConfigError(f"{self.file}: the check begins with a run's first step; remove the run's folder")
        self.groups = [{"role": group["name"], "learning_rate": group.get("initial_lr", group["lr"]),
                        "weight_decay": group["weight_decay"], "epsilon": group["eps"]}
                       for group in trainer.optimizers[0].param_groups]
        self.probe = Probe(module.model, batch.tokens.clone(), batch.documents, batch.targets.clone())
        self.probe.look(0)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
                           ) -> None:
        assert isinstance(module, PretrainModule)
        if self.probe is not None and module.finishes_step(batch_idx):
            self.probe.look(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and self.probe is not None:
            found = {"coordinates": [asdict(one) for one in self.probe.found], "groups": self.groups}
            write_atomically(self.file, json.dumps(found).encode())
