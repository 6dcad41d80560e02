"""Who a process is follows from its launcher's variables, whichever launcher it is; what contradicts is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm_lightning.cluster.world import World, configure_world, first_of, gpus_of_node, resolve_world
from dlcm_lightning.config import Config, ConfigError, DataConfig, SourceConfig, TrainConfig

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_PROCID": "0",
       "SLURM_JOB_NODELIST": "gpu[007,009]", "SLURM_NTASKS": "16"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "12", "RANK": "5", "LOCAL_RANK": "1",
            "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "a1", "MASTER_PORT": "4242"}
DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "1",
             "CROSS_SIZE": "2", "MASTER_ADDR": "a1", "MASTER_PORT": "29500"}
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PYTORCHJOB = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


def config(devices: int = 0, nodes: int = 0) -> Config:
    data = DataConfig(sources=[SourceConfig("a", "en", 1.0)])
    return Config(name="x", data=data, train=TrainConfig(devices=devices, nodes=nodes))


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, World()),
    (STEP, World("srun", 11, 16, 3, 8, 1, "gpu007", 15707)),
    ({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}, World("srun", 11, 16, 3, 8, 1, "10.0.0.1", 99)),
    (TORCHRUN, World("torchrun", 5, 12, 1, 4, 1, "a1", 4242)),
    ({**STEP, **TORCHRUN}, World("torchrun", 5, 12, 1, 4, 1, "a1", 4242)),  # one torchrun in a task of srun
    (DEEPSPEED, World("variables", 3, 4, 1, 2, 1, "a1", 29500)),
    (OPENMPI, World("mpirun", 3, 4, 1, 2, None, "a1", 29500)),
    ({**STEP, **OPENMPI}, World("mpirun", 3, 4, 1, 2, None, "a1", 29500)),  # its daemons are tasks of srun
    (HYDRA, World("mpirun", 1, 2, 1, 2, None, "127.0.0.1", 29500)),
    (PYTORCHJOB, World("variables", 2, 3, None, None, None, "job-master-0", 23456)),
    ({**PYTORCHJOB, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
     World("variables", 2, 3, 0, 1, None, "job-master-0", 23456)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, World("variables", 0, 1, 0, 1, None, "127.0.0.1", 29500)),
    # As scripts do in front of python, in a task of srun.
    ({**STEP, "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}, World("srun", 11, 16, 3, 8, 1, "gpu007", 15707)),
    ({**STEP, "WORLD_SIZE": "16"}, World("srun", 11, 16, 3, 8, 1, "gpu007", 15707)),
    ({**STEP, "PMI_RANK": "11", "PMI_SIZE": "16"}, World("srun", 11, 16, 3, 8, 1, "gpu007", 15707)),  # srun --mpi=pmi2
    # `deepspeed` in the shell of `srun --pty bash`.
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1",
      "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **DEEPSPEED}, World("variables", 3, 4, 1, 2, 1, "a1", 29500)),
    ({"WORLD_SIZE": "1"}, World()), ({"NODE_RANK": "0"}, World()), ({"RANK": ""}, World()), (JOB, World()),
    ({**STEP, "SLURM_STEP_ID": "4294967290"}, World()),  # the shell of salloc
])
def test_the_place_of_a_process_comes_from_its_launcher(environment: dict[str, str], expected: World) -> None:
    assert resolve_world(environment) == expected


@pytest.mark.parametrize(("environment", "said"), [
    ({"RANK": "1"}, "RANK = 1 without WORLD_SIZE"),
    ({"RANK": "0"}, "RANK = 0 without WORLD_SIZE"),
    ({"WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "WORLD_SIZE = 4 without RANK"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK = 1 without RANK and WORLD_SIZE"),
    ({"RANK": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}, "rank 4 of 4 processes does not exist"),
    ({"RANK": "1", "WORLD_SIZE": "4"}, "MASTER_ADDR is not set"),
    ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK = 'one': not a number"),
    ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK = '-1': not a number"),
    ({**PYTORCHJOB, "MASTER_PORT": "http"}, "MASTER_PORT = 'http'"),
    ({**PYTORCHJOB, "MASTER_PORT": "70000"}, "MASTER_PORT = '70000'"),
    ({**TORCHRUN, "GROUP_WORLD_SIZE": "2"}, "every node needs as many"),
    ({**DEEPSPEED, "CROSS_SIZE": "3"}, "every node needs as many"),
    ({**DEEPSPEED, "LOCAL_SIZE": "3", "CROSS_SIZE": ""}, "every node needs as many"),
    ({**DEEPSPEED, "LOCAL_RANK": "2"}, "local rank 2 of 2"),
    ({"TORCHELASTIC_RUN_ID": "x", "RANK": "0"}, "TORCHELASTIC_RUN_ID is set without"),
    ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is set without OMPI_COMM_WORLD_SIZE"),
    ({**OPENMPI, "RANK": "0", "WORLD_SIZE": "1"}, "RANK = 0, but mpirun says rank 3 of 4"),
    ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, "RANK = 0, but srun says rank 11 of 16"),
    ({**STEP, "LOCAL_RANK": "0"}, "LOCAL_RANK = 0, but srun says"),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8,7"}, "every node needs as many tasks"),
])
def test_half_a_set_of_variables_or_one_that_contradicts_is_refused(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve_world(environment)


NUMBER = st.sampled_from(["0", "1", "2", "3", "4", "", "x", "-1"])
ENVIRONMENTS = st.fixed_dictionaries({}, optional={
    **{name: NUMBER for name in (*TORCHRUN, *DEEPSPEED, *OPENMPI, *HYDRA, *STEP, "NODE_RANK")},
    "MASTER_ADDR": st.sampled_from(["a", "", "127.0.0.1"]), "MASTER_PORT": st.sampled_from(["1", "", "99999", "x"]),
    "SLURM_STEP_TASKS_PER_NODE": st.sampled_from(["1", "2(x2)", "1,2"]), "SLURM_STEP_NODELIST": st.just("n[1-2]")})


@settings(max_examples=600, deadline=None, derandomize=True)
@given(ENVIRONMENTS, st.integers(0, 3), st.integers(0, 3))
def test_any_environment_gives_one_consistent_place_or_is_refused(environment: dict[str, str], devices: int, nodes: int
                                                                  ) -> None:
    try:
        found, world = configure_world(config(devices, nodes), environment)
    except ConfigError as error:
        assert str(error)
        return
    assert 0 <= world.rank < world.size and world.address and 0 < world.port < 2**16
    assert found.train.ranks == world.size == found.train.nodes * found.train.devices
    if environment.get("RANK"):  # nobody who was started as one of several takes himself for another, or for alone
        started = resolve_world(environment)
        assert started.launcher in ("torchrun", "srun", "mpirun", "variables")
        # The only task of a step may start others, as it may without the variable that says that it is the only one.
        assert world.rank == started.rank
        assert world.size == started.size or (started.launcher, started.size) == ("srun", 1)
    if world.launcher in ("variables", "torchrun"):
        assert (world.rank, world.size) == (int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    if world.launcher == "nobody":
        assert world == World()


def counts(found: tuple[Config, World]) -> tuple[int, int, int]:
    return found[0].train.nodes, found[0].train.devices, found[0].train.ranks


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (1, 1, 1)), (STEP, (2, 8, 16)), (TORCHRUN, (3, 4, 12)), (PYTORCHJOB, (3, 1, 3)), (DEEPSPEED, (2, 2, 4)),
    ({**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}, (1, 1, 1)),
    ({**JOB, "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": ""}, (1, 1, 1)),
])
def test_numbers_come_from_the_launcher(environment: dict[str, str], expected: tuple[int, int, int]) -> None:
    assert counts(configure_world(config(), environment)) == expected


@pytest.mark.parametrize(("environment", "gpus"), [
    ({}, 0), ({"SLURM_GPUS_ON_NODE": "8"}, 8), ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "2"}, 2),
    ({"SLURM_GPUS_PER_NODE": "h100:4"}, 4), ({"SLURM_GPUS_PER_NODE": "h100:4,a100:2"}, 6),
    ({"SLURM_GPUS_PER_NODE": "h100"}, 1), ({"SLURM_GPUS_ON_NODE": ""}, 0),
])
def test_the_gpus_that_were_asked_for_count_before_those_that_are_there(environment: dict[str, str], gpus: int) -> None:
    assert gpus_of_node(environment) == gpus


def test_numbers_that_are_named_and_right_are_taken() -> None:
    assert counts(configure_world(config(8, 2), STEP)) == (2, 8, 16)
    assert counts(configure_world(config(2), JOB)) == (1, 2, 2)  # inside an allocation, on purpose
    assert counts(configure_world(config(4), {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8",
                                    "SLURM_PROCID": "0"})) == (2, 4, 8)


@pytest.mark.parametrize(("asked", "environment", "said"), [
    (config(4), STEP, "train.devices = 4: srun has started 2 x 8"),
    (config(8, 3), STEP, "train.nodes = 3: srun has started 2 x 8"),
    (config(3), TORCHRUN, "train.devices = 3: torchrun has started 3 x 4"),
    (config(8), {**PYTORCHJOB, "LOCAL_WORLD_SIZE": "1"}, "train.devices = 8: variables has started 3 x 1"),
    (config(), {**STEP, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"},
     "this node has 8 GPUs"),
    (config(), JOB, "was not started by srun"),
    (config(8, 2), {}, "train.nodes = 2: this process was started alone"),
    (config(2, 2), {"NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK = 2: the run has 2 nodes"),
    (config(), {"NODE_RANK": "1"}, "NODE_RANK = 1: the run has 1 nodes"),
    (config(2, 2), {"NODE_RANK": "1"}, "MASTER_ADDR is not set"),
    (config(), {**JOB, "SLURM_GPUS_ON_NODE": "many"}, "SLURM_GPUS_ON_NODE = 'many'"),
])
def test_what_does_not_agree_is_refused_with_the_remedy(asked: Config, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configure_world(asked, environment)


def test_a_process_that_nobody_started_starts_the_others_of_its_node() -> None:
    _, world = configure_world(config(4), {})
    assert (world.launcher, world.rank, world.size, world.local_size) == ("dlcm", 0, 4, 4)
    for local_rank in range(1, 4):
        other = resolve_world(world.variables(local_rank))
        assert (other.rank, other.size, other.local_rank, other.local_size) == (local_rank, 4, local_rank, 4)
        assert (other.address, other.port) == (world.address, world.port)
    _, second = configure_world(config(2, 3), {"NODE_RANK": "1", "MASTER_ADDR": "a1"})
    assert (second.rank, second.size, second.address) == (2, 6, "a1")
    assert resolve_world(second.variables(1)).rank == 3


@pytest.mark.parametrize(("listed", "first"), [
    ("n1", "n1"), ("n[1-16]", "n1"), ("gpu[003-010,12],cpu1", "gpu003"), ("a,b[1-2]", "a"),
    ("r[1-2]n[03-04]x", "r1n03x"),
])
def test_the_first_node_of_a_list_is_rank_zero_s(listed: str, first: str) -> None:
    assert first_of(listed) == first


def test_numbers_never_reach_beyond_what_arithmetic_bears() -> None:
    huge: dict[str, Any] = {"RANK": "0", "WORLD_SIZE": "9" * 30, "MASTER_ADDR": "a"}
    with pytest.raises(ConfigError, match="not a number that a launcher would set"):
        resolve_world(huge)
