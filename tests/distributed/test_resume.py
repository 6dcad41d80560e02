"""Runs of several processes, stopped and continued: on as many ranks bit for bit, on others and under other strategies
the same samples and the same losses.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.cluster.local import LocalRanks
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import BoundaryConfig, Config, DataConfig, OptimConfig, TrainConfig
from dlcm_lightning.errors import STOPPED, RunError
from dlcm_lightning.export.portable import export, load_state
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.verify_resume import (
    BYTES_A_SECOND,
    Attempt,
    Verdict,
    compare,
    lines_of,
    verify_resume,
)
from tests.conftest import MODEL
from tests.distributed.conftest import ROOT, STRATEGIES

ROUNDED = 2e-4
"""Relative, of losses in fp32 over a run whose sums are taken in other orders."""
SECONDS = 180.0


def long_config(data: DataConfig, runs: Path, name: str, steps: int = 40, **train: Any) -> Config:
    """F of the previous step, so that a step may be split in any way. 7 rows: padding rows on 2, 3 and 4 ranks."""
    data = replace(data, global_batch_size=7, micro_batch_size=2)
    tokens = steps * data.tokens_per_step
    return Config(
        name=name, seed=3, model=replace(MODEL, boundary=BoundaryConfig(form="both", previous_rate=True)), data=data,
        optim=OptimConfig(total_tokens=tokens, warmup_tokens=tokens // 4),
        train=TrainConfig(output_dir=str(runs), precision="fp32", log_every_steps=1, checkpoint_every_steps=3,
                          validate_every_steps=10**6, **train))


@dataclass(frozen=True)
class Part:
    """One attempt."""

    strategy: str
    ranks: int
    mutant: str = ""


def live(config: Config, part: Part, stop: bool) -> None:
    """One attempt of a run; stopped by SIGTERM to one rank after its first step, or to the end."""
    config = replace(config, train=replace(config.train, strategy=part.strategy, devices=part.ranks))
    run = Path(config.train.output_dir) / config.name
    file = run.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_config(config, file)
    module = "tests.distributed.mutant_command" if part.mutant else "dlcm_lightning"
    reached = last_step(run)
    with LocalRanks([sys.executable, "-m", module, "pretrain", str(file)], part.ranks, run.with_suffix(".logs"),
                    variables={"PYTHONPATH": str(ROOT), "MUTANT": part.mutant}) as ranks:
        if stop:
            deadline = time.monotonic() + SECONDS
            while ranks.running and last_step(run) <= reached and time.monotonic() < deadline:
                time.sleep(0.005)
            ranks.send(signal.SIGTERM, part.ranks - 1)
        codes = ranks.wait(SECONDS)
        assert codes == [STOPPED if stop else 0] * part.ranks, ranks.tail()


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def end(run: Path) -> Checkpoint:
    folder = folders(run)[-1]
    found = Checkpoint(folder, Manifest.load(folder))
    assert not found.manifest.damages(folder)
    return found


@pytest.fixture(scope="module")
def straight(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, left alone."""
    runs = tmp_path_factory.mktemp("straight")
    live(long_config(config, runs, "straight"), Part("ddp", 1), stop=False)
    return runs / "straight"


def assert_same_course(run: Path, straight: Path) -> None:
    """The samples and their noise exactly; losses and weights but for rounding."""
    mine, theirs = lines_of(run), lines_of(straight)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for line, expected in zip(mine, theirs, strict=True):
        assert (line["samples"], line["noise"]) == (expected["samples"], expected["noise"]), line["step"]
        assert line["loss"] == pytest.approx(expected["loss"], rel=ROUNDED)
    with end(run).tensors() as tensors, end(straight).tensors() as expected_tensors:
        assert tensors.names() == expected_tensors.names()
        for name in tensors.names("weight/"):
            one, other = tensors.get(f"weight/{name}"), expected_tensors.get(f"weight/{name}")
            assert (one - other).norm() <= 2e-2 * other.norm(), name


