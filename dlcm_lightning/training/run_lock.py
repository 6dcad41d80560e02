"""The run's directory: who may write to it, and whether what it holds is this run. What stands in it: run_directory.py.

A configuration binds a directory only once there is a checkpoint: a run that failed before its first one may be
corrected and started again. What may change afterwards is where and how often, and what lies ahead; not what was
computed.
"""

from __future__ import annotations

import errno
import fcntl
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

from dlcm_lightning.checkpoint.folder import Checkpoint, Identity
from dlcm_lightning.cluster.attempts import this_attempt
from dlcm_lightning.compose import differences
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.config.identity import may_differ
from dlcm_lightning.errors import RunError
from dlcm_lightning.training.lr_schedule import SCHEDULE, same_rates_until

LOCK = ".lock"
LOCK_SECONDS, LOCK_PAUSE_SECONDS = 300.0, 2.0


class RunLock:
    """A run's directory, made and held against a second job by one process of the run; the kernel lets go when that
    ends, however. A context manager, which lets go too.

    Where the node of the holder has failed, a file server may need minutes to notice: inside a job they are waited for.
    A file system that knows no locks, as some parallel ones are set up, gives none.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """RunError: another process holds it, or it cannot be written."""
        try:
            self.run.mkdir(parents=True, exist_ok=True)
            self._file = (self.run / LOCK).open("w")
        except OSError as error:
            raise RunError(f"{self.run} cannot be written: {error}; correct the permissions or choose another "
                           "train.output_dir=...") from error
        deadline = time.monotonic() + (LOCK_SECONDS if this_attempt() else 0)
        while not _locked(self._file):
            if time.monotonic() >= deadline:
                raise RunError(f"{self.run} is in use by a running job; wait for it, end it, or choose another "
                               "name=...")
            time.sleep(LOCK_PAUSE_SECONDS)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._file is not None:
            self._file.close()


def _locked(file: IO[str]) -> bool:
    """Whether it is ours now, or cannot be locked at all."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True


def _decided(config: Config, consumed: int, before: Config) -> Config:
    """As far as it says what was computed so far. Without the changes of weights that still lie ahead: they begin to
    hold at a block after their token count. With the schedule of the run before, where the rates so far are its own:
    a run may be made longer or shorter, and its decay moved, until the decay begins."""
    reaches = consumed <= config.total_steps * config.data.tokens_per_step
    if reaches and same_rates_until(consumed, before.optim, config.optim):
        schedule = {name: getattr(before.optim, name) for name in SCHEDULE}
        config = replace(config, optim=replace(config.optim, **schedule))
    changes = [change for change in config.data.weight_changes if change.at_tokens <= consumed]
    return replace(config, data=replace(config.data, weight_changes=changes))


def check_same_configuration(before: Config, config: Config, step: int, checkpoint: str) -> None:
    """Raises ConfigError where a checkpoint of `step` steps was written by a run that computes something else."""
    consumed = step * before.data.tokens_per_step
    fields = [name for name in differences(_decided(before, consumed, before), _decided(config, consumed, before))
              if not may_differ(name)]
    if fields:
        raise ConfigError(f"name = {config.name!r}: {checkpoint} belongs to a run that differs in "
                          f"{', '.join(fields)}; choose another name=..., restore these fields, or move it away")
    boundary = config.model.boundary
    rate_matters = config.model.kind == "dlcm" and boundary.learned and boundary.rate_scope == "global"
    if rate_matters and before.uses_previous_rate != config.uses_previous_rate:
        was, remedy = (("previous", "model.boundary.previous_rate=true keeps it so") if before.uses_previous_rate else
                       ("current", "that needs one micro-batch a step: more ranks, or larger data.micro_batch_size"))
        raise ConfigError(f"model.boundary.previous_rate = {config.model.boundary.previous_rate}: the rate loss of "
                          f"{checkpoint} takes F of the {was} step, and {config.micro_batches} micro-batches a "
                          f"step mean the other one here; {remedy}")


def check_same_run(checkpoint: Checkpoint, config: Config, precision: str, attention: str) -> None:
    """Raises ConfigError where the checkpoint belongs to a run of another configuration or arithmetic."""
    check_same_configuration(checkpoint.config, config, checkpoint.step, str(checkpoint.folder))
    if checkpoint.manifest.identity.precision != precision:
        raise ConfigError(f"train.precision = {config.train.precision!r}: {checkpoint.folder} was trained in "
                          f"{checkpoint.manifest.identity.precision}, here it means {precision}; continue on a "
                          "machine like the first, or choose another name=... to begin a new run")
    if (before := checkpoint.manifest.identity.attention) not in ("", attention):
        raise ConfigError(f"model.attention = {config.model.attention!r}: {checkpoint.folder} was trained with "
                          f"{before}, here it means {attention}, which rounds otherwise; continue on a machine like "
                          "the first, or choose another name=... to begin a new run")


def check_same_data(checkpoint: Checkpoint, identity: Identity, root: str) -> None:
    """Raises ConfigError where the rows are not those the checkpoint was trained on."""
    if checkpoint.manifest.identity.data_fingerprint != identity.data_fingerprint:
        raise ConfigError(f"data.root = {root!r}: its shards or their order are not those that {checkpoint.folder} "
                          "was trained on, so sample i would be another text; restore them, or choose another "
                          "name=... to begin a new run")
