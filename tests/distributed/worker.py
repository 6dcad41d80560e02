"""One rank of the tests of this folder: `python -m tests.distributed.worker TASKS.json`.

Tasks are done one after another by the same processes, because starting them costs more than what they do. Each writes
what it found to its file, rank 0 for all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from dlcm_lightning.batch import Batch
from dlcm_lightning.cluster.launch import leave
from dlcm_lightning.cluster.world import World, configure_world
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.loader import TrainingBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.model.mup import role_parameters
from dlcm_lightning.ops.collectives import rank, world_size
from dlcm_lightning.training import run
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.device import DTYPES
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.rate_loss import rate_loss
from dlcm_lightning.training.rendezvous import leave_group, meet
from dlcm_lightning.training.strategies.choice import choose_strategy
from dlcm_lightning.training.strategies.full_state import FullStateStrategy
from tests.distributed.mutants import planted

Found = dict[str, Tensor]
HOST = torch.device("cpu")


class Watch(Callback):
    """Keeps the whole gradients of every optimizer step, as they are before clipping, the norm that was found, and the
    norm that the optimizer was given."""

    def __init__(self) -> None:
        self.found: Found = {}

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        assert isinstance(module, PretrainModule) and isinstance(trainer.strategy, FullStateStrategy)
        if not module.finishes_step(trainer.fit_loop.epoch_loop.batch_idx):
            return
        for name, owner in role_parameters(module.model):
            gradient = trainer.strategy.full_grad(owner.weight)
            self.found[f"{trainer.global_step}/{name}"] = gradient.detach().clone()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch,
                           batch_idx: int) -> None:
        assert isinstance(module, PretrainModule) and isinstance(trainer.strategy, FullStateStrategy)
        if module.finishes_step(batch_idx):
            step = trainer.global_step - 1
            self.found[f"{step}/norm"] = module.grad_norm.clone()
            assert module.last_step is not None
            self.found[f"{step}/rate"] = module.last_step.rate.clone()
            trainer.strategy.reshard()
            for name, owner in role_parameters(module.model):
                moment = trainer.strategy.full_optim_state(owner.weight, "exp_avg")
                self.found[f"{step}/moment/{name}"] = moment.detach().clone()


def open_reader(config: Config) -> Reader:
    return Reader(config.data, config.seed, config.model.vocab_size, log=lambda _: None)


def token_bytes(reader: Reader) -> Tensor:
    return torch.from_numpy(reader.token_bytes)


def gradients(config: Config, world: World) -> Found:
    """Of the real engine under the real Trainer."""
    dtype = DTYPES[config.train.precision]
    reader, engine, watch = open_reader(config), choose_strategy(config.train, HOST), Watch()
    module = PretrainModule(config, dtype, "sdpa", token_bytes(reader))
    trainer = run.build_trainer(config, HOST, engine, world, [watch])
    trainer.fit(module, datamodule=PretrainData(config, log=lambda _: None))
    return watch.found


def by_autograd(config: Config, _: World) -> Found:
    """The first step by a collective that knows its own gradient: every rank back-propagates the same loss of the whole
    step, and gradients are then averaged."""
    reader = open_reader(config)
    module = PretrainModule(config, torch.float64, "sdpa", token_bytes(reader))
    module.configure_model()
    batch = next(iter(TrainingBatches(reader, rank(), world_size(), 0, 1)))
    output = module.model(batch.tokens, batch.documents, batch.noise, batch.targets)
    assert output.segmentation is not None
    counted = batch.counted()

    def summed(value: Tensor) -> Tensor:
        return all_reduce(value) if dist.is_initialized() else value

    tokens, targets = summed(counted.sum().double()), summed((batch.targets >= 0).sum().double())
    f = summed((output.segmentation.boundaries & counted).sum().double()) / tokens
    g = summed((output.segmentation.probabilities * counted).sum()) / tokens
    boundary = config.model.boundary
    loss = summed(output.nll_sum) / targets + boundary.rate_weight * rate_loss(f, g, boundary.target_ratio)
    loss.backward()
    found = {}
    for name, parameter in module.model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if dist.is_initialized():
            dist.all_reduce(gradient)
        found[f"0/{name}"] = gradient / world_size()
    return found


def initial(config: Config, world: World) -> Found:
    """Weights and buffers before the first step."""
    reader, engine = open_reader(config), choose_strategy(config.train, HOST)
    module = PretrainModule(config, torch.float32, "sdpa", token_bytes(reader))
    found: Found = {}

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
            assert isinstance(module, PretrainModule) and isinstance(trainer.strategy, FullStateStrategy)
            for name, owner in role_parameters(module.model):
                found[name] = trainer.strategy.full_param(owner.weight).detach().clone()
            found.update({name: buffer.clone() for name, buffer in module.model.named_buffers()})

    trainer = run.build_trainer(config, HOST, engine, world, [Look()])
    trainer.fit(module, datamodule=PretrainData(config, log=lambda _: None))
    return found


ACTIONS = {"gradients": gradients, "by_autograd": by_autograd, "initial": initial}


def main() -> None:
    run.quiet_libraries()
    torch.set_num_threads(1)
    tasks = [(task, *configure_world(load_config(task["config"])))
             for task in json.loads(Path(sys.argv[1]).read_text())]
    meet(tasks[0][2], tasks[0][1], distributed=True)
    for task, config, world in tasks:
        with planted(task["mutant"]):
            found = ACTIONS[task["action"]](config, world)
        if rank() == 0:
            torch.save(found, task["out"])
    dist.barrier()
    leave_group()


if __name__ == "__main__":
    main()
    leave(0)
