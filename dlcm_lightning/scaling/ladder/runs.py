"""What one sub-process has to do, and what has become of it, by the files of the run.

A run is trained by `dlcm pretrain`, a branch of it by `dlcm anneal`. Both continue what was interrupted and leave alone
what is finished; whether something is left to do is asked here in milliseconds, without loading torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dlcm_lightning.compose import differences, load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.errors import ConfigError
from dlcm_lightning.flops import MatrixParameters, matrix_parameters, training_flops_per_token
from dlcm_lightning.run_directory import CONFIG_FILE, METRICS_FILE, REPORT_FILE, newest_step

MAY_DIFFER = ("data.root", "data.workers", "data.cache_megabytes", "data.read_ahead_steps", "data.unreadable",
              "data.max_unreadable", "data.micro_batch_size", "model.boundary.previous_rate")
"""Fields that say where and how a run is trained, not what; beside them those of `train` and `job`."""
State = Literal["finished", "begun", "new"]


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

    def jobs(self, run_file: Path) -> list[Job]:
        """The run, and then its branches. run_file: of the run."""
        steps, per_step = self.config.total_steps, self.flops_per_step
        found = [Job(self.name, self.run, ("pretrain", str(run_file)), 0, steps, steps * per_step)]
        tokens = self.config.data.tokens_per_step
        for branch in self.branches:
            arguments = ("anneal", str(self.run), "--at", str(branch.first_step * tokens),
                         "--over", str(branch.steps * tokens), "--name", branch.name)
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
    saved = load_saved_config(planned.run / CONFIG_FILE)
    fields = [name for name in differences(saved, planned.config)
              if name not in MAY_DIFFER and not (name.startswith(("train.", "job."))
                                                 and name not in ("train.precision", "train.compile"))]
    if fields:
        raise ConfigError(f"{planned.run} is of another run: it differs in {', '.join(fields)}; restore these fields "
                          "in the study, give the study another name, or move the folder away")


def reached_step(job: Job) -> int:
    """The last step that a line of metrics.jsonl speaks of, which may still be under way; `first_step` where there is
    none."""
    file = job.run / METRICS_FILE
    try:
        with file.open("rb") as opened:
            opened.seek(0, 2)
            opened.seek(max(0, opened.tell() - 65_536))
            lines = opened.read().splitlines()
    except OSError:
        return job.first_step
    for line in reversed(lines):
        try:
            return max(job.first_step, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return job.first_step
