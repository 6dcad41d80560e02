"""`dlcm mup check`: small runs of the user's configuration at four sizes an axis, looked at while they train, and
judged.

Each size is a real run, by the strategy, precision and number of processes of the configuration, over its own shards,
or text of Python's library where they are not at hand. Rates are the configuration's, held from the first step. One
process trains its runs itself, one after another; several are started for each.

    OUT/mup.json            every line of the table, with the values it comes from
    OUT/mup.png             size, own move and move over width and depth, by role
    OUT/coordinates.json    every module at every look, and what the optimizers hold
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dlcm_lightning.cluster.local import LocalRanks
from dlcm_lightning.cluster.world import resolve_world
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import ClassConfig, Config, ConfigError
from dlcm_lightning.data.preprocessing.stand_in import rows_at_hand
from dlcm_lightning.errors import RunError
from dlcm_lightning.progress import Log, progress_bar
from dlcm_lightning.training.mup_check.report import write_report
from dlcm_lightning.training.mup_check.sizes import AXES, Axis, Size, sizes_of
from dlcm_lightning.training.mup_check.verdict import Seen, judge
from dlcm_lightning.training.run import pretrain

STEPS = 5
ROWS, SEQUENCE_LENGTH = 4, 256
PROBE = "dlcm_lightning.training.mup_check.probe.ProbeCallback"
LONGEST_SECONDS = 600.0
"""Of one size on several processes."""


def check_mup(config: Config, out: Path, log: Log, *, axes: Sequence[str] = (), steps: int = STEPS,
              least_width: int | None = None) -> bool:
    """Whether everything lies in its band. Writes the files, and says the table.

    ConfigError: an axis or a width that there is not, or several processes have been started for the check."""
    if resolve_world(os.environ).size > 1:
        raise ConfigError("dlcm mup check: start it as one process; it starts those of train.devices itself")
    wanted = chosen(axes, config)
    sizes = [size for axis in wanted
             for size in sizes_of(config.model, axis, None if axis == "depth" else least_width)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared, said = shrunk(config, folder, steps)
        log(said)
        seen = [look_at(size, shared, folder) for size in progress_bar(sizes, desc="sizes", unit="run")]
    lines = [line for axis in wanted for line in judge(axis, [one for one in seen if one.size.axis == axis])]
    write_report(config, seen, lines, out, log)
    return all(line.good for line in lines)


def chosen(axes: Sequence[str], config: Config) -> list[Axis]:
    """ConfigError: there is no such axis."""
    for axis in axes:
        if axis not in AXES:
            raise ConfigError(f"--axes {axis}: there is none; they are {', '.join(AXES)}")
    possible: list[Axis] = [axis for axis in AXES if config.model.kind == "dlcm" or axis != "concept"]
    return [axis for axis in AXES if axis in axes] if axes else possible


def shrunk(config: Config, folder: Path, steps: int) -> tuple[Config, str]:
    """What all sizes share: a few short rows a step, rates that are held from the first. Also what is said of it."""
    devices = max(1, config.train.devices)
    micro_batch = min(config.data.micro_batch_size, 2)
    rows = max(ROWS, devices * micro_batch * (2 if config.micro_batches > 1 else 1))
    data = replace(config.data, sequence_length=min(config.data.sequence_length, SEQUENCE_LENGTH),
                   global_batch_size=rows, micro_batch_size=micro_batch, validation_rows=1, workers=0,
                   block_rows=min(config.data.block_rows, 64), weight_changes=[])
    read, vocabulary = rows_at_hand(data, config.seed, config.model.vocab_size, folder / "data")
    own, data = read is data, read
    optim = replace(config.optim, total_tokens=steps * data.tokens_per_step, warmup_tokens=0, schedule="wsd",
                    decay_fraction=0.0)
    train = replace(config.train, output_dir=str(folder / "runs"), init_from="", devices=devices, nodes=1,
                    shard_ranks=0, log_every_steps=1, validate_every_steps=10**6, checkpoint_every_steps=10**6,
                    keep_every_tokens=0, loggers=[], callbacks=[])
    text = "the run's own shards" if own else "text of Python's library, the run's shards not being at hand"
    said = (f"{steps} steps of {data.tokens_per_step:,} tokens a size, {config.train.strategy} on {devices} "
            f"{'process' if devices == 1 else 'processes'}; {text}")
    return replace(config, model=replace(config.model, vocab_size=vocabulary), data=data, optim=optim, train=train
                   ), said


def look_at(size: Size, shared: Config, folder: Path) -> Seen:
    """Trains one size. RunError: one of its processes failed."""
    name = f"{size.axis}-{size.value}"
    file = folder / f"{name}.json"
    model = replace(size.model, vocab_size=shared.model.vocab_size)
    train = replace(shared.train, callbacks=[ClassConfig(PROBE, {"file": str(file)})])
    config = replace(shared, name=name, model=model, train=train)
    if config.train.devices == 1:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of a run of seconds
            pretrain(config, _nothing)
    else:
        _in_processes(config, folder)
    found = json.loads(file.read_text())
    return Seen(size, found["coordinates"], found["groups"])


def _in_processes(config: Config, folder: Path) -> None:
    file = folder / f"{config.name}.yaml"
    save_config(config, file)
    command = [sys.executable, "-m", "dlcm_lightning", "pretrain", str(file)]
    threads = max(1, (os.cpu_count() or 1) // config.train.devices)
    with LocalRanks(command, config.train.devices, folder / "logs", threads=threads) as ranks:
        codes = ranks.wait(LONGEST_SECONDS)
        if any(codes):
            raise RunError(f"the run of {config.name} ended with {codes}:\n{ranks.tail()}")


def _nothing(message: str) -> None:
    del message