def chain(strategies: tuple[str, ...]) -> list[Part]:
    """Every ordered pair of strategies once, on 1, 2, 3, 4, 1, ... ranks: a round through the complete graph."""
    left = {one: [other for other in strategies if other != one] for one in strategies}
    stack, walk = [strategies[0]], []
    while stack:
        if left[stack[-1]]:
            stack.append(left[stack[-1]].pop())
        else:
            walk.append(stack.pop())
    return [Part(strategy, 1 + number % 4) for number, strategy in enumerate(walk)]


def test_the_chain_holds_every_pair() -> None:
    walk = [part.strategy for part in chain(STRATEGIES)]
    assert len(set(itertools.pairwise(walk))) == 20 == len(walk) - 1


def run_chain(config: DataConfig, runs: Path, parts: list[Part]) -> Path:
    configured = long_config(config, runs, "chain")
    for part in parts[:-1]:
        live(configured, part, stop=True)
    live(configured, parts[-1], stop=False)
    return runs / "chain"


SHORT = [Part("ddp", 1), Part("fsdp2", 3), Part("zero2", 2), Part("zero3", 4), Part("ddp", 2)]


def test_a_run_goes_on_under_other_strategies_and_on_other_ranks(config: DataConfig, tmp_path: Path, straight: Path
                                                                 ) -> None:
    run = run_chain(config, tmp_path, SHORT)
    assert_same_course(run, straight)
    assert {Manifest.load(folder).strategy for folder in folders(run)} <= set(STRATEGIES)


@pytest.mark.whole
def test_from_every_strategy_to_every_other(config: DataConfig, tmp_path: Path, straight: Path) -> None:
    assert_same_course(run_chain(config, tmp_path, chain(STRATEGIES)), straight)


@pytest.mark.whole
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_on_1_2_3_and_4_ranks(config: DataConfig, tmp_path: Path, straight: Path, strategy: str) -> None:
    assert_same_course(run_chain(config, tmp_path, [Part(strategy, ranks) for ranks in (2, 1, 3, 4, 2)]), straight)


def test_what_many_ranks_wrote_is_exported_as_it_is(config: DataConfig, tmp_path: Path) -> None:
    live(long_config(config, tmp_path, "run", steps=3), Part("zero1", 3), stop=False)
    run = tmp_path / "run"
    files = end(run).manifest.files
    assert sum(name.endswith(".safetensors") for name in files) == 3
    state = load_state(export(run, tmp_path / "out"))
    with end(run).tensors() as stored:
        assert all(torch.equal(state[name], stored.get(f"weight/{name}")) for name in stored.names("weight/"))


@pytest.mark.parametrize(("strategy", "how"), [
    pytest.param(strategy, how, marks=() if (strategy, *how) == ("ddp",) else pytest.mark.whole,
                 id="-".join([strategy, *how]))
    for strategy in STRATEGIES for how in ((), ("compiled", "bf16"))])
def test_kills_and_signals_change_nothing(config: DataConfig, tmp_path: Path, strategy: str, how: tuple[str, ...]
                                          ) -> None:
    """Each kind of disturbance of `dlcm verify-resume`, two micro-batches a step. Three processes: the sum of two
    numbers is the same in any order, that of three is not."""
    base = long_config(config, tmp_path, "base", strategy=strategy, devices=3, compile="compiled" in how)
    if "bf16" in how:
        base = replace(base, train=replace(base.train, precision="bf16"))
    kills = 3 if how else 6  # every life compiles
    verdict = verify_resume(base, tmp_path / "proof", kills=kills, seed=1, log=lambda _: None)
    assert verdict.good, verdict.table()
    assert verdict.attempts == kills + 1 and verdict.micro_batches == 2
    assert sum(verdict.disturbances.values()) >= kills - 2, verdict.table()
    assert verdict.compared["weight"] > 20 and verdict.compared["steps logged"] == verdict.steps
    assert verdict.compared["learning rates"] > verdict.compared["gradient norms"] == verdict.steps
    found = json.loads((tmp_path / "proof" / "verify-resume.json").read_text())
    assert found["good"] and found["compared"] == verdict.compared


