"""A decay that branches off a warm-up-stable run is the run that had that schedule from the beginning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.config import Config, ConfigError, OptimConfig
from dlcm_lightning.errors import CheckpointError, RunError
from dlcm_lightning.run_directory import finished, folders
from dlcm_lightning.training.anneal import branch, branch_config
from dlcm_lightning.training.lr_schedule import learning_rate_factor, same_rates_until
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.training.run_lock import RunLock
from tests.training.test_run import assert_same_end, last, lines, quiet, run_folder


@pytest.fixture
def trunk(run_config: Config) -> Config:
    """Twelve steps at a held rate, checkpoints every three; all kept."""
    optim = replace(run_config.optim, decay_fraction=0.0)
    train = replace(run_config.train, keep_last=9)
    config = replace(run_config, name="trunk", optim=optim, train=train)
    pretrain(config, quiet)
    return config


def straight(trunk: Config, name: str, steps: int, decay_steps: int) -> Config:
    """The run that has this schedule from its first step."""
    total = steps * trunk.data.tokens_per_step
    config = replace(trunk, name=name, optim=replace(trunk.optim, total_tokens=total,
                                                     decay_fraction=decay_steps / steps))
    pretrain(config, quiet)
    return config


def test_a_branch_ends_as_the_run_that_was_to_decay_from_the_beginning(trunk: Config) -> None:
    each = trunk.data.tokens_per_step
    config, step = branch_config(run_folder(trunk), 6 * each - 5, 4 * each - 3, "", [])
    assert (step, config.total_steps, config.name) == (6, 10, f"trunk-anneal-{6 * each}")
    branch(run_folder(trunk), config, step)
    assert len(lines(config)) > 0, "what the trunk has logged up to there"
    pretrain(config, quiet)
    whole = straight(trunk, "straight", 10, 4)
    assert_same_end(config, whole)
    assert last(trunk).step == trunk.total_steps, "the trunk is what it was"


def test_two_branches_of_one_trunk_do_not_know_each_other_and_continue(trunk: Config) -> None:
    each = trunk.data.tokens_per_step
    for name, over in (("short", each), ("long", 3 * each)):
        assert main(["anneal", str(run_folder(trunk)), "--at", str(9 * each), "--over", str(over), "--name", name]) == 0
        assert main(["anneal", str(run_folder(trunk)), "--at", str(9 * each), "--over", str(over), "--name", name]) == 0
    ends = [folders(run_folder(replace(trunk, name=name)))[-1].name for name in ("short", "long")]
    assert ends == ["step-00000010", "step-00000012"]


def test_a_branch_of_another_length_does_not_go_on_in_the_directory_of_the_first(
    trunk: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    each, run = trunk.data.tokens_per_step, str(run_folder(trunk))
    at = ["--at", str(12 * each), "--name", "b"]
    assert main(["anneal", run, *at, "--over", str(2 * each)]) == 0
    assert main(["anneal", run, *at, "--over", str(5 * each)]) == 2
    assert "optim.total_tokens" in capsys.readouterr().err


def test_only_made_it_says_what_trains_it(trunk: Config, capsys: pytest.CaptureFixture[str]) -> None:
    each = trunk.data.tokens_per_step
    assert main(["anneal", str(run_folder(trunk)), "--at", str(12 * each), "--over", str(2 * each), "--name", "b",
                 "--only-make"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    made = run_folder(replace(trunk, name="b"))
    assert [one.name for one in folders(made)] == ["step-00000012"] and command[:2] == ["dlcm", "pretrain"]
    assert main(command[1:]) == 0
    assert folders(made)[-1].name == "step-00000014"


def test_what_cannot_be_branched_off_is_refused_with_the_remedy(trunk: Config, tmp_path: Path) -> None:
    each, run = trunk.data.tokens_per_step, run_folder(trunk)
    with pytest.raises(CheckpointError, match=rf"no checkpoint of step 5; there are some at {3 * each:,}, .*keep_eve"):
        branch_config(run, 5 * each, each, "", [])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        branch_config(tmp_path, each, each, "", [])
    with pytest.raises(ConfigError, match=r"optim\.schedule = 'cosine'"):
        branch_config(run, 9 * each, each, "", ["optim.schedule=cosine"])
    decayed = straight(trunk, "decayed", 12, 6)
    with pytest.raises(ConfigError, match=r"holds its rate from .* choose a checkpoint between"):
        branch_config(run_folder(decayed), 12 * each, each, "", [])
    for field in ("optim.total_tokens", "optim.decay_fraction"):
        with pytest.raises(ConfigError, match="follows from --at and --over"):
            branch_config(run, 9 * each, each, "", [f"{field}=1"])
    with pytest.raises(ConfigError, match=r"differs in optim\.lr_token"):
        branch_config(run, 9 * each, each, "", ["optim.lr_token=1"])
    with pytest.raises(ConfigError, match="is the trunk itself"):
        branch_config(run, 12 * each, each, "trunk", [])
    (finished(run, 12) / "config.yaml").write_text("name: trunk\n")  # the manifest knows another
    with pytest.raises(CheckpointError, match=r"instead of"):
        branch(run, replace(trunk, name="b"), 12)
    assert not folders(run.parent / "b") and not list(run.parent.glob(".branch-*"))


def test_a_branch_lies_beside_its_trunk_on_whatever_processes_there_are(trunk: Config, tmp_path: Path) -> None:
    run, each = run_folder(trunk), trunk.data.tokens_per_step
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    run.rename(moved / "trunk")
    config, _ = branch_config(moved / "trunk", 9 * each, each, "", [])
    assert Path(config.train.output_dir) == moved and (config.train.devices, config.train.nodes) == (0, 0)
    config, _ = branch_config(moved / "trunk", 9 * each, each, "", ["train.devices=2", "train.output_dir=there"])
    assert config.train.output_dir.endswith("there") and config.train.devices == 2


def test_a_branch_that_another_process_makes_is_left_to_it(trunk: Config) -> None:
    config, step = branch_config(run_folder(trunk), 9 * trunk.data.tokens_per_step, 1, "b", [])
    with RunLock(run_folder(trunk).parent / "b") as lock:
        lock.acquire()
        with pytest.raises(RunError, match="in use by a running job"):
            branch(run_folder(trunk), config, step)
    assert not folders(run_folder(trunk).parent / "b")
    branch(run_folder(trunk), config, step)
    assert len(folders(run_folder(trunk).parent / "b")) == 1


def test_a_trunk_whose_tokens_are_no_whole_steps_can_be_branched_off_and_made_longer(run_config: Config) -> None:
    """As all that are given in round numbers."""
    each = run_config.data.tokens_per_step
    optim = replace(run_config.optim, decay_fraction=0.0, total_tokens=12 * each - 5)
    trunk = replace(run_config, name="trunk", optim=optim, train=replace(run_config.train, keep_last=9))
    pretrain(trunk, quiet)
    config, step = branch_config(run_folder(trunk), 12 * each - 5, 2 * each, "", [])
    assert (step, config.total_steps) == (12, 14)
    longer = replace(trunk, optim=replace(optim, total_tokens=15 * each - 1))
    pretrain(longer, quiet)
    assert last(longer).step == 15
    shorter = replace(trunk, optim=replace(optim, total_tokens=9 * each))
    with pytest.raises(ConfigError, match=r"differs in optim\.total_tokens"):
        pretrain(shorter, quiet)


def test_a_run_that_holds_its_rate_can_be_made_longer_and_is_then_the_longer_run(trunk: Config) -> None:
    longer = replace(trunk, optim=replace(trunk.optim, total_tokens=15 * trunk.data.tokens_per_step,
                                          decay_fraction=0.2))
    said: list[str] = []
    pretrain(longer, said.append)
    assert any("schedule from here on: total_tokens" in line for line in said), said
    whole = straight(trunk, "straight", 15, 3)
    mine, theirs = last(longer), last(whole)
    with mine.tensors() as tensors, theirs.tensors() as expected:
        for name in expected.names():
            assert tensors.get(name).equal(expected.get(name)), name


def test_a_run_that_has_begun_to_decay_cannot(trunk: Config) -> None:
    decayed = straight(trunk, "decayed", 6, 3)
    longer = replace(decayed, optim=replace(decayed.optim, total_tokens=12 * trunk.data.tokens_per_step))
    with pytest.raises(ConfigError, match=r"differs in optim\.total_tokens"):
        pretrain(longer, quiet)


WSD = OptimConfig(total_tokens=1000, warmup_tokens=100, decay_fraction=0.2)


@pytest.mark.parametrize(("other", "until"), [
    (WSD, 1000),
    (replace(WSD, decay_fraction=0.4), 600),
    (replace(WSD, total_tokens=900), 720),
    (replace(WSD, total_tokens=5000, decay_fraction=0.0), 800),
    (replace(WSD, final_fraction=0.5), 800),
    (replace(WSD, warmup_tokens=101), -1),
    (replace(WSD, schedule="cosine"), -1),
])
def test_two_schedules_are_one_as_far_as_their_rates_are(other: OptimConfig, until: int) -> None:
    for tokens in range(10, 1001, 10):
        assert same_rates_until(tokens, WSD, other) == same_rates_until(tokens, other, WSD) == (tokens <= until)
        if tokens <= until:
            assert learning_rate_factor(tokens, WSD) == learning_rate_factor(tokens, other)
    assert WSD.stable_tokens == 800
