"""Branches that are there already: whether they are of the run and the decay that the study says, by their files.

No run is trained here; its directory is written as training leaves it behind, but for weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.checkpoint.folder import CONFIG, MANIFEST, Fingerprint, Identity, Manifest, describe_file
from dlcm_lightning.checkpoint.tensors import file_name
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.run_directory import CONFIG_FILE, METRICS_FILE, REPORT_FILE, finished, newest_step
from dlcm_lightning.scaling.ladder import study_run
from dlcm_lightning.scaling.ladder.measurements import _Measured, _Stretch, _trunk_rows
from dlcm_lightning.scaling.ladder.plan import grid
from dlcm_lightning.scaling.ladder.runs import Job, PlannedRun, check_same_branch, state_of
from dlcm_lightning.scaling.ladder.study import Study
from dlcm_lightning.scaling.ladder.study_run import Table, _unchanged, jobs_of, run_study, stable_rows, write_for_slurm
from dlcm_lightning.scaling.ladder.table_file import write_csv
from dlcm_lightning.training.anneal import branch as make
from dlcm_lightning.training.anneal import branch_config
from tests.scaling.ladder.conftest import TOKENS_PER_STEP, MakeStudy


def write_checkpoint(run: Path, config: Config, step: int, state: str) -> None:
    """state: stands for the weights."""
    folder = finished(run, step)
    folder.mkdir(parents=True)
    save_config(config, folder / CONFIG)
    weights = folder / file_name(0, 1)
    weights.write_text(state)
    manifest = Manifest(step, step * TOKENS_PER_STEP, "single", 1, Identity("rows", "fp32"), Fingerprint(5.0, "01"),
                        {file.name: describe_file(file) for file in (weights, folder / CONFIG)})
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))


def write_run(run: Path, config: Config, states: dict[int, str], last: int) -> None:
    """A finished one. states: of its checkpoints, by step."""
    for step, state in states.items():
        write_checkpoint(run, config, step, state)
    save_config(config, run / CONFIG_FILE)
    (run / REPORT_FILE).write_text(json.dumps({"steps": last, "validation": {"loss": 5.0}}))
    lines: list[dict[str, Any]] = []
    for step in range(6, last + 1, 6):
        lines += [{"kind": "train", "step": step, "loss": 5.1 - step / 100, "F": 0.25, "step_seconds": 0.1},
                  {"kind": "validation", "step": step, "loss": 5.0 - step / 100}]
    (run / METRICS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_branches(planned: PlannedRun, state: str) -> None:
    """Finished ones. state: that they begin with, the run's own is `trunk`."""
    for branch in planned.branches:
        config = planned.branch_config(branch)
        write_run(planned.branch_run(branch), config, {branch.first_step: state, branch.last_step: "own"},
                  branch.last_step)


@pytest.fixture
def study(make_study: MakeStudy, tmp_path: Path) -> Study:
    """18 steps, finished, with finished branches at 6 and at 18 over as many."""
    made = make_study(tmp_path, validate_every=1536, tokens=4608, overrides=["train.log_every_steps=6"],
                      decays={"at": [0.3, 1], "over": 0.999})
    planned = grid(made)[0]
    assert [(branch.first_step, branch.last_step) for branch in planned.branches] == [(6, 12), (18, 36)]
    write_run(planned.run, planned.config, {6: "trunk", 18: "trunk"}, 18)
    write_branches(planned, "trunk")
    return made


def collected(study: Study) -> tuple[int, list[str]]:
    """Rows of the table, and what was said."""
    said: list[str] = []
    return Table(study, grid(study), write_csv, said.append).collect()[1], said


def refused(study: Study) -> dict[str, str]:
    """Why, by name."""
    return {outcome.job.name: outcome.said for outcome in _unchanged(study, grid(study))[1]}


