"""`dlcm ladder run`: goes through the runs of a study, and keeps its table.

    <output_dir>/<study>/
        runs/NAME.yaml    every run, with all of its fields: dlcm pretrain takes it, and so does a job
        branches/NAME.yaml    the same of a branch, once --write has made it of its finished run
        lists/KIND-DIGEST.txt    which of them an array of SLURM trains: a file a line, in the order of its tasks
        logs/NAME.log     what its training has printed, over all attempts
        table.csv         the rows of all finished runs; dlcm ladder fit reads it

Nothing is remembered beside these: what is finished is asked of the runs, so that a study may be killed, edited,
shared by several processes, and called again.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.compose import load_saved_config, save_config
from dlcm_lightning.config import ConfigError
from dlcm_lightning.errors import UserError
from dlcm_lightning.progress import Log, progress_bar
from dlcm_lightning.run_directory import CONFIG_FILE, folders
from dlcm_lightning.scaling.ladder.execute import Executor, Outcome, make_branch
from dlcm_lightning.scaling.ladder.measurements import Row, rows_of
from dlcm_lightning.scaling.ladder.plan import largest_divisor, rates_of, study_folder
from dlcm_lightning.scaling.ladder.runs import (
    Branch,
    Job,
    PlannedRun,
    check_same_branch,
    check_same_run,
    state_of,
)
from dlcm_lightning.scaling.ladder.study import Study
from dlcm_lightning.scaling.ladder.table_file import one_at_a_time

RUNS, BRANCHES, LISTS, LOGS = "runs", "branches", "lists", "logs"
NOTHING = "there is nothing in this part: the study has fewer runs than parts"
DIGITS = 12
"""Hexadecimal, of the digest that names a list."""
LEAST_ROWS = 3
"""Stable rows of a run, below which `dlcm ladder fit` refuses the table."""
MOST_CHECKPOINTS = 4
"""Times those that the base asks for, above which it is said."""
WriteTable = Callable[[Sequence[dict[str, Any]], Path], None]


@dataclass(frozen=True)
class Part:
    """A part of the runs of a study: number `index` of `of`, counted from 0."""

    index: int
    of: int


def part_of_array(environment: Mapping[str, str]) -> Part | None:
    """The part that belongs to this task of a SLURM array; None outside of one. Tasks are counted from the lowest."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    first, count = (int(environment.get(f"SLURM_ARRAY_TASK_{name}", "0")) for name in ("MIN", "COUNT"))
    index = int(environment["SLURM_ARRAY_TASK_ID"]) - first
    if not 0 <= index < count:
        raise ConfigError(f"SLURM_ARRAY_TASK_ID = {environment['SLURM_ARRAY_TASK_ID']}: the tasks of the array are not "
                          "numbered without gaps; write --array=0-N, or say which part with --task")
    return Part(index, count)


def chosen(runs: Sequence[PlannedRun], pattern: str | None, part: Part | None) -> list[PlannedRun]:
    """Of these a part, equal by FLOPs: the dearest run first, each to the part that has least so far. ConfigError: the
    pattern is that of no run."""
    matching = [run for run in runs if pattern is None or fnmatch.fnmatchcase(run.name, pattern)]
    if not matching:
        raise ConfigError(f"--only {pattern}: no run of this name; there are {runs[0].name} and {len(runs) - 1} more "
                          "(--list); quote * for the shell")
    if part is None:
        return matching
    spent = [0.0] * part.of
    mine = set()
    for run in sorted(matching, key=lambda one: (-one.flops, one.name)):
        least = spent.index(min(spent))
        spent[least] += run.flops
        if least == part.index:
            mine.add(run.name)
    return [run for run in matching if run.name in mine]


def write_run_files(study: Study, runs: Sequence[PlannedRun]) -> list[Path]:
    """The run file of every run, in order."""
    folder = study_folder(study) / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{run.name}.yaml" for run in runs]
    for run, file in zip(runs, files, strict=True):
        save_config(run.config, file)
    return files


def jobs_of(study: Study, run: PlannedRun) -> list[Job]:
    """What there is to do for a run, in order."""
    return run.jobs(study_folder(study) / RUNS / f"{run.name}.yaml")


