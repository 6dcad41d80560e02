"""Which process of a run this is and how many there are: the one place that reads what launchers say.

    torchrun     RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE, with TORCHELASTIC_RUN_ID
    mpirun       OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}; PMI_{RANK,SIZE}, MPI_{LOCALRANKID,LOCALNRANKS}
    srun         SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE
    variables    RANK and WORLD_SIZE, as Kubernetes' PyTorchJob, `deepspeed` and scripts set them; LOCAL_RANK and
                 LOCAL_WORLD_SIZE (or LOCAL_SIZE) where a node has several processes
    nobody       the process is alone, or starts the others of its node itself (launch.py)

One launcher may run inside another, as torchrun does in a task of srun; then the inner one is right. What stands
further up in the table is inside of what stands below. Plain variables inside a step of SLURM have to agree with it,
unless its one task a node has started the processes that they speak of. A set that is not whole, such as a RANK left
over in a shell, is refused: such a process would train alone, or wait for peers that nobody has started.

What no process can see alone, two with one rank or nodes of unequal size, is compared when all have met
(training/rendezvous.py).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dlcm_lightning.config import Config, ConfigError, TrainConfig

INTERACTIVE_STEP = "4294967290"
"""The step that the shell of salloc is on some sites."""
MOST_RANKS = 2**20
DEFAULT_PORT = 29500
FIRST_PORT, PORTS, PORTS_OF_A_STEP = 15_000, 10_000, 3
"""Where the ranks of a step of SLURM meet when nobody names a port: it follows from the numbers of job and step."""
UNSET = "unset it, or start every process with srun, torchrun or mpirun"

Launcher = Literal["nobody", "torchrun", "mpirun", "srun", "variables", "dlcm"]


@dataclass(frozen=True)
class World:
    """The place of this process among those of a run."""

    launcher: Launcher = "nobody"
    """Who started it; `dlcm` for those that the first process of a node has started."""
    rank: int = 0
    size: int = 1
    local_rank: int | None = 0
    """Among the processes of this node; None where nobody says."""
    local_size: int | None = 1
    """Processes of each node; None where nobody says."""
    node: int | None = 0
    """The number of this node; None where nobody says."""
    address: str = "127.0.0.1"
    """Of rank 0, where all meet."""
    port: int = DEFAULT_PORT

    def __post_init__(self) -> None:
        self._within("rank", self.rank, self.size)
        if self.local_size is not None:
            if self.local_size < 1 or self.size % self.local_size:
                raise ConfigError(f"{self.launcher}: {self.size} processes with {self.local_size} on this node: every "
                                  "node needs as many as the others")
            if self.local_rank is not None:
                self._within("local rank", self.local_rank, self.local_size)

    def _within(self, what: str, number: int, size: int) -> None:
        if not 0 <= number < size <= MOST_RANKS:
            raise ConfigError(f"{self.launcher}: {what} {number} of {size} processes does not exist; {UNSET}")

    @property
    def nodes(self) -> int:
        """Where nobody says, every process counts as a node of its own until all have met."""
        return self.size // (self.local_size or 1)

    @property
    def here(self) -> str:
        """For messages."""
        return f"rank {self.rank} of {self.size}"

    def variables(self, local_rank: int) -> dict[str, str]:
        """The environment of a process of this node, in torchrun's words, for whoever starts it."""
        assert self.local_size is not None and self.local_rank is not None
        rank, node = self.rank - self.local_rank + local_rank, str(self.node)
        return {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port), "RANK": str(rank),
                "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": str(self.local_size),
                "GROUP_RANK": node, "GROUP_WORLD_SIZE": str(self.nodes), "NODE_RANK": node}


def resolve_world(environment: Mapping[str, str] = os.environ) -> World:
    """Of a process that a launcher has started; `nobody` where none has. ConfigError: contradictions, or half a set of
    variables."""
    inner = _torchrun(environment) or _mpirun(environment)
    given = _variables(environment)
    step = _step(environment)
    if inner is None and step is not None:
        if not (against := _contradictions(given, step)):
            inner = step
        elif not _started_inside(given, step):
            raise ConfigError(f"{against[0]}, but srun says {step.here} ({step.local_rank} of {step.local_size} on its "
                              f"node): {UNSET}")
    if inner is not None:
        if against := _contradictions(given, inner):
            raise ConfigError(f"{against[0]}, but {inner.launcher} says {inner.here}: {UNSET}")
    elif (inner := _by_variables(given)) is None:
        return World()
    return replace(inner, address=_address(environment, inner), port=_port(environment, inner))


def configure_world(config: Config, environment: Mapping[str, str] = os.environ) -> tuple[Config, World]:
    """The configuration with the numbers of nodes and devices that there are, and where this process stands among them.
    ConfigError: they are not those that were asked for."""
    world = world_of(config.train, environment)
    train = replace(config.train, devices=world.local_size or 1, nodes=world.nodes)
    return replace(config, train=train), world