def test_branches_of_their_run_are_rows_of_it_and_are_written_for_slurm(study: Study) -> None:
    assert collected(study) == (5, []) and not refused(study)
    said: list[str] = []
    write_for_slurm(study, grid(study), said.append)
    assert [line.split(" ", 1)[0] for line in said] == ["1", "sbatch", "2", "sbatch"]


def test_what_a_branch_is_planned_as_is_what_anneal_makes(study: Study) -> None:
    planned = grid(study)[0]
    for branch in planned.branches:
        config, step = branch_config(planned.run, branch.first_step * TOKENS_PER_STEP, branch.steps * TOKENS_PER_STEP,
                                     branch.name, [f"train.output_dir={study.output_dir}"])
        assert step == branch.first_step and config.optim == planned.branch_config(branch).optim
        assert Path(config.train.output_dir) / config.name == planned.branch_run(branch)


def test_a_branch_of_a_run_that_was_trained_again_with_another_rate_is_refused(study: Study) -> None:
    other = replace(study, overrides=(*study.overrides, "optim.lr_token=1e-3"))
    planned = grid(other)[0]
    shutil.rmtree(planned.run)
    names = {branch.name for branch in planned.branches}
    before = refused(other)  # the run is not there yet
    assert set(before) == names and all("of a run that was there before" in said for said in before.values())
    write_run(planned.run, planned.config, {6: "other", 18: "other"}, 18)
    after = refused(other)
    assert set(after) == names
    assert all("it differs in optim.lr_token" in said and "move the folder away" in said for said in after.values())
    rows, said = collected(other)
    assert rows == 3 and [line.partition(" ")[0] for line in said] == [branch.name for branch in planned.branches]
    with pytest.raises(ConfigError, match=r"nothing is written: .*anneal-1536 .* differs in optim\.lr_token"):
        write_for_slurm(other, grid(other), print)
    assert not (Path(study.output_dir) / "t" / "branches").exists()


def test_a_branch_of_a_run_that_was_trained_again_as_it_was_is_known_by_its_first_checkpoint(study: Study) -> None:
    planned = grid(study)[0]
    shutil.rmtree(planned.run)
    write_run(planned.run, planned.config, {6: "trunk", 18: "again"}, 18)
    assert list(refused(study)) == [planned.branches[1].name]
    assert "begins with another checkpoint than that of step 18" in refused(study)[planned.branches[1].name]
    assert collected(study)[0] == 4


def test_and_by_its_log_once_that_checkpoint_is_dropped(study: Study) -> None:
    planned = grid(study)[0]
    for branch in planned.branches:  # as its own retention does
        shutil.rmtree(finished(planned.branch_run(branch), branch.first_step))
    assert not refused(study)
    shutil.rmtree(planned.run)
    write_run(planned.run, planned.config, {6: "trunk", 18: "again"}, 18)
    assert not refused(study)  # bit for bit the same run, as far as anything says
    file = planned.run / METRICS_FILE
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["loss"] += 1e-9 * (line["step"] > 6)
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert list(refused(study)) == [planned.branches[1].name]
    assert "trained again since" in refused(study)[planned.branches[1].name]


def test_a_branch_over_another_length_is_refused_and_neither_trained_nor_written(study: Study) -> None:
    assert study.decays is not None
    other = replace(study, decays=replace(study.decays, over=0.5))
    planned = grid(other)[0]
    assert set(refused(other)) == {branch.name for branch in planned.branches}
    said: list[str] = []
    assert not run_study(other, grid(other), grid(other), write_csv, said.append)
    assert sum("is not trained" in line and "optim.decay_fraction" in line for line in said) == 2
    assert said[-1].startswith(str(Path(study.output_dir) / "t" / "table.csv"))
    with pytest.raises(ConfigError, match=r"differs in optim\.total_tokens, optim\.decay_fraction; restore"):
        write_for_slurm(other, grid(other), print)


def test_a_branch_that_decays_otherwise_is_no_row_though_it_has_as_many_steps(study: Study) -> None:
    planned = grid(study)[0]
    branch = planned.branches[0]
    config = planned.branch_config(branch)
    other = replace(config, optim=replace(config.optim, decay_fraction=0.25))
    save_config(other, planned.branch_run(branch) / CONFIG_FILE)
    rows, said = collected(study)
    assert rows == 4 and "differs in optim.decay_fraction" in said[0] and len(said) == 1
    with pytest.raises(ConfigError, match=r"decays\.over is the length"):
        check_same_branch(planned, branch)


def test_where_and_how_a_branch_is_trained_may_differ(study: Study) -> None:
    planned = grid(study)[0]
    for branch in planned.branches:
        config = planned.branch_config(branch)
        train = replace(config.train, devices=0, nodes=0, output_dir="elsewhere", log_every_steps=5)
        save_config(replace(config, train=train), planned.branch_run(branch) / CONFIG_FILE)
    assert not refused(study)


def test_a_finished_run_of_another_study_is_not_written_for_slurm(study: Study) -> None:
    other = replace(study, overrides=(*study.overrides, "optim.beta2=0.9"))
    with pytest.raises(ConfigError, match=r"nothing is written: .* of another run: it differs in optim\.beta2"):
        write_for_slurm(other, grid(other), print)


def test_a_branch_without_a_checkpoint_is_made_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two moves leaves the configuration behind."""
    planned = grid(study)[0]
    killed, whole = (planned.branch_run(branch) for branch in planned.branches)
    shutil.rmtree(killed / "checkpoints")
    made: list[Path] = []

    def here(job: Job) -> None:  # what the child does, in this process
        over = int(job.arguments[job.arguments.index("--over") + 1])
        config, step = branch_config(planned.run, job.first_step * TOKENS_PER_STEP, over, job.name,
                                     [one for one in job.arguments if "=" in one])
        made.append(make(planned.run, config, step))

    monkeypatch.setattr(study_run, "make_branch", here)
    write_for_slurm(study, grid(study), print)
    assert made == [killed] and (newest_step(killed), newest_step(whole)) == (6, 36) and not refused(study)


def test_branches_of_a_study_that_has_moved_are_made_beside_their_run(study: Study, tmp_path: Path) -> None:
    moved = replace(study, output_dir=str(tmp_path / "moved"))
    before, after = grid(study)[0], grid(moved)[0]
    shutil.copytree(before.run, after.run)
    trunk, *branches = jobs_of(moved, after)
    assert state_of(trunk) == "finished" and not refused(moved)
    for job in branches:
        overrides = [one for one in job.arguments if "=" in one]
        assert overrides == [f"train.output_dir={moved.output_dir}"]
        config, _ = branch_config(after.run, job.first_step * TOKENS_PER_STEP, TOKENS_PER_STEP, job.name, overrides)
        assert Path(config.train.output_dir) / config.name == job.run and job.run.parent == after.run.parent


@pytest.mark.parametrize("tenths", range(1, 10))
def test_the_row_at_which_a_decay_begins_is_one_for_every_fraction(make_study: MakeStudy, tmp_path: Path, tenths: int
                                                                   ) -> None:
    run = grid(make_study(tmp_path, tokens=10_240, validate_every=1024,
                          overrides=[f"optim.decay_fraction={tenths / 10}", "optim.warmup_tokens=0"]))[0]
    assert run.config.optim.stable_tokens == (10 - tenths) * 1024
    assert stable_rows(run) == 10 - tenths
    steps = range(4, 41, 4)
    measured = _Measured([_Stretch(step, 4, 0.25, 1.0) for step in steps], {step: {"loss": 5.0} for step in steps})
    rows = list(_trunk_rows(run, measured))
    assert [row.tokens for row in rows if row.phase == "stable"] == [1024 * (one + 1) for one in range(10 - tenths)]
    assert [row.decay_from for row in rows if row.phase == "decayed"] == [(10 - tenths) * 1024]