def overview(study: Study, runs: Sequence[PlannedRun]) -> Iterator[str]:
    """Lines of --list."""
    if not runs:
        yield NOTHING
        return
    longest = max(len(job.name) for run in runs for job in jobs_of(study, run))
    yield (f"{'run':<{longest}}{'kind':>7}{'D':>6}{'E':>6}{'layers':>10}{'N':>14}{'P':>7}{'R':>5}{'tokens':>17}"
           f"{'FLOPs':>11}  state")
    finished, tokens, flops, left = 0, 0, 0.0, 0.0
    for run in runs:
        model, per_step = run.config.model, run.config.data.tokens_per_step
        width, layers, share, ratio = "-", str(model.decoder_layers), "-", "-"
        if model.kind == "dlcm":
            width, share, ratio = (str(model.d_concept), f"{run.weights.backbone_share:.3f}",
                                   f"{model.boundary.target_ratio:g}")
            layers = f"{model.encoder_layers}+{model.backbone_layers}+{model.decoder_layers}"
        for job in jobs_of(study, run):
            state, count = state_of(job), (job.last_step - job.first_step) * per_step
            finished += state == "finished"
            tokens, flops = tokens + count, flops + job.flops
            left += job.flops if state != "finished" else 0.0
            yield (f"{job.name:<{longest}}{model.kind:>7}{model.d_token:>6}{width:>6}{layers:>10}"
                   f"{run.weights.non_embedding:>14,}{share:>7}{ratio:>5}{count:>17,}{job.flops:>11.2e}  {state}")
    count = sum(len(jobs_of(study, run)) for run in runs)
    yield (f"{count} runs and branches, {finished} of them finished; {tokens:,} tokens, {flops:.2e} FLOPs at the "
           f"target of R, {left:.2e} of them left")


def notes_of(runs: Sequence[PlannedRun]) -> Iterator[str]:
    """What a fit of the table would stumble over, known beforehand."""
    for run in runs:
        if (rows := stable_rows(run)) < LEAST_ROWS:
            yield (f"{run.name} has {rows} rows between warm-up and decay; dlcm ladder fit wants {LEAST_ROWS}: write a "
                   "smaller validate_every")
            break
    for run in runs:
        if run.config.train.checkpoint_every_steps * MOST_CHECKPOINTS < run.wanted_checkpoint_steps:
            yield _note_of_checkpoints(run)
            break
    if len({(run.variant, *rates_of(run.config).values()) for run in runs}) > 1:
        yield ("the table has several variants or learning rates, and dlcm ladder fit takes runs of one N, P and R for "
               "the same: leave the rows of one in")


def _note_of_checkpoints(run: PlannedRun) -> str:
    train, wanted = run.config.train, run.wanted_checkpoint_steps
    row = train.validate_every_steps
    while largest_divisor(row, wanted) * MOST_CHECKPOINTS < wanted:
        row += 1
    return (f"{run.name} writes a checkpoint every {train.checkpoint_every_steps} steps in place of every {wanted}, "
            f"because branches begin at rows of {train.validate_every_steps} steps; write validate_every: "
            f"{row * run.config.data.tokens_per_step}, for rows of {row}")