@pytest.fixture(scope="module")
def two(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks under DDP, left alone."""
    runs = tmp_path_factory.mktemp("two")
    live(long_config(config, runs, "two", steps=12), Part("ddp", 2), stop=False)
    return runs / "two"


def test_a_run_that_leaves_the_number_of_processes_open_is_proved_on_one(config: DataConfig, tmp_path: Path) -> None:
    base = long_config(config, tmp_path, "base")
    assert base.train.devices == base.train.nodes == 0
    verdict = verify_resume(base, tmp_path / "proof", kills=1, seed=1, log=lambda _: None)
    assert verdict.good and verdict.ranks == 1 and verdict.attempts == 2, verdict.table()


def test_deadlines_and_room_follow_the_size_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """28 GB a checkpoint are not written and hashed in the time that a small one takes, nor have they room anywhere."""
    small, large = (load_config(f"configs/run/{name}.yaml", ["train.compile=false"]) for name in ("smoke", "proof_2b"))
    once = 2 * 28e9 / BYTES_A_SECOND  # written and read
    assert Attempt(large, tmp_path).start_seconds > Attempt(small, tmp_path).start_seconds + 0.99 * once
    compiled = replace(large, train=replace(large.train, compile=True))
    assert Attempt(compiled, tmp_path).start_seconds > Attempt(large, tmp_path).start_seconds
    often, rarely = (Attempt(replace(large, train=replace(large.train, checkpoint_every_steps=every)), tmp_path)
                     for every in (4, 24))
    assert often.seconds - rarely.seconds > 0.99 * (50 // 4 - 50 // 24) * once
    monkeypatch.setattr(shutil, "disk_usage", lambda where: shutil._ntuple_diskusage(10**12, 0, 168 * 10**9))
    monkeypatch.setattr(Attempt, "finish", lambda self: pytest.fail("it has begun"))
    with pytest.raises(RunError, match=r"GB for"):
        verify_resume(large, tmp_path / "proof", kills=2, seed=1, log=lambda _: None)


def differing(run: Path, straight: Path) -> set[str]:
    verdict = Verdict("ddp", 2, 12, 2)
    compare(straight, run, verdict)
    return {what for what, names in verdict.differing.items() if names}


@pytest.mark.parametrize(("mutant", "noticed"), [
    ("", set()),
    ("cursor_of_one_rank", {"samples of a step", "noise of a step", "losses", "weight"}),
    ("a_dropped_shard", {"exp_avg_sq", "weight"}),
    ("a_forgotten_count", {"weight"}),
])
def test_bugs_planted_in_resuming_are_noticed(config: DataConfig, tmp_path: Path, two: Path, mutant: str,
                                              noticed: set[str]) -> None:
    configured = long_config(config, tmp_path, "planted", steps=12)
    live(configured, Part("ddp", 2, mutant), stop=True)
    live(configured, Part("ddp", 2, mutant), stop=False)
    found = differing(tmp_path / "planted", two)
    assert noticed <= found if mutant else not found, found


def test_a_file_that_one_rank_cannot_find_is_named_and_the_checkpoint_before_is_taken_by_all(
    config: DataConfig, tmp_path: Path, two: Path
) -> None:
    run = tmp_path / "two"
    shutil.copytree(two, run)
    newest = folders(run)[-1]
    (newest / "state-00001-of-00002.safetensors").unlink()
    (run / "report.json").unlink()
    live(replace(long_config(config, tmp_path, "two", steps=12)), Part("ddp", 2), stop=False)
    assert "state-00001-of-00002.safetensors is missing" in (tmp_path / "two.logs" / "rank-0.log").read_text()
    assert not differing(run, two)
