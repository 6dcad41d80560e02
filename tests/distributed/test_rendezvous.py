"""Processes of a run find each other under every launcher, are compared, and are refused together where they differ."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.cluster.world import free_port
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.rendezvous import Card, _local_places, _objection
from dlcm_lightning.training.verify_resume import lines_of
from tests.distributed.conftest import ROOT
from tests.distributed.test_resume import long_config

SECONDS = 120.0


def card(rank: int, **changes: Any) -> Card:
    return replace(Card(rank, 4, f"n{rank // 2}", rank % 2, 2, rank // 2, "dlcm 1, torch 2", {"seed": 1}), **changes)


@pytest.mark.parametrize(("changed", "said"), [
    ({}, ""),
    ({"config": {"seed": 2}}, "rank 3 on n1 was given another configuration than rank 0 on n0: seed"),
    ({"versions": "dlcm 1, torch 3"}, "rank 3 on n1 runs dlcm 1, torch 3"),
    ({"size": 5}, "rank 3 on n1 says that there are 5 processes"),
    ({"host": "n2"}, "says that its node has 2 processes, 1 have come"),
    ({"local_rank": 0}, "ranks 2 and 3 on n1 both say LOCAL_RANK = 0"),
    ({"host": "n2", "local_size": 1}, "rank 2 on n1 says that its node has 2 processes, 1 have come"),
])
def test_processes_that_do_not_belong_together_are_told_so(changed: dict[str, Any], said: str) -> None:
    cards = [card(rank, **(changed if rank == 3 else {})) for rank in range(4)]
    assert (said in _objection(cards)) if said else _objection(cards) == ""


def test_where_nobody_says_a_process_s_place_on_its_node_follows_from_the_hosts() -> None:
    cards = [card(rank, local_rank=None, local_size=None, node=None, host=f"h{rank % 2}") for rank in range(4)]
    assert _objection(cards) == ""
    assert _local_places(cards) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    uneven = [replace(one, host="h0") if one.rank < 3 else one for one in cards]
    assert "3 on h0, 1 on h1" in _objection(uneven)


@pytest.fixture
def config(config: DataConfig, tmp_path: Path) -> Config:
    found = long_config(config, tmp_path, "run", steps=4, devices=0)
    save_config(found, tmp_path / "run.yaml")
    return found


def start(folder: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "DLCM_ATTEMPT"))}
    return subprocess.Popen(
        [sys.executable, "-m", "dlcm_lightning", "pretrain", str(folder / "run.yaml"), *overrides], text=True,
        env={**outside, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, said


def test_one_command_starts_the_ranks_of_a_machine_and_they_are_one_run(config: Config, tmp_path: Path) -> None:
    code, said = ended(start(tmp_path, "train.devices=2"))
    assert code == 0, said
    run = Path(config.train.output_dir) / "run"
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4]  # each once
    assert len(list(folders(run)[-1].glob("state-*-of-00002.safetensors"))) == 2
    code, said = ended(start(tmp_path, "train.devices=2"))
    assert code == 0, said


def test_rank_and_world_size_alone_make_one_run_and_what_differs_between_ranks_ends_all(config: Config, tmp_path: Path
                                                                                       ) -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [start(tmp_path, RANK=str(rank), **place) for rank in range(2)]
    for process in both:
        code, said = ended(process)
        assert code == 0, said
    run = Path(config.train.output_dir) / "run"
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4]
    assert len(list(folders(run)[-1].glob("state-*-of-00002.safetensors"))) == 2

    place["MASTER_PORT"] = str(free_port())
    both = [start(tmp_path, f"seed={rank}", RANK=str(rank), **place) for rank in range(2)]
    for process in both:
        code, said = ended(process)
        assert code == 2 and "was given another configuration than rank 0" in said and "seed" in said


def test_a_rank_left_over_in_a_shell_is_refused_with_words(config: Config, tmp_path: Path) -> None:
    code, said = ended(start(tmp_path, RANK="1"))
    assert code == 2 and "RANK = 1 without WORLD_SIZE" in said

