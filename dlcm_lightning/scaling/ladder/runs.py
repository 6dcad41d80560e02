"""What one sub-process has to do, and what has become of it, by the files of the run.

A run is trained by `dlcm pretrain`, a branch of it by `dlcm anneal`. Both continue what was interrupted and leave alone
what is finished; whether something is left to do is asked here in milliseconds, without loading torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dlcm_lightning.compose import differences, load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.config.identity import may_differ
from dlcm_lightning.errors import ConfigError
from dlcm_lightning.flops import MatrixParameters, matrix_parameters, training_flops_per_token
from dlcm_lightning.run_directory import CONFIG_FILE, METRICS_FILE, REPORT_FILE, finished, folders, newest_step

State = Literal["finished", "begun", "new"]
MANIFEST_FILE = "manifest.json"
"""Of a checkpoint, as checkpoint/folder.py writes it: what the model says of a fixed text, and the sums of files."""
STATE_FILES = "state-"
"""How the names of those begin that hold weights and moments."""


@dataclass(frozen=True)
class Branch:
    """An anneal branch of a run: from a checkpoint on, with a learning rate that decays."""

    name: str
    first_step: int
    """Optimizer step of the checkpoint."""
    steps: int
    """Of the decay."""

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


@dataclass(frozen=True)
class Job:
    """What one sub-process does."""

    name: str
    run: Path
    """The directory of the run, or of the branch."""
    arguments: tuple[str, ...]
    """Of `dlcm`."""
    first_step: int
    """0, or that of the checkpoint with which a branch begins."""
    last_step: int
    flops: float
    """Of its steps, at the target of R."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study, and its branches."""

    config: Config
    base: str
    """Run file, and ..."""
    overrides: tuple[str, ...]
    """... the overrides of it that compose the configuration."""
    variant: str
    document_tokens: float
    branches: tuple[Branch, ...] = ()
    wanted_checkpoint_steps: int = 0
    """Steps between checkpoints that the base asks for; the configuration has those that fit the rows. 0: the same."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def run(self) -> Path:
        return Path(self.config.train.output_dir) / self.name

    @cached_property
    def weights(self) -> MatrixParameters:
        return matrix_parameters(self.config.model)

    @property
    def tokens(self) -> int:
        """Without those of branches."""
        return self.config.total_steps * self.config.data.tokens_per_step

    @cached_property
    def flops_per_step(self) -> float:
        """Training, at the target of R."""
        return self.config.data.tokens_per_step * training_flops_per_token(self.config.model, self.document_tokens)

    @property
    def flops(self) -> float:
        """Training, at the target of R, with the branches."""
        return sum(job.flops for job in self.jobs(Path()))

    def branch_run(self, branch: Branch) -> Path:
        """Its directory."""
        return self.run.with_name(branch.name)

    def branch_config(self, branch: Branch) -> Config:
        """What it is trained with, but for where and how."""
        per_step = self.config.data.tokens_per_step
        length, total = branch.steps * per_step, branch.last_step * per_step
        optim = replace(self.config.optim, total_tokens=total, decay_fraction=length / total)
        return replace(self.config, name=branch.name, optim=optim)

    def jobs(self, run_file: Path) -> list[Job]:
        """The run, and then its branches. run_file: of the run."""
        steps, per_step = self.config.total_steps, self.flops_per_step
        found = [Job(self.name, self.run, ("pretrain", str(run_file)), 0, steps, steps * per_step)]
        tokens = self.config.data.tokens_per_step
        for branch in self.branches:
            arguments = ("anneal", str(self.run), f"train.output_dir={self.config.train.output_dir}",
                         "--at", str(branch.first_step * tokens), "--over", str(branch.steps * tokens),
                         "--name", branch.name)
            found.append(Job(branch.name, self.branch_run(branch), arguments, branch.first_step, branch.last_step,
                             branch.steps * per_step))
        return found


def state_of(job: Job) -> State:
    """finished: trained to its end and reported. begun: there is a checkpoint of it."""
    newest, report = newest_step(job.run), read_report(job.run)
    if report is not None and report.get("steps") == job.last_step and newest >= job.last_step:
        return "finished"
    return "begun" if newest > job.first_step else "new"


def read_report(run: Path) -> dict[str, Any] | None:
    """What a finished run came to; None where there is no report, or none that can be read."""
    try:
        found = json.loads((run / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_same_run(planned: PlannedRun) -> None:
    """ConfigError: what is finished in the directory of the run is not what the study asks for now."""
    if fields := list(_differing(load_saved_config(planned.run / CONFIG_FILE), planned.config)):
        raise ConfigError(f"{planned.run} is of another run: it differs in {', '.join(fields)}; restore these fields "
                          "in the study, give the study another name, or move the folder away")


def check_same_branch(planned: PlannedRun, branch: Branch) -> None:
    """ConfigError: what is in the directory of the branch does not begin with this run, or decays otherwise than the
    study asks for now. A directory without checkpoints holds nothing that counts."""
    run = planned.branch_run(branch)
    if not folders(run):
        return
    if newest_step(planned.run) < branch.first_step:  # asked second: another process may train the run meanwhile
        raise ConfigError(f"{run} begins with step {branch.first_step} of {planned.run}, which has no checkpoint of "
                          "that step or a later one: it is of a run that was there before; move the folder of the "
                          "branch away, or that run back")
    if fields := list(_differing(load_saved_config(run / CONFIG_FILE), planned.branch_config(branch))):
        raise ConfigError(f"{run} is another branch than that of the study: it differs in {', '.join(fields)}; restore "
                          "these fields in the study (decays.over is the length of the decay), or move the folder away")
    for told in (_trained_state, _logged):  # a branch drops its first checkpoint some time, its log never
        own, trunk = (told(one, branch.first_step) for one in (run, planned.run))
        if own and trunk and own != trunk:
            raise ConfigError(f"{run} begins with another checkpoint than that of step {branch.first_step} of "
                              f"{planned.run}, which was trained again since; move the folder of the branch away")


def _differing(saved: Config, planned: Config) -> Iterator[str]:
    """Fields that say what is trained, in which two configurations differ."""
    return (name for name in differences(saved, planned) if not may_differ(name))


def _logged(run: Path, step: int) -> dict[str, float]:
    """What training came to at a step; empty where no line says it. A branch has the lines of its run up to its own
    first step, and lines end there."""
    for line in _lines_from_the_last((run / METRICS_FILE).read_bytes() if (run / METRICS_FILE).is_file() else b""):
        if line.get("kind") == "train" and line.get("step") == step:
            return {name: line[name] for name in ("loss", "grad_norm") if name in line}
    return {}


def _lines_from_the_last(text: bytes) -> Iterator[dict[str, Any]]:
    """Of metrics.jsonl, without such as are half written."""
    for line in reversed(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _trained_state(run: Path, step: int) -> dict[str, Any]:
    """What tells the weights and moments of a checkpoint from others; empty where it is gone or cannot be read."""
    try:
        manifest = json.loads((finished(run, step) / MANIFEST_FILE).read_text(encoding="utf-8"))
        sums = {name: file["sha256"] for name, file in manifest["files"].items() if name.startswith(STATE_FILES)}
        return {"fingerprint": manifest["fingerprint"], **sums}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def reached_step(job: Job) -> int:
    """The last step that a line of metrics.jsonl speaks of, which may still be under way; `first_step` where there is
    none."""
    file = job.run / METRICS_FILE
    try:
        with file.open("rb") as opened:
            opened.seek(0, 2)
            opened.seek(max(0, opened.tell() - 65_536))
            text = opened.read()
    except OSError:
        return job.first_step
    for line in _lines_from_the_last(text):
        if isinstance(line.get("step"), int):
            return max(job.first_step, line["step"])
    return job.first_step
