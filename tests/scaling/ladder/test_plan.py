"""The grid: which runs, under which names, with which steps for rows, checkpoints and branches."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest

from dlcm_lightning.compose import differences, load_config
from dlcm_lightning.config import ConfigError
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.ladder.plan import grid, largest_divisor
from dlcm_lightning.scaling.ladder.study_run import Part, chosen, notes_of, part_of_array, stable_rows, write_run_files
from tests.scaling.ladder.conftest import TOKENS_PER_STEP, MakeStudy


def test_the_grid_is_the_product_and_dense_partners_have_no_P_and_no_R(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, sizes=[3e4, 52224], backbone_shares=[0.6], ratios=[2, 4], kinds=["dlcm", "dense"],
                       seeds=[0, 7], learning_rates=[1e-3])
    runs = grid(study)
    assert [run.name for run in runs] == [
        f"t-{size}-{shape}-lr0.001-s{seed}" for size in ("30k", "52.2k") for shape in ("P60-R2", "P60-R4", "dense")
        for seed in (0, 7)]
    for run in runs:
        config = run.config
        assert config.seed == int(run.name[-1]) and config.train.output_dir == str(tmp_path)
        assert config.optim.lr_token == config.optim.lr_concept == config.optim.lr_boundary == 1e-3
        assert config.optim.lr_other == 3e-3
        assert config.total_steps * TOKENS_PER_STEP == 4096
        if config.model.kind == "dlcm":
            assert f"R{config.model.boundary.target_ratio:g}-" in run.name
            assert run.weights.backbone_share == pytest.approx(0.6, abs=0.05)
        assert run.weights.non_embedding == pytest.approx(3e4 if "30k" in run.name else 52224, rel=0.1)


def test_a_run_is_the_base_with_its_overrides_and_its_run_file_says_the_same(make_study: MakeStudy, tmp_path: Path
                                                                             ) -> None:
    study = make_study(tmp_path, sizes=[52224], ratios=[2], kinds=["dlcm", "dense"], validate_every=1000)
    runs = grid(study)
    for run, file in zip(runs, write_run_files(study, runs), strict=True):
        assert load_config(run.base, run.overrides) == run.config == load_config(file)


def test_a_dense_partner_of_equal_flops_costs_what_its_dlcm_costs(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, sizes=[52224], ratios=[2, 4], kinds=["dlcm", "dense"], dense=["flops"],
                       document_tokens=40)
    runs = {run.name: run for run in grid(study)}
    for ratio in (2, 4):
        dlcm, dense = runs[f"t-52.2k-R{ratio}-s0"], runs[f"t-52.2k-R{ratio}-denseflops-s0"]
        costs = [training_flops_per_token(run.config.model, 40) for run in (dlcm, dense)]
        assert costs[1] == pytest.approx(costs[0], rel=0.1) and dense.config.model.kind == "dense"
        assert dense.tokens == dlcm.tokens


def test_tokens_per_parameter_are_those_of_the_size_that_was_asked_for(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, sizes=[3e4], kinds=["dlcm", "dense"], tokens=0, tokens_per_parameter=0.5)
    assert {run.tokens for run in grid(study)} == {math.ceil(15000 / TOKENS_PER_STEP) * TOKENS_PER_STEP}


@pytest.mark.parametrize(("tokens", "every", "at"), [
    (100_000, 5000, [0.5, 1]), (100_000, 7000, [0.25, 0.5, 0.75, 1]), (123_457, 999, [0.3, 60_000]),
    (50_000, 50_000, [1]), (1_000_000, 10_000, [0.1, 0.2, 0.7])])
def test_branches_begin_at_rows_at_checkpoints_that_are_kept(make_study: MakeStudy, tmp_path: Path, tokens: int,
                                                             every: int, at: list[float]) -> None:
    run = grid(make_study(tmp_path, tokens=tokens, validate_every=every, decays={"at": at, "over": 0.2},
                          overrides=["train.checkpoint_every_steps=50"]))[0]
    train, steps = run.config.train, run.config.total_steps
    row = train.validate_every_steps
    assert row == math.ceil(every / TOKENS_PER_STEP) and steps % row == 0 and run.config.optim.decay_fraction == 0
    assert steps * TOKENS_PER_STEP >= tokens > (steps - row) * TOKENS_PER_STEP
    assert row % train.log_every_steps == 0 and train.checkpoint_every_steps <= 50
    assert len(run.branches) == len(at)
    for branch, asked in zip(run.branches, at, strict=True):
        wanted = asked * steps if asked <= 1 else asked / TOKENS_PER_STEP
        assert branch.first_step % row == 0 and abs(branch.first_step - wanted) <= row / 2
        assert branch.steps == max(1, round(0.2 * branch.first_step))
        if branch.first_step < steps:
            assert branch.first_step % train.checkpoint_every_steps == 0
            assert branch.first_step * TOKENS_PER_STEP % train.keep_every_tokens == 0


def test_a_branch_outside_of_its_run_is_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decays\.at = 9000: .* ends at 4,096 tokens"):
        grid(make_study(tmp_path, validate_every=1024, decays={"at": [9000]}))


@pytest.mark.parametrize("over", [1, TOKENS_PER_STEP - 1])
def test_a_decay_of_less_than_a_step_is_refused(make_study: MakeStudy, tmp_path: Path, over: int) -> None:
    with pytest.raises(ConfigError, match=rf"decays\.over = {over}: fewer tokens than one step .* such as 0\.2"):
        grid(make_study(tmp_path, validate_every=1024, decays={"at": [1], "over": over}))
    run = grid(make_study(tmp_path, validate_every=1024, decays={"at": [1], "over": TOKENS_PER_STEP}))[0]
    assert run.branches[0].steps == 1


def test_checkpoints_that_become_many_because_nothing_divides_a_row_are_remarked_on(make_study: MakeStudy,
                                                                                   tmp_path: Path) -> None:
    def noted(steps: int) -> list[str]:
        run = grid(make_study(tmp_path, tokens=400 * TOKENS_PER_STEP, validate_every=steps * TOKENS_PER_STEP,
                              decays={"at": [0.25, 1]}, overrides=["train.checkpoint_every_steps=50"]))
        return list(notes_of(run))

    assert noted(101) == ["t-base-s0 writes a checkpoint every 1 steps in place of every 50, because branches begin at "
                          f"rows of 101 steps; write validate_every: {102 * TOKENS_PER_STEP}, for rows of 102"]
    assert noted(102) == noted(100) == []


@pytest.mark.parametrize("axes", [{"ratios": [2, 4]}, {"kinds": ["dlcm", "dense"]}])
def test_axes_that_would_train_one_dense_model_several_times_are_refused(make_study: MakeStudy, tmp_path: Path,
                                                                        axes: dict[str, list[str]]) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(axes))} = .* is dense.* the same model .* several times"):
        grid(make_study(tmp_path, overrides=["model.kind=dense", "model.backbone_layers=0"], **axes))


@pytest.mark.parametrize("kinds", [["dlcm"], ["dlcm", "dense"]])
def test_a_variant_of_another_kind_is_refused(make_study: MakeStudy, tmp_path: Path, kinds: list[str]) -> None:
    other = {"name": "flat", "overrides": ["model.kind=dense", "model.encoder_layers=0", "model.backbone_layers=0"]}
    with pytest.raises(ConfigError, match=r"variants: flat makes t-R2-flat-s0 a model of the kind dense, .*kinds:"):
        grid(make_study(tmp_path, ratios=[2, 4], kinds=kinds, variants=[other]))


def test_a_branch_within_the_warm_up_is_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decays\.at: a branch of t-base-s0 would begin at 1,024 tokens, within"):
        grid(make_study(tmp_path, validate_every=1024, decays={"at": [0.25]}, overrides=["optim.warmup_tokens=2000"]))


def test_a_warm_up_may_be_longer_than_the_base(make_study: MakeStudy, tmp_path: Path) -> None:
    own = {"name": "own", "overrides": ["optim.warmup_tokens=20_480"]}
    study = make_study(tmp_path, tokens=40_960, sizes=[own, 3e4], overrides=["optim.warmup_tokens=12_288"])
    assert [run.config.optim.warmup_tokens for run in grid(study)] == [20_480, 12_288]
    with pytest.raises(ConfigError, match=r"warmup_tokens = 12288: .*total_tokens = 4096"):
        grid(make_study(tmp_path, overrides=["optim.warmup_tokens=12_288"]))


def test_two_runs_of_one_name_are_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two runs would be called t-30k-P60-s0"):
        grid(make_study(tmp_path, sizes=[3e4], backbone_shares=[0.6, 0.600000001]))


def test_a_rate_that_is_never_held_is_refused(make_study: MakeStudy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cosine"):
        grid(make_study(tmp_path, overrides=["optim.schedule=cosine"]))


def test_a_value_that_is_added_renames_no_run(make_study: MakeStudy, tmp_path: Path) -> None:
    names = {run.name for run in grid(make_study(tmp_path, ratios=[4], variants=["a"]))}
    assert names < {run.name for run in grid(make_study(tmp_path, ratios=[2, 4], variants=["a", "b"], seeds=[0, 1]))}


def test_named_sizes_and_variants_are_overrides(make_study: MakeStudy, tmp_path: Path) -> None:
    study = make_study(tmp_path, sizes=[{"name": "wide", "overrides": ["model.d_token=64", "model.heads_token=8"]}],
                       variants=[{"name": "dry", "overrides": ["optim.weight_decay=0"]}], kinds=["dlcm", "dense"])
    dlcm, dense = grid(study)
    assert (dlcm.name, dense.name) == ("t-wide-dry-s0", "t-wide-dense-dry-s0")
    assert dlcm.config.model.d_token == 64 and dlcm.config.optim.weight_decay == 0
    assert dense.weights.non_embedding == pytest.approx(matrix_parameters(dlcm.config.model).non_embedding, rel=0.1)


def test_parts_are_disjoint_whole_and_alike_in_cost(make_study: MakeStudy, tmp_path: Path) -> None:
    runs = grid(make_study(tmp_path, sizes=[3e4, 52224, 2e5], ratios=[2, 4, 8], seeds=[0, 1]))
    parts = [chosen(runs, None, Part(index, 4)) for index in range(4)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    costs = [sum(run.flops for run in part) for part in parts]
    assert max(costs) - min(costs) <= max(run.flops for run in runs)
    again = chosen(list(reversed(runs)), None, Part(2, 4))
    assert {run.name for run in again} == {run.name for run in parts[2]}
    assert [run.name for run in chosen(runs, "*-R4-s1", None)] == ["t-30k-R4-s1", "t-52.2k-R4-s1", "t-200k-R4-s1"]
    with pytest.raises(ConfigError, match="--only"):
        chosen(runs, "nothing", None)


def test_the_task_of_an_array_is_its_part() -> None:
    assert part_of_array({}) is None
    task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert part_of_array(task) == Part(2, 4)
    with pytest.raises(ConfigError, match="without gaps"):
        part_of_array({**task, "SLURM_ARRAY_TASK_ID": "9"})


def test_rows_before_the_warm_up_has_ended_and_in_the_decay_do_not_count(make_study: MakeStudy, tmp_path: Path) -> None:
    fields = {"tokens": 10_240, "validate_every": 1024, "overrides": ["optim.warmup_tokens=2048"]}
    assert stable_rows(grid(make_study(tmp_path, **fields))[0]) == 6  # at 3072, ..., 8192; the decay begins there
    assert stable_rows(grid(make_study(tmp_path, decays={"at": [1]}, **fields))[0]) == 8


@pytest.mark.parametrize(("number", "most", "expected"), [(12, 5, 4), (7, 6, 1), (6, 9, 6), (1, 1, 1)])
def test_largest_divisor(number: int, most: int, expected: int) -> None:
    assert largest_divisor(number, most) == expected


def test_runs_of_an_axis_differ_in_that_axis_alone(make_study: MakeStudy, tmp_path: Path) -> None:
    for before, after in pairwise(grid(make_study(tmp_path, ratios=[2, 4, 8]))):
        assert differences(before.config, after.config) == ["name", "model.boundary.target_ratio"]