def world_of(train: TrainConfig, environment: Mapping[str, str] = os.environ) -> World:
    """Where this process stands. ConfigError: the processes that there are are not those that `train` asks for."""
    world = resolve_world(environment)
    if world.launcher == "nobody" or (world.launcher == "srun" and world.size == 1 and train.devices > 1):
        return _own_world(train, environment)
    _check_started(train, world, environment)
    return world


# What each launcher says


def _torchrun(environment: Mapping[str, str]) -> World | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    rank, size, local_rank, local_size, node, nodes = (
        _whole(environment, name) for name in
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"))
    if rank is None or size is None or local_rank is None or local_size is None:
        raise ConfigError(f"TORCHELASTIC_RUN_ID is set without RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; {UNSET}")
    if nodes is not None and nodes * local_size != size:
        raise ConfigError(f"torchrun: {size} processes on {nodes} nodes, {local_size} of them on this one: every node "
                          "needs as many as the others; give torchrun the same --nproc-per-node everywhere")
    return World("torchrun", rank, size, local_rank, local_size, node)


def _mpirun(environment: Mapping[str, str]) -> World | None:
    for names in (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                   "OMPI_COMM_WORLD_LOCAL_SIZE"), ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")):
        rank, size, local_rank, local_size = (_whole(environment, name) for name in names)
        if rank is None and size is None:
            continue
        if rank is None or size is None:
            raise ConfigError(f"{names[0] if size is None else names[1]} is set without "
                              f"{names[1] if size is None else names[0]}; {UNSET}")
        if names[0] == "PMI_RANK" and local_rank is None and _is_step(environment):
            continue  # srun --mpi=pmi2, which says more in its own words
        return World("mpirun", rank, size, local_rank, local_size, None)
    return None


def _is_step(environment: Mapping[str, str]) -> bool:
    return environment.get("SLURM_STEP_ID", INTERACTIVE_STEP) != INTERACTIVE_STEP


def _step(environment: Mapping[str, str]) -> World | None:
    """Of a task of srun."""
    if not _is_step(environment):
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counted = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
    if counted is None:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {tasks!r}: every node needs as many tasks as the others; "
                          "give srun --ntasks-per-node")
    nodes = _whole(environment, "SLURM_STEP_NUM_NODES") or 1
    size = _whole(environment, "SLURM_STEP_NUM_TASKS") or nodes * int(counted[1])
    return World("srun", _whole(environment, "SLURM_PROCID") or 0, size, _whole(environment, "SLURM_LOCALID") or 0,
                 int(counted[1]), _whole(environment, "SLURM_NODEID"))


@dataclass(frozen=True)
class _Given:
    """Plain variables, as far as they are set."""

    rank: int | None
    size: int | None
    local_rank: int | None
    local_size: int | None
    node: int | None = None


NAMES = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}


def _variables(environment: Mapping[str, str]) -> _Given:
    rank, size, local_rank = (_whole(environment, NAMES[name]) for name in ("rank", "size", "local_rank"))
    local_size, node, nodes = (
        next((found for name in names if (found := _whole(environment, name)) is not None), None)
        for names in (("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), ("GROUP_RANK", "CROSS_RANK", "NODE_RANK"),
                      ("GROUP_WORLD_SIZE", "CROSS_SIZE")))
    if None not in (size, local_size, nodes) and size != (local_size or 0) * (nodes or 0):
        raise ConfigError(f"WORLD_SIZE = {size} on {nodes} nodes, {local_size} of them on this one: every node needs "
                          "as many processes as the others")
    return _Given(rank, size, local_rank, local_size, node)


def _contradictions(given: _Given, world: World) -> list[str]:
    """Variables that say something else than a world."""
    return [f"{NAMES[name]} = {value}" for name in NAMES
            if (value := getattr(given, name)) is not None
            and getattr(world, name) is not None and value != getattr(world, name)]


def _started_inside(given: _Given, step: World) -> bool:
    """Whether a step's one task of a node may have started what the variables speak of."""
    return (step.local_size == 1 and None not in (given.rank, given.size, given.local_rank)
            and (given.size or 0) > step.size)


def _by_variables(given: _Given) -> World | None:
    if given.rank is not None and given.size is not None:
        local_rank, local_size = given.local_rank, given.local_size
        if local_rank is None and local_size in (None, 1):
            local_rank, local_size = (0, 1) if given.size == 1 or local_size == 1 else (None, None)
        return World("variables", given.rank, given.size, local_rank, local_size, given.node)
    if (given.rank, given.size, given.local_rank) == (None, 1, None) and (given.local_size or 1) == 1:
        return None  # WORLD_SIZE=1 means: alone
    found = {NAMES[name]: value for name in NAMES if (value := getattr(given, name)) is not None}
    if not found:
        return None
    missing = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name not in found)
    said = ", ".join(f"{name} = {value}" for name, value in found.items())
    raise ConfigError(f"{said} without {missing}: half of what a launcher sets; {UNSET}")


# Alone, or the first of a node


