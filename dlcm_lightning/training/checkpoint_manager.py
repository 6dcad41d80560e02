"""Saving and restoring a run, from any engine on any number of ranks into the one format of `checkpoint/`, and back.

Saving gathers parameter after parameter; each is written by one rank, all write about as much, at the same time.
Reading is the mirror of it: each tensor is read by one rank and sent to all, and every engine keeps its part. So a
checkpoint says nothing about how its run was spread, and resuming on other ranks or under another strategy is no
special case.

What Lightning has to know of the past are a few counters, which follow from the number of optimizer steps.

An error of one rank is an error of all: nobody waits for somebody who has left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.folder import (
    CALLBACKS,
    CONFIG,
    Checkpoint,
    Identity,
    Manifest,
    complete,
    describe_file,
    set_aside,
    sweep,
)
from dlcm_lightning.checkpoint.probe import Probe, difference
from dlcm_lightning.compose import save_config
from dlcm_lightning.errors import CheckpointError, DamagedCheckpoint
from dlcm_lightning.model.mup import role_parameters
from dlcm_lightning.ops.collectives import ControlGroup, broadcast
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import CHECKPOINTS, folders, unfinished
from dlcm_lightning.training.callback_state import CallbacksState, callbacks_state, load_callbacks_state
from dlcm_lightning.training.device import BY_NAME
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.position import at_optimizer_step
from dlcm_lightning.training.strategies.full_state import MOMENTS, FullStateStrategy, Moment


class CheckpointManager:
    """The checkpoints of one run, for all ranks of one attempt of it."""

    def __init__(self, run: Path, identity: Identity, probe: Probe, group: ControlGroup) -> None:
        self.run, self.identity, self.probe, self.group = run, identity, probe, group

    def save(self, trainer: Trainer, module: PretrainModule) -> None:
        """Collective. CheckpointError on all ranks: a disk that is full or not writable; earlier ones are kept."""
        config, step = module.config, trainer.global_step
        folder = unfinished(self.run, step)
        said = self.group.on_rank_zero(lambda: self._said(lambda: self._make(folder)))
        kept: list[CallbacksState] = []
        self.group.on_rank_zero(lambda: kept.append(callbacks_state(trainer)))
        fingerprint = self.probe.fingerprint(module.model, module.device)
        mine = dict(self._mine(trainer, module))
        mine |= {f"callback/{name}": value for _, found in kept for name, value in found.items()}
        written: dict[str, dict[str, Any]] = {}
        if not said:
            said = self._said(lambda: self._write(folder, module, mine, kept, written))
        everything: dict[str, dict[str, Any]] = {}
        errors = []
        for files, error in self.group.gather((written, said)):
            everything |= files
            errors += [error] if error else []
        manifest = Manifest(step, module.consumed_tokens, config.train.strategy, self.group.ranks, self.identity,
                            fingerprint, everything)

        def finish() -> None:
            if errors:
                shutil.rmtree(folder, ignore_errors=True)
                raise self._not_written(step, errors[0])
            try:
                complete(self.run, manifest)
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise self._not_written(step, str(error)) from error
            sweep(self.run, config.train.keep_last, config.train.keep_every_tokens)

        self.group.on_rank_zero(finish)

    def check_callbacks(self, trainer: Trainer) -> None:
        """CheckpointError on all ranks: a callback's state is none that a checkpoint could hold. Collective."""
        def look() -> None:
            callbacks_state(trainer)

        self.group.on_rank_zero(look)

    @staticmethod
    def _said(act: Callable[[], None]) -> str:
        """The error of an act that may meet a bad disk, as text."""
        try:
            act()
        except OSError as error:
            return str(error)
        return ""

    @staticmethod
    def _make(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def _not_written(self, step: int, error: str) -> CheckpointError:
        kept = [folder.name for folder in folders(self.run)]
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.run / CHECKPOINTS}: {error}. Complete ones kept "
            f"there: {', '.join(kept) or 'none'}. Free space or correct the permissions, then start the run again: it "
            "continues from the newest.")

    def _mine(self, trainer: Trainer, module: PretrainModule) -> Iterator[tuple[str, Tensor]]:
        """What this rank writes; all ranks gather everything."""
        engine = trainer.strategy
        assert isinstance(engine, FullStateStrategy)
        engine.reshard()
        owners = tensors.share_out({name: owner.shape.numel() for name, owner in role_parameters(module.model)},
                                   self.group.ranks)
        for name, owner in role_parameters(module.model):
            parts = {"weight": engine.full_param(owner.weight)}
            parts |= {moment: engine.full_optim_state(owner.weight, moment) for moment in MOMENTS}
            if owners[name] == self.group.rank:
                yield from ((f"{kind}/{name}", part.detach().to("cpu", copy=True)) for kind, part in parts.items())
        if self.group.rank == 0:
            yield from ((f"buffer/{name}", buffer.cpu()) for name, buffer in saved_buffers(module))

    def _write(self, folder: Path, module: PretrainModule, mine: dict[str, Tensor], kept: list[CallbacksState],
               written: dict[str, dict[str, Any]]) -> None:
        names = [tensors.file_name(self.group.rank, self.group.ranks)]
        tensors.write(mine, folder / names[0])
        for state, _ in kept:  # of rank 0 alone
            (folder / CALLBACKS).write_text(json.dumps(state, indent=1))
            save_config(module.config, folder / CONFIG)
            names += [CALLBACKS, CONFIG]
        written.update({name: describe_file(folder / name) for name in names})

    def newest(self, log: Log) -> Checkpoint | None:
        """The newest undamaged checkpoint, None where there is none at all. Collective.

        Each damaged one that it passes over is named and set aside under another name. CheckpointError where all are
        damaged, since starting anew would overwrite them; and where one cannot be read, since it may be whole.
        """
        found: list[Path] = self.group.on_rank_zero(lambda: folders(self.run))
        damaged: list[Path] = []
        for folder in reversed(found):
            checkpoint, said = self._opened(folder)
            if checkpoint is not None:
                self.group.on_rank_zero(lambda: set_aside(damaged))
                return checkpoint
            damaged.append(folder)
            log(f"checkpoint {folder.name} is not used: {said}")
        if found:
            raise CheckpointError(f"all {len(found)} checkpoints in {self.run / CHECKPOINTS} are damaged; move the "
                                  "folder away to train from the beginning")
        return None

    def _opened(self, folder: Path) -> tuple[Checkpoint | None, str]:
        """A checkpoint that is whole, or what is wrong with it. The hashing is shared by all ranks."""
        def look() -> tuple[Manifest | None, list[str]]:
            try:
                manifest = Manifest.load(folder)
                return manifest, manifest.damages(folder, self.group.rank, self.group.ranks)
            except DamagedCheckpoint as error:
                return None, [str(error)]

        manifest, mine = self.group.on_all(look)
        damages = [one for said in self.group.gather(mine) for one in said]
        return (None, damages[0]) if damages or manifest is None else (Checkpoint(folder, manifest), "")

    def restore(self, checkpoint: Checkpoint, trainer: Trainer, module: PretrainModule) -> None:
        """Weights, moments, buffers, watchers and position. Collective. CheckpointError: it holds other tensors than
        the model has, or computes something else than it did when it was written."""
        engine = trainer.strategy
        assert isinstance(engine, FullStateStrategy)
        parameters = {name: owner for name, owner in role_parameters(module.model)}
        buffers = dict(saved_buffers(module))
        with checkpoint.tensors() as stored:
            check_names(checkpoint, stored, module)
            engine.init_optim_state(checkpoint.step)
            readers = tensors.share_out({name: owner.shape.numel() for name, owner in parameters.items()},
                                        self.group.ranks)
            for name, owner in parameters.items():
                def sent(kind: str, name: str = name) -> Tensor:
                    return self._sent(stored, f"{kind}/{name}", readers[name], module.device)

                moments: dict[Moment, Tensor] = {moment: sent(moment) for moment in MOMENTS}
                engine.load_full_state(owner.weight, sent("weight"), moments)
            for name, buffer in buffers.items():
                buffer.copy_(self._sent(stored, f"buffer/{name}", 0, module.device))
            load_callbacks_state(trainer, checkpoint.callbacks,
                          {name: stored.get(f"callback/{name}") for name in stored.names("callback/")})
        for schedule in trainer.lr_scheduler_configs:
            schedule.scheduler.load_state_dict({"last_epoch": checkpoint.step})
        state = trainer.fit_loop.state_dict()
        at_optimizer_step(state, checkpoint.step, module.config.micro_batches)
        state["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint.step  # counted from 1 here: loop.py
        trainer.fit_loop.load_state_dict(state)
        check_fingerprint(checkpoint, self.probe, module)

    def _sent(self, stored: tensors.Tensors, name: str, reader: int, device: torch.device) -> Tensor:
        if self.group.rank == reader:
            value = stored.get(name).to(device)
        else:
            shape, dtype = stored.shape(name)
            value = torch.empty(shape, dtype=dtype, device=device)
        return broadcast(value, reader)


def check_names(checkpoint: Checkpoint, stored: tensors.Tensors, module: PretrainModule) -> None:
    """CheckpointError: it has tensors that the module lacks, or lacks some that the module has."""
    expected = {f"{kind}/{name}" for name, _ in role_parameters(module.model) for kind in ("weight", *MOMENTS)}
    expected |= {f"buffer/{name}" for name, _ in saved_buffers(module)}
    if differing := sorted(expected ^ {name for name in stored.names() if not name.startswith("callback/")}):
        raise CheckpointError(f"{checkpoint.folder}: {differing[0]} is in the "
                              f"{'model' if differing[0] in expected else 'checkpoint'} only, and "
                              f"{len(differing) - 1} more; it belongs to another model")


def check_fingerprint(checkpoint: Checkpoint, probe: Probe, module: PretrainModule) -> None:
    """CheckpointError: the module computes something else than what the checkpoint was taken from. Collective."""
    now = probe.fingerprint(module.model, module.device)
    # What was computed in bf16 is compared as roughly as that, in whatever precision it is asked for now.
    dtypes = (module.model.compute_dtype, BY_NAME[checkpoint.manifest.identity.precision])
    if said := difference(checkpoint.manifest.fingerprint, now, min(dtypes, key=lambda dtype: dtype.itemsize)):
        raise CheckpointError(f"{checkpoint.folder} loads but computes something else: {said}. It was written by "
                              "other code than this, or this machine computes wrongly; continue with the version "
                              "that wrote it, or from an older checkpoint")


def load_weights(checkpoint: Checkpoint, module: PretrainModule) -> None:
    """Weights and buffers into a module of one process; no moments. CheckpointError: other tensors than it has."""
    with checkpoint.tensors() as stored, torch.no_grad():
        check_names(checkpoint, stored, module)
        for name, owner in role_parameters(module.model):
            owner.weight.copy_(stored.get(f"weight/{name}"))
        for name, buffer in saved_buffers(module):
            buffer.copy_(stored.get(f"buffer/{name}"))


def saved_buffers(module: PretrainModule) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers of the module, the model's among them."""
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer
