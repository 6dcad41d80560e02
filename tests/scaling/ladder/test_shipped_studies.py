"""The studies that come with the package, and the array that SLURM makes of one."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.compose import differences, load_config
from dlcm_lightning.config import Config
from dlcm_lightning.model.mup import Role, Rule, hyperparameters_of, logit_scale
from dlcm_lightning.scaling.ladder.plan import grid
from dlcm_lightning.scaling.ladder.study_file import STUDIES, read_study
from dlcm_lightning.scaling.ladder.study_run import notes_of
from dlcm_lightning.scaling.ladder.sweeps import Runs, section_of, sweep_points, width_overrides
from dlcm_lightning.scaling.law.table import SAME_SIZE
from dlcm_lightning.shipped import names

ROOT = Path(__file__).parents[3]


def test_every_shipped_study_can_be_planned_and_says_how_it_is_called() -> None:
    assert names(STUDIES) == ["ladder_cpu", "lr_transfer_cpu", "paper_ladder"]
    for name in names(STUDIES):
        study = read_study(name)
        assert study.name == name
        header = [line for line in (ROOT / STUDIES / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
        assert any(f"dlcm ladder {'transfer' if study.transfer else 'run'} {name}" in line for line in header)
        assert any(line.startswith("# Hardware: ") for line in header)


@pytest.mark.parametrize("name", ["ladder_cpu", "paper_ladder"])
def test_shipped_ladders_are_grids_that_a_law_can_be_fitted_to(name: str) -> None:
    study = read_study(name)
    runs = grid(study)
    assert not list(notes_of(runs)) and all(run.branches for run in runs)
    assert len(runs) == len(study.sizes) * (len(study.backbone_shares) * len(study.ratios) + 1)
    for size in study.sizes:
        sizes = [run.weights.non_embedding for run in runs if f"-{size.label}-" in run.name]
        assert max(sizes) / min(sizes) < SAME_SIZE and max(sizes) == pytest.approx(size.parameters, rel=0.1)
    for share in study.backbone_shares:
        for run in runs:
            if f"-P{100 * share:g}-" in run.name:
                assert run.weights.backbone_share == pytest.approx(share, abs=0.05)


def rules(config: Config) -> dict[Role, Rule]:
    return {role: hyperparameters_of(role, config.model, config.optim) for role in Role}


@pytest.mark.parametrize("width", ["D32", "D64", "D128", "E64", "E128", "E256"])
def test_without_muP_exactly_the_rates_of_the_widened_stack_and_the_logits_are_those_of_the_narrow_one(width: str
                                                                                                     ) -> None:
    study = read_study("lr_transfer_cpu")
    sweep = next(one for one in section_of(study).sweeps if one.name == width[0])
    at, narrow = next(one for one in sweep.widths if one.name == width), sweep.widths[0]
    mup, fixed = sweep.variants
    one, other, first = (load_config(study.base, [*study.overrides, *width_overrides(*pair)])
                         for pair in ((at, mup), (at, fixed), (narrow, mup)))
    changed = {Role.TOKEN, Role.TOKEN_TO_CONCEPT, Role.BOUNDARY} if width[0] == "D" else {
        Role.CONCEPT, Role.CONCEPT_TO_TOKEN}
    before, after, base = rules(one), rules(other), rules(first)
    for role in Role:
        rate = before[role].learning_rate * (at.times if role in changed else 1)
        assert after[role].learning_rate == pytest.approx(rate, rel=1e-12)
        if role in changed:
            assert after[role].learning_rate == pytest.approx(base[role].learning_rate, rel=1e-12)
        assert (after[role].deviation or 0) == pytest.approx(before[role].deviation or 0, rel=1e-12)
        assert after[role].epsilon == pytest.approx(before[role].epsilon, rel=1e-12)
        assert after[role].weight_decay == before[role].weight_decay == 0
    assert logit_scale(one.model) == pytest.approx(logit_scale(first.model) / (at.times if width[0] == "D" else 1))
    assert logit_scale(other.model) == logit_scale(first.model)
    assert one.model == replace(other.model, mup=one.model.mup)


def test_the_shipped_transfer_widens_one_stack_and_leaves_the_other() -> None:
    study = read_study("lr_transfer_cpu")
    for sweep in section_of(study).sweeps:
        stack = "token" if sweep.name == "D" else "concept"
        first, *wider = (load_config(study.base, [*study.overrides, *one.overrides]) for one in sweep.widths)
        for width, config in zip(sweep.widths[1:], wider, strict=True):
            fields = {f"model.{name}_{stack}" for name in ("d", "heads", "kv_heads", "ffn")}
            assert set(differences(first, config)) == fields
            for name in fields:
                key = name.removeprefix("model.")
                assert getattr(config.model, key) == width.times * getattr(first.model, key)


def test_points_of_the_shipped_transfer_that_are_the_same_are_trained_once() -> None:
    runs = Runs()
    points = sweep_points(read_study("lr_transfer_cpu"), {}, runs)
    assert len(points) == 84 and len(runs.all()) == 116  # of two seeds each


@pytest.mark.parametrize(("arguments", "task", "expected"), [
    ([], "1", "job configs/run/ladder_274m.yaml"), (["x=1"], "3", "job configs/run/ladder_833m.yaml x=1"),
    (["study/runs.txt"], "0", "job study/runs/b.yaml"), (["study/runs.txt", "x=1"], "1", "job study/runs/a.yaml x=1"),
    (["study/runs/b.yaml", "x=1"], "0", "job study/runs/b.yaml x=1"), (["study/runs.txt"], "2", "--array=0-1"),
    (["study/runs"], "0", "is a folder"), (["study/gone.txt"], "0", "study/gone.txt")])
def test_a_task_of_the_array_takes_its_run_file(tmp_path: Path, arguments: list[str], task: str, expected: str) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "study/runs").mkdir(parents=True)
    for name in "abc":
        (tmp_path / f"study/runs/{name}.yaml").write_text("")
    (tmp_path / "study/runs.txt").write_text("study/runs/b.yaml\nstudy/runs/a.yaml\n")
    said = tmp_path / "python.sh"
    said.write_text('#!/bin/bash\nshift 2\necho "$@"\n')
    said.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": task,
                   "DLCM_PYTHON": str(said), "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", "slurm/ladder.sh", *arguments], cwd=tmp_path, env=environment, text=True,
                          check=False, capture_output=True)
    assert expected in (done.stdout.splitlines() or done.stderr.splitlines())[0]
    assert (done.returncode == 0) == expected.startswith("job")