def _own_world(train: TrainConfig, environment: Mapping[str, str]) -> World:
    """Of a process that nobody started as one of several: it is alone, or starts the others of its node."""
    node = _whole(environment, "NODE_RANK") or 0
    nodes, devices = max(1, train.nodes), max(1, train.devices)
    if nodes > 1 and "NODE_RANK" not in environment:
        raise ConfigError(f"train.nodes = {train.nodes}: this process was started alone; on a cluster: sbatch "
                          "slurm/dlcm_1t.sh RUN_FILE, or srun, or torchrun on every node")
    if node >= nodes:
        raise ConfigError(f"NODE_RANK = {node}: the run has {nodes} nodes; unset it, or name train.nodes")
    if "SLURM_JOB_NUM_NODES" in environment and not _is_step(environment) and not train.devices:
        _check_allocation(environment)
    if nodes * devices == 1:
        return World()
    world = World("dlcm", node * devices, nodes * devices, 0, devices, node)
    if nodes == 1:
        return replace(world, port=_port(environment, world) if "MASTER_PORT" in environment else free_port())
    return replace(world, address=_address(environment, world), port=_port(environment, world))


def _check_allocation(environment: Mapping[str, str]) -> None:
    nodes, devices = allocated(environment)
    if nodes * devices > 1:
        raise ConfigError(
            f"job {environment.get('SLURM_JOB_ID')}: it has {nodes} nodes for {devices} processes each, but this one "
            "was not started by srun and would wait for the others; call make pretrain, or dlcm job, or put "
            f"`srun --ntasks-per-node={devices}` in front. To use one process all the same: train.devices=1")


def _check_started(train: TrainConfig, world: World, environment: Mapping[str, str]) -> None:
    devices = world.local_size or 1
    for name, asked, there in (("devices", train.devices, world.local_size), ("nodes", train.nodes, world.nodes)):
        if asked and there is not None and asked != there and not (name == "nodes" and world.local_size is None):
            raise ConfigError(f"train.{name} = {asked}: {world.launcher} has started {world.nodes} x {devices} "
                              f"processes; leave train.{name} at 0, or start as many as it says")
    gpus = gpus_of_node(environment)
    if world.launcher == "srun" and gpus not in (0, devices) and not train.devices:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {devices}: this node has {gpus} GPUs, and one process "
                          f"goes with one GPU; give srun --ntasks-per-node={gpus}, or name train.devices="
                          f"{devices} to leave the others unused")


# Numbers, addresses


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    """A number that a launcher sets; None where it is not set, or empty. ConfigError: something else."""
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) > MOST_RANKS:
        raise ConfigError(f"{name} = {text!r}: not a number that a launcher would set; {UNSET}")
    return int(text)


def _address(environment: Mapping[str, str], world: World) -> str:
    """Of rank 0."""
    if named := environment.get("MASTER_ADDR", "").strip():
        return named
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if world.launcher == "srun" and listed:
        return first_of(listed)
    if world.local_size == world.size:
        return "127.0.0.1"
    raise ConfigError(f"MASTER_ADDR is not set: {world.here} does not know where to meet the others; set it on every "
                      "node to the name of the first one (mpirun -x MASTER_ADDR=...)")


def _port(environment: Mapping[str, str], world: World) -> int:
    if named := environment.get("MASTER_PORT", "").strip():
        if not named.isdecimal() or not 0 < int(named) < 2**16:
            raise ConfigError(f"MASTER_PORT = {named!r}: give a port from 1 to 65535, the same on every node")
        return int(named)
    if world.launcher == "srun":
        step = environment.get("SLURM_STEP_ID", "0")
        return step_port(environment.get("SLURM_JOB_ID", "0"), int(step) if step.isdecimal() else 0)
    return DEFAULT_PORT


def step_port(job: str, number: int) -> int:
    """The first of the ports of step (or attempt) `number` of a job."""
    return (int(job) * 101 + PORTS_OF_A_STEP * number) % PORTS + FIRST_PORT if job.isdecimal() else FIRST_PORT


def free_port() -> int:
    """A port of the loopback interface that nobody listens at just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def first_of(nodes: str) -> str:
    """The first name of a list of nodes as SLURM writes it: gpu[003-010,12],cpu1 begins with gpu003."""
    depth, first = 0, nodes
    for place, sign in enumerate(nodes):
        depth += (sign == "[") - (sign == "]")
        if sign == "," and not depth:
            first = nodes[:place]
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


# What SLURM has given


def gpus_of_node(environment: Mapping[str, str] = os.environ) -> int:
    """That this job has asked for on each node, or else was given on this one (more, where it has the node for itself);
    0 where there are none, or outside of SLURM."""
    asked = environment.get("SLURM_GPUS_PER_NODE")  # 8, or h100:8, or h100:4,a100:4, or h100 for one
    if not asked:
        return _whole(environment, "SLURM_GPUS_ON_NODE") or 0
    counts = [part.rpartition(":")[2] for part in asked.split(",")]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """As SLURM calls this node, which its host name need not be."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def allocated(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Nodes of this allocation, and processes it is meant to run on each: one per GPU."""
    return _whole(environment, "SLURM_JOB_NUM_NODES") or 1, max(1, gpus_of_node(environment))
