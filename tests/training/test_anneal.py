"""A decay that branches off a warm-up-stable run is the run that had that schedule from the beginning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.config import Config, ConfigError, OptimConfig
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.run_directory import finished, folders
from dlcm_lightning.training.anneal import branch, branch_config
from dlcm_lightning.training.lr_schedule import learning_rate_factor, same_rates_until, stable_tokens
from dlcm_lightning.training.run import pretrain
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
    assert main(["anneal", run, "--over", str(2 * each), "--name", "b"]) == 0
    assert main(["anneal", run, "--over", str(5 * each), "--name", "b"]) == 2
    assert "optim.total_tokens" in capsys.readouterr().err


def test_only_made_it_says_what_trains_it(trunk: Config, capsys: pytest.CaptureFixture[str]) -> None:
    each = trunk.data.tokens_per_step
    assert main(["anneal", str(run_folder(trunk)), "--over", str(2 * each), "--name", "b", "--only-make"]) == 0
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
        branch_config(tmp_path, None, each, "", [])
    with pytest.raises(ConfigError, match=r"optim\.schedule = 'cosine'"):
        branch_config(run, None, each, "", ["optim.schedule=cosine"])
    with pytest.raises(ConfigError, match=r"holds its rate from .* choose a checkpoint between"):
        branch_config(run, 9 * each, each, "", ["optim.decay_fraction=0.5"])
    (finished(run, 12) / "config.yaml").write_text("name: trunk\n")  # the manifest knows another
    with pytest.raises(CheckpointError, match=r"instead of"):
        branch(run, replace(trunk, name="b"), 12)
    assert not (run.parent / "b").exists() and not list(run.parent.glob(".*b"))


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
    assert stable_tokens(WSD) == 800
