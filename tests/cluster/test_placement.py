"""How many processes there are is read from who started them; what was asked for must agree."""

from __future__ import annotations

import pytest

from dlcm_lightning.cluster.placement import Launched, gpus_of_node, launched, placed
from dlcm_lightning.config import Config, ConfigError, DataConfig, SourceConfig, TrainConfig

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_PROCID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "RANK": "5"}


def config(devices: int = 0, nodes: int = 0) -> Config:
    data = DataConfig(sources=[SourceConfig("a", "en", 1.0)])
    return Config(name="x", data=data, train=TrainConfig(devices=devices, nodes=nodes))


def counts(found: Config) -> tuple[int, int, int]:
    return found.train.nodes, found.train.devices, found.train.ranks


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (1, 1, 1)), (STEP, (2, 8, 16)), (TORCHRUN, (3, 4, 12)), ({**STEP, **TORCHRUN}, (3, 4, 12)),
    ({**STEP, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "8"}, (1, 8, 8)),
    ({**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}, (1, 1, 1)),
])
def test_numbers_come_from_the_launcher(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert counts(placed(config(), environment)) == expected


@pytest.mark.parametrize(("environment", "gpus"), [
    ({}, 0), ({"SLURM_GPUS_ON_NODE": "8"}, 8), ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "2"}, 2),
    ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4), ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, 6),
    ({"SLURM_GPUS_PER_NODE": "h100"}, 1),
])
def test_the_gpus_that_were_asked_for_count_before_those_that_are_there(environment: dict[str, str], gpus: int) -> None:
    assert gpus_of_node(environment) == gpus


def test_numbers_that_are_named_and_right_are_taken() -> None:
    assert counts(placed(config(8, 2), STEP)) == (2, 8, 16)
    assert counts(placed(config(2), {})) == (1, 2, 2)
    assert counts(placed(config(2), JOB)) == (1, 2, 2)  # inside an allocation, on purpose
    assert counts(placed(config(4), {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"})) == (2, 4, 8)


@pytest.mark.parametrize(("asked", "environment", "said"), [
    (config(4), STEP, "train.devices = 4: srun has started 2 x 8"),
    (config(8, 3), STEP, "train.nodes = 3: srun has started 2 x 8"),
    (config(3), TORCHRUN, "train.devices = 3: torchrun has started 3 x 4"),
    (config(), {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "this node has 8 GPUs"),
    (config(), {**STEP, "SLURM_STEP_TASKS_PER_NODE": "8,7"}, "every node needs as many tasks"),
    (config(), JOB, "was not started by srun"),
    (config(8, 2), {}, "train.nodes = 2: this process was started alone"),
])
def test_what_does_not_agree_is_refused_with_the_remedy(asked: Config, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placed(asked, environment)


def test_a_process_that_was_started_alone_has_no_launcher() -> None:
    assert launched(JOB) is None
    assert launched({**STEP, "SLURM_STEP_ID": "4294967290"}) is None  # the shell of salloc
    assert launched(TORCHRUN) == Launched("torchrun", 3, 4)
