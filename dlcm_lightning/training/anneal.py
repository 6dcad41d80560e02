"""`dlcm anneal`: a decay of the learning rate that branches off a warm-up-stable run.

One trunk is trained at a held rate; any of its checkpoints can end in a decay of its own. So a trunk of D tokens gives
what otherwise takes a run for each length, and a run that turns out good can still be made longer.

The branch is a run like any other, in a directory of its own, which begins with the trunk's checkpoint (hard links
where the file system has them), its metrics up to there, and a schedule that decays from there to the end. What the
trunk does meanwhile does not matter. It is trained by `pretrain`, so that it can be stopped, continued and shared by
ranks as any run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dlcm_lightning.atomic_io import flush, write_atomically
from dlcm_lightning.checkpoint.folder import CONFIG, Checkpoint, open_checkpoint
from dlcm_lightning.compose import load_saved_config, save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.run_directory import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, finished, folders
from dlcm_lightning.training.lr_schedule import is_stable
from dlcm_lightning.training.run_lock import RunLock, check_same_configuration

UNFINISHED = ".branch-"
DECIDED = ("optim.total_tokens", "optim.decay_fraction")
"""Fields of a branch that it is made of."""


def branch_config(run: Path, at: int, over: int, name: str, overrides: Sequence[str]) -> tuple[Config, int]:
    """Of the branch, and the optimizer step that it begins after. It is trained beside the run, on whatever processes
    there will be, unless overrides say otherwise.

    at, over: tokens; rounded up to whole steps. name: of the branch; empty: the run's with -anneal- and the tokens.

    ConfigError: the run's schedule is no warm-up-stable one, or is not stable there; a field that cannot differ.
    CheckpointError: no such checkpoint was kept.
    """
    for override in overrides:
        if (field := override.partition("=")[0]) in DECIDED:
            raise ConfigError(f"{override}: {field} of a branch follows from --at and --over; leave it out")
    kept = {int(folder.name.rpartition("-")[2]): folder for folder in folders(run)}
    if not kept:
        raise CheckpointError(f"{run}: holds no checkpoint; name the directory of a run, runs/NAME")
    tokens_per_step = load_saved_config(next(iter(kept.values())) / CONFIG).data.tokens_per_step
    step = -(-at // tokens_per_step)
    if step not in kept:
        there = ", ".join(f"{tokens_per_step * one:,}" for one in sorted(kept))
        raise CheckpointError(f"--at {at}: {run} has no checkpoint of step {step}; there are some at {there} tokens. "
                              "train.keep_every_tokens keeps more of them")
    trunk = load_saved_config(kept[step] / CONFIG)
    free = ["train.devices=0", "train.nodes=0", f"train.output_dir={run.resolve().parent}"]
    config = load_saved_config(kept[step] / CONFIG, [*free, *overrides])
    begins, length = step * tokens_per_step, -(-over // tokens_per_step) * tokens_per_step
    optim = config.optim
    if optim.schedule != "wsd":
        raise ConfigError(f"optim.schedule = {optim.schedule!r}: {run} never holds its rate; train a trunk with wsd")
    if begins < optim.warmup_tokens or not is_stable(begins, optim):
        raise ConfigError(f"--at {begins}: {run} holds its rate from {optim.warmup_tokens} to {optim.stable_tokens} "
                          "tokens; choose a checkpoint between, or train a trunk with optim.decay_fraction=0")
    total = begins + length
    optim = replace(optim, total_tokens=total, decay_fraction=length / total)
    config = replace(config, name=name or f"{trunk.name}-anneal-{begins}", optim=optim)
    if folder_of(config).resolve() == run.resolve():
        raise ConfigError(f"--name {name}: is the trunk itself; choose another")
    there_too = replace(config.train, devices=trunk.train.devices, nodes=trunk.train.nodes)
    check_same_configuration(trunk, replace(config, train=there_too), step, str(kept[step]))
    return config, step


def folder_of(config: Config) -> Path:
    return Path(config.train.output_dir) / config.name


def branch(run: Path, config: Config, step: int) -> Path:
    """The directory of the branch; makes it, whole or not at all, where it holds no checkpoint yet. Whether what it
    holds is this branch is asked when it is trained.

    CheckpointError: the trunk's checkpoint is damaged or was removed meanwhile, or it cannot be written. RunError:
    another process makes or trains it."""
    into = folder_of(config)
    if folders(into):
        return into
    with RunLock(into) as lock:
        lock.acquire()
        if not folders(into):  # who held it before may have made it
            _make(into, run, config, open_checkpoint(run, step))
    return into


def _make(into: Path, run: Path, config: Config, checkpoint: Checkpoint) -> None:
    making = into.with_name(f"{UNFINISHED}{into.name}")
    try:
        shutil.rmtree(making, ignore_errors=True)
        target = _fill(making, run, checkpoint)
        if damages := checkpoint.manifest.damages(target):
            raise CheckpointError(f"{damages[0]}: not as it is in {checkpoint.folder}; try again")
        save_config(config, making / CONFIG_FILE)
        for made in sorted(making.iterdir(), key=lambda one: one.name == CHECKPOINTS):  # the checkpoint is the last
            made.replace(into / made.name)
    except OSError as error:
        if not checkpoint.folder.is_dir():
            raise CheckpointError(f"{checkpoint.folder}: the run has removed it meanwhile; choose another --at, or let "
                                  "train.keep_every_tokens keep it") from error
        raise CheckpointError(f"{into}: cannot be written ({error}); free space or correct the permissions") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _fill(making: Path, run: Path, checkpoint: Checkpoint) -> Path:
    """The folder of the checkpoint."""
    target = finished(making, checkpoint.step)
    target.parent.mkdir(parents=True)
    shutil.copytree(checkpoint.folder, target, copy_function=_link_or_copy)
    if (run / METRICS_FILE).is_file():
        write_atomically(making / METRICS_FILE, _lines_until(run / METRICS_FILE, checkpoint.step).encode())
    for folder in (target, target.parent, making):
        flush(folder)
    return target


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _lines_until(file: Path, step: int) -> str:
    """What was logged up to a step, with the validation there."""
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # half written, or of no step
            continue
    return "".join(f"{line}\n" for line in kept)
