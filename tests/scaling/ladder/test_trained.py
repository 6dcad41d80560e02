"""Studies that are really trained, by sub-processes, at sizes that take a second or two each."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.checkpoint.folder import Manifest
from dlcm_lightning.compose import load_config
from dlcm_lightning.errors import STOPPED
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.run_directory import finished, newest_step
from dlcm_lightning.scaling.ladder.execute import make_branch
from dlcm_lightning.scaling.ladder.measurements import rows_of
from dlcm_lightning.scaling.ladder.parquet_table import write_parquet
from dlcm_lightning.scaling.ladder.plan import grid
from dlcm_lightning.scaling.ladder.runs import PlannedRun, reached_step, state_of
from dlcm_lightning.scaling.ladder.study import Study
from dlcm_lightning.scaling.ladder.study_run import (
    Table,
    jobs_of,
    notes_of,
    overview,
    run_study,
    write_for_slurm,
    write_run_files,
)
from dlcm_lightning.scaling.ladder.table_file import write_csv
from dlcm_lightning.scaling.law.fit_table import fit_table
from dlcm_lightning.scaling.law.table import read_table
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.training.run_lock import RunLock
from tests.scaling.ladder.conftest import TOKENS_PER_STEP, MakeStudy

TIMEOUT = 60


def trained(study: Study, only: list[PlannedRun] | None = None) -> tuple[bool, list[str]]:
    """Whether no run failed, and what was said."""
    said: list[str] = []
    runs = grid(study)
    return run_study(study, runs, runs if only is None else only, write_csv, said.append), said


def table_of(study: Study) -> list[dict[str, str]]:
    with (Path(study.output_dir) / study.name / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ladder(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """Three sizes, two R, trained."""
    os.environ["DLCM_DEVICE"] = "cpu"
    study = make_study(tmp_path_factory.mktemp("ladder"), sizes=[18e3, 3e4, 52224], backbone_shares=[0.6],
                       ratios=[2, 4], validate_every=1024, tokens=5000)
    good, said = trained(study)
    assert good, said
    yield study


@pytest.fixture(scope="module")
def trunk(make_study: MakeStudy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    """A run with two branches, trained. Lines every third step, rows every sixth."""
    os.environ["DLCM_DEVICE"] = "cpu"
    study = make_study(tmp_path_factory.mktemp("trunk"), validate_every=1536, tokens=4608,
                       overrides=["train.checkpoint_every_steps=4"], decays={"at": [0.3, 1], "over": 0.5})
    good, said = trained(study)
    assert good, said
    yield study


def test_a_table_of_real_runs_can_be_fitted(ladder: Study, tmp_path: Path) -> None:
    file = Path(ladder.output_dir) / "t" / "table.csv"
    runs = read_table(file, off_target=10)
    assert [run.name for run in runs] == sorted(run.name for run in grid(ladder))
    assert all(run.flops is not None and len(run.tokens) == 4 and len(run.decayed) == 1 for run in runs)
    said: list[str] = []
    fitted = fit_table(file, tmp_path, starts=1, bootstraps=0, off_target=10, log=said.append)
    assert fitted.laws.concept is not None and (tmp_path / "law.json").is_file()


def test_the_decay_that_ends_a_run_of_the_base_s_schedule_is_its_last_row_and_nothing_of_it_is_stable(ladder: Study
                                                                                                    ) -> None:
    rows = [row for row in table_of(ladder) if row["run"] == "t-30k-P60-R4-s0"]
    assert [(int(row["tokens"]), row["phase"]) for row in rows] == [
        (1024, "stable"), (2048, "stable"), (3072, "stable"), (4096, "stable"), (5120, "decayed")]
    assert rows[-1]["decay_from"] == "4096" and {row["decay_from"] for row in rows[:-1]} == {""}


def test_rows_of_the_warm_up_are_left_out(ladder: Study) -> None:
    run = grid(ladder)[0]
    later = replace(run.config, optim=replace(run.config.optim, warmup_tokens=2048))
    assert [row.tokens for row in rows_of(replace(run, config=later))] == [3072, 4096, 5120]


def test_what_is_finished_is_not_trained_again(ladder: Study) -> None:
    files = [file for run in grid(ladder) for file in run.run.rglob("*")]
    before = [file.stat().st_mtime_ns for file in files]
    good, said = trained(ladder)
    assert good and said[0] == "6 finished before"
    assert len(files) > 60 and before == [file.stat().st_mtime_ns for file in files]


def test_the_list_says_what_is_done(ladder: Study) -> None:
    lines = list(overview(ladder, grid(ladder)))
    assert sum(line.endswith("finished") for line in lines) == 6
    shapes = [line.split()[2:5] for line in lines[1:-1:2]]
    assert shapes == [["16", "32", "2+1+1"], ["16", "32", "2+2+3"], ["32", "32", "1+3+1"]]
    assert lines[-1].startswith("6 runs and branches, 6 of them finished; 30,720 tokens")
    assert lines[-1].endswith("0.00e+00 of them left")


def test_a_run_that_was_trained_as_something_else_is_named_and_left_out(ladder: Study) -> None:
    other = replace(ladder, overrides=("optim.beta2=0.9",))
    runs = grid(other)[:1]
    before = table_of(ladder)
    said: list[str] = []
    assert not run_study(other, runs, runs, write_csv, said.append)
    assert "differs in optim.beta2" in said[0] and "left out of the table" in said[1]
    assert table_of(ladder) == before


def test_the_same_table_as_parquet(ladder: Study) -> None:
    file, rows = Table(replace(ladder, table="parquet"), grid(ladder), write_parquet, print).collect()
    assert rows == 30
    csv_runs, runs = (read_table(one, off_target=10) for one in (file.with_suffix(".csv"), file))
    for before, after in zip(csv_runs, runs, strict=True):
        assert before.loss.tolist() == after.loss.tolist() and before.rung == after.rung


# Branches


def test_a_branch_begins_at_its_row_and_its_end_is_a_row_of_its_run(trunk: Study) -> None:
    run = grid(trunk)[0]
    assert [(branch.first_step, branch.steps) for branch in run.branches] == [(6, 3), (18, 9)]
    for branch in run.branches:
        assert finished(run.run, branch.first_step).is_dir()
        own = [json.loads(line) for line in (run.branch_run(branch) / "metrics.jsonl").read_text().splitlines()]
        new = [line for line in own if line["step"] > branch.first_step]
        assert new[0]["lr_token"] <= own[0]["lr_token"] and newest_step(run.branch_run(branch)) == branch.last_step
        assert Manifest.load(finished(run.branch_run(branch), branch.last_step)).tokens == (
            branch.last_step * TOKENS_PER_STEP)
    rows = [(int(row["tokens"]), row["phase"], row["decay_from"]) for row in table_of(trunk)]
    assert rows == [(1536, "stable", ""), (3072, "stable", ""), (4608, "stable", ""), (2304, "decayed", "1536"),
                    (6912, "decayed", "4608")]
    assert {row["run"] for row in table_of(trunk)} == {run.name}


def test_R_and_FLOPs_of_a_row_count_every_step(trunk: Study, tmp_path: Path) -> None:
    """Against the same run, which says every single step."""
    planned = grid(trunk)[0]
    pretrain(replace(planned.config, train=replace(planned.config.train, output_dir=str(tmp_path), log_every_steps=1)),
             lambda line: None)
    lines = [json.loads(line) for line in (tmp_path / planned.name / "metrics.jsonl").read_text().splitlines()]
    share = {line["step"]: line["F"] for line in lines if line["kind"] == "train"}
    assert sorted(share) == list(range(1, 19)) and planned.config.train.log_every_steps == 3
    losses = {line["tokens"]: line["loss"] for line in lines if line["kind"] == "validation"}
    for row in table_of(trunk)[:3]:
        steps = [share[step] for step in range(1, int(row["tokens"]) // TOKENS_PER_STEP + 1)]
        assert float(row["R"]) == pytest.approx(len(steps) / sum(steps), rel=1e-12)
        assert float(row["loss"]) == losses[int(row["tokens"])]
        means = [sum(steps[place:place + 3]) / 3 for place in range(0, len(steps), 3)]  # of every line
        flops, closer = (sum(TOKENS_PER_STEP * training_flops_per_token(planned.config.model, 64, one) for one in some)
                         for some in (means, steps))
        assert float(row["flops"]) == pytest.approx(3 * flops, rel=1e-12) == pytest.approx(closer, rel=1e-3)


def test_what_a_branch_adds_up_is_its_run_s_until_it_begins_and_then_its_own(trunk: Study) -> None:
    run = grid(trunk)[0]
    rows = rows_of(run)
    for branch, row in zip(run.branches, rows[3:], strict=True):
        concepts, seconds = 0.0, 0.0
        start = branch.first_step
        for folder, first, last in ((run.run, 0, start), (run.branch_run(branch), start, branch.last_step)):
            before = first
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                read: dict[str, Any] = json.loads(line)
                if read["kind"] == "train" and first < read["step"] <= last:
                    concepts += (read["step"] - before) * TOKENS_PER_STEP * read["F"]
                    seconds += (read["step"] - before) * read["step_seconds"]
                    before = read["step"]
        assert (row.tokens / concepts, seconds) == pytest.approx((row.R, row.seconds), rel=1e-12)


def test_branches_for_slurm_are_made_without_being_trained(trunk: Study) -> None:
    assert trunk.decays is not None
    run = grid(replace(trunk, decays=replace(trunk.decays, over=0.25)))[0]
    job = replace(jobs_of(trunk, run)[1], name="by_hand", run=run.run.with_name("by_hand"))
    make_branch(replace(job, arguments=(*job.arguments[:-1], "by_hand")))
    assert newest_step(job.run) == 6 and state_of(job) == "new"
    said: list[str] = []
    write_for_slurm(trunk, grid(trunk), said.append)
    folder = Path(trunk.output_dir) / "t"
    assert [said[0], said[2]] == [f"1 run files are in {folder / 'runs'}", f"2 run files are in {folder / 'branches'}"]
    assert said[1].startswith(f"sbatch --array=0-0 slurm/ladder.sh {folder / 'lists' / 'runs-'}")
    assert said[3].startswith(f"sbatch --array=0-1 slurm/ladder.sh {folder / 'lists' / 'branches-'}")
    assert Path(said[3].split()[-1]).read_text().splitlines() == [
        str(folder / "branches" / f"{branch.name}.yaml") for branch in grid(trunk)[0].branches]
    assert {load_config(file).name for file in (folder / "branches").iterdir()} == {
        branch.name for branch in grid(trunk)[0].branches}


# Going on, failing, sharing


def test_a_run_that_fails_is_named_one_that_is_held_is_left_and_the_others_go_on(make_study: MakeStudy, tmp_path: Path
                                                                                 ) -> None:
    study = make_study(tmp_path, tokens=1024, variants=[
        {"name": "lost", "overrides": [f"data.root={tmp_path / 'nowhere'}"]}, "held", "good"])
    lost, held, good = grid(study)
    with RunLock(held.run) as lock:
        lock.acquire()
        fine, said = trained(study)
    assert not fine
    assert f"{lost.name} has failed" in said[0] and "nowhere" in said[0]
    assert said[1:4] == [f"{held.name} is being trained by another process", f"{good.name} is finished",
                         "1 trained, 1 with another process, 1 failed"]
    assert [state_of(jobs_of(study, run)[0]) for run in (lost, held, good)] == ["new", "new", "finished"]
    fine, said = trained(study, [held, good])
    assert fine and said[:2] == [f"{held.name} is finished", "1 trained, 1 finished before"]


def test_a_study_that_is_told_to_leave_saves_its_run_and_the_next_call_goes_on(make_study: MakeStudy, tmp_path: Path,
                                                                               base_file: Path) -> None:
    study = make_study(tmp_path, tokens=200 * TOKENS_PER_STEP, overrides=["train.log_every_steps=1"])
    file = tmp_path / "study.yaml"
    file.write_text(f"name: t\nbase: {base_file}\noutput_dir: {tmp_path}\ntokens: {200 * TOKENS_PER_STEP}\n"
                    "overrides: [train.log_every_steps=1]\n")
    run = grid(study)[0]
    job = jobs_of(study, run)[0]
    command = [sys.executable, "-m", "dlcm_lightning", "ladder", "run", str(file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + TIMEOUT
        while reached_step(job) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == STOPPED, said
    assert f"SIGTERM: {run.name} has saved itself; the same command continues" in said
    saved = newest_step(run.run)
    assert 5 <= saved < 200 and state_of(job) == "begun"
    with RunLock(run.run) as lock:
        lock.acquire()  # nobody trains it any more
    good, _ = trained(study)
    assert good and state_of(job) == "finished"
    assert f"continuing {run.run} at step {saved}" in (tmp_path / "t" / "logs" / f"{run.name}.log").read_text()
    assert [row.tokens for row in rows_of(run)] == [200 * TOKENS_PER_STEP]


def test_a_table_with_several_rates_or_too_few_rows_is_remarked_on_beforehand(make_study: MakeStudy, tmp_path: Path
                                                                              ) -> None:
    few, mixed = notes_of(grid(make_study(tmp_path, learning_rates=[1e-3, 2e-3])))
    assert "0 rows between warm-up and decay" in few and "several variants or learning rates" in mixed
    assert not list(notes_of(grid(make_study(tmp_path, validate_every=512))))


def test_run_files_do_for_slurm_what_the_study_does(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, ratios=[2, 4])
    runs = grid(study)
    files = write_run_files(study, runs)
    assert [load_config(file) for file in files] == [run.config for run in runs]