def stable_rows(run: PlannedRun) -> int:
    """Rows of the table between warm-up and decay."""
    optim, per_step = run.config.optim, run.config.data.tokens_per_step
    row = run.config.train.validate_every_steps * per_step
    return max(0, optim.stable_tokens // row - optim.warmup_tokens // row)


class Table:
    """The table of a study, collected again after every run."""

    def __init__(self, study: Study, runs: Sequence[PlannedRun], write_table: WriteTable, log: Log) -> None:
        self.study, self.runs, self.write_table, self.log = study, runs, write_table, log
        self._complete: dict[str, list[Row]] = {}
        """Of runs that are finished with all their branches."""
        self._refused: set[str] = set()

    def collect(self) -> tuple[Path, int]:
        """Writes the rows of all finished runs; the file and the number of rows. A run that cannot be read, or was
        trained as something else than the study says now, is named once and left out."""
        folder = study_folder(self.study)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"table.{self.study.table}"
        with one_at_a_time(folder):
            rows = [row for run in self.runs for row in self._rows(run)]
            if rows:
                self.write_table([row.cells for row in rows], file)
        return file, len(rows)

    def _rows(self, run: PlannedRun) -> list[Row]:
        if run.name in self._complete or run.name in self._refused:
            return self._complete.get(run.name, [])
        states = [state_of(job) for job in jobs_of(self.study, run)]
        if states[0] != "finished":
            return []
        try:
            check_same_run(run)
            ended = [branch for branch, state in zip(run.branches, states[1:], strict=True) if state == "finished"]
            rows = rows_of(replace(run, branches=tuple(branch for branch in ended if self._is_of(run, branch))))
        except UserError as error:
            self._refuse(run.name, error)
            return []
        if set(states) == {"finished"}:
            self._complete[run.name] = rows
        return rows

    def _is_of(self, run: PlannedRun, branch: Branch) -> bool:
        """Whether a branch is what the study says."""
        if branch.name in self._refused:
            return False
        try:
            check_same_branch(run, branch)
        except UserError as error:
            self._refuse(branch.name, error)
            return False
        return True

    def _refuse(self, name: str, error: UserError) -> None:
        self._refused.add(name)
        self.log(f"{name} is left out of the table: {error}")


def run_study(study: Study, runs: Sequence[PlannedRun], mine: Sequence[PlannedRun], write_table: WriteTable, log: Log
              ) -> bool:
    """Trains `mine` of the `runs` of a study, as far as they are not finished; whether none has failed.

    Stopped: this process was told to leave; the same command goes on.
    """
    write_run_files(study, mine)
    good, failed = _unchanged(study, mine)
    for outcome in failed:
        log(f"{outcome.job.name} is not trained: {outcome.said}")
    outcomes: list[Outcome] = list(failed)
    table = Table(study, runs, write_table, log)
    with Executor(study_folder(study) / LOGS) as executor:
        for outcome in executor.go_through(good):
            outcomes.append(outcome)
            if outcome.how == "finished":
                log(f"{outcome.job.name} is finished")
                table.collect()
            elif outcome.how in ("failed", "taken"):
                log(f"{outcome.job.name} " + ("has failed: " + outcome.said if outcome.how == "failed" else
                                              "is being trained by another process"))
    file, rows = table.collect()
    _conclude(outcomes, file, rows, log)
    return not any(outcome.how == "failed" for outcome in outcomes)


def _unchanged(study: Study, runs: Sequence[PlannedRun]) -> tuple[list[list[Job]], list[Outcome]]:
    """By run, what is to be trained, or was trained as the study says, the run first; and what was trained otherwise.
    Of a run that was, no branch is trained either."""
    good: list[list[Job]] = []
    failed: list[Outcome] = []
    for run in runs:
        trunk, *branches = jobs_of(study, run)
        try:
            if state_of(trunk) == "finished":
                check_same_run(run)
        except UserError as error:
            failed.append(Outcome(trunk, "failed", str(error)))
            continue
        good.append([trunk])
        for job, branch in zip(branches, run.branches, strict=True):
            try:
                check_same_branch(run, branch)
                good[-1].append(job)
            except UserError as error:
                failed.append(Outcome(job, "failed", str(error)))
    return good, failed


def _conclude(outcomes: Sequence[Outcome], file: Path, rows: int, log: Log) -> None:
    words = {"finished": "trained", "skipped": "finished before", "taken": "with another process", "failed": "failed"}
    counts = {how: sum(outcome.how == how for outcome in outcomes) for how in words}
    log(", ".join(f"{count} {words[how]}" for how, count in counts.items() if count) or "nothing to do")
    for outcome in outcomes:
        if outcome.how == "failed":
            log(f"  failed: {outcome.job.name}")
    if rows:
        log(f"{file} has {rows} rows; dlcm ladder fit {file} --out {file.parent / 'fit'}")


def write_for_slurm(study: Study, runs: Sequence[PlannedRun], log: Log) -> None:
    """Run files of all runs and, where a run is finished, of its branches; says how SLURM trains them. ConfigError: a
    finished run, or a branch, is not what the study says now. RunError: a branch cannot be made."""
    if not runs:
        log(NOTHING)
        return
    good, failed = _unchanged(study, runs)
    if failed:
        raise ConfigError("nothing is written: " + "; ".join(outcome.said for outcome in failed))
    files = write_run_files(study, runs)
    folder = study_folder(study) / BRANCHES
    branches = []
    ready = [job for jobs in good if state_of(jobs[0]) == "finished" for job in jobs[1:]]
    for job in progress_bar(ready, desc="branches", unit="branch"):
        if not folders(job.run):  # a kill leaves the other files of one behind
            make_branch(job)
        folder.mkdir(exist_ok=True)
        branches.append(folder / f"{job.name}.yaml")
        save_config(load_saved_config(job.run / CONFIG_FILE), branches[-1])
    for name, listed in ((RUNS, files), (BRANCHES, branches)):
        if listed:
            log(f"{len(listed)} run files are in {study_folder(study) / name}")
            log(f"sbatch --array=0-{len(listed) - 1} slurm/ladder.sh {write_list(study, name, listed)}")


def write_list(study: Study, kind: str, files: Sequence[Path]) -> Path:
    """The list of an array: task i trains the i-th of these run files. Its name follows from what it says, so that
    another choice is another file, and tasks that wait or are requeued find theirs as it was."""
    text = "".join(f"{file}\n" for file in files).encode()
    listed = study_folder(study) / LISTS / f"{kind}-{hashlib.sha256(text).hexdigest()[:DIGITS]}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    if not listed.is_file():
        write_atomically(listed, text)
    return listed


def this_part(given: tuple[int, int] | None) -> Part | None:
    """--task, else the task of the array that this process is."""
    return Part(*given) if given else part_of_array(os.environ)
