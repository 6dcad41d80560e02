"""How many processes share a run, read from who started them, so that nobody writes it down twice.

srun and torchrun tell every process how many there are; what the configuration says (`train.devices`, `train.nodes`)
must then agree, and may be left at 0. Nobody tells a process that it was meant to be one of many: inside a SLURM
allocation for several, one that was not started by srun would wait for the others, so it is refused.
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


@dataclass(frozen=True)
class Launched:
    """What a launcher says."""

    by: Literal["srun", "torchrun"]
    nodes: int
    devices: int
    """Processes on every node."""


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """None for a process that was started alone. ConfigError: nodes have different numbers of tasks."""
    if "LOCAL_WORLD_SIZE" in environment:
        devices = int(environment["LOCAL_WORLD_SIZE"])
        return Launched("torchrun", int(environment["WORLD_SIZE"]) // devices, devices)
    if environment.get("SLURM_STEP_ID", INTERACTIVE_STEP) != INTERACTIVE_STEP:
        tasks = environment["SLURM_STEP_TASKS_PER_NODE"]
        counted = re.fullmatch(r"(\d+)(\(x\d+\))?", tasks)
        if counted is None:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {tasks!r}: every node needs as many tasks as the others; "
                              "give srun --ntasks-per-node")
        return Launched("srun", int(environment["SLURM_STEP_NUM_NODES"]), int(counted[1]))
    return None


def gpus_of_node(environment: Mapping[str, str] = os.environ) -> int:
    """That this job has asked for on each node, or else was given on this one (more, where it has the node for itself);
    0 where there are none, or outside of SLURM."""
    asked = environment.get("SLURM_GPUS_PER_NODE")  # 8, or h100:8, or h100:4,a100:4, or h100 for one
    if not asked:
        return int(environment.get("SLURM_GPUS_ON_NODE", "0"))
    counts = [part.rpartition(":")[2] for part in asked.split(",")]
    return sum(int(count) if count.isdecimal() else 1 for count in counts)


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """As SLURM calls this node, which its host name need not be."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def allocated(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Nodes of this allocation, and processes it is meant to run on each: one per GPU."""
    return int(environment["SLURM_JOB_NUM_NODES"]), max(1, gpus_of_node(environment))


def placed(config: Config, environment: Mapping[str, str] = os.environ) -> Config:
    """With the numbers of nodes and devices that there are. ConfigError: they are not those that were asked for."""
    train, start = config.train, launched(environment)
    if start is None:
        _check_alone(train, environment)
        start_devices, start_nodes = max(1, train.devices), max(1, train.nodes)
    else:
        _check_started(train, start, environment)
        start_devices, start_nodes = start.devices, start.nodes
    return replace(config, train=replace(train, devices=start_devices, nodes=start_nodes))


def _check_alone(train: TrainConfig, environment: Mapping[str, str]) -> None:
    if train.nodes > 1 and "NODE_RANK" not in environment:
        raise ConfigError(f"train.nodes = {train.nodes}: this process was started alone; on a cluster: sbatch "
                          "slurm/dlcm_1t.sh RUN_FILE, or srun, or torchrun on every node")
    if "SLURM_JOB_NUM_NODES" not in environment or train.devices:
        return
    nodes, devices = allocated(environment)
    if nodes * devices > 1:
        raise ConfigError(
            f"job {environment.get('SLURM_JOB_ID')}: it has {nodes} nodes for {devices} processes each, but this one "
            "was not started by srun and would wait for the others; call make pretrain, or dlcm job, or put "
            f"`srun --ntasks-per-node={devices}` in front. To use one process all the same: train.devices=1")


def _check_started(train: TrainConfig, start: Launched, environment: Mapping[str, str]) -> None:
    for name, asked, there in (("devices", train.devices, start.devices), ("nodes", train.nodes, start.nodes)):
        if asked not in (0, there):
            raise ConfigError(f"train.{name} = {asked}: {start.by} has started {start.nodes} x {start.devices} "
                              f"processes; leave train.{name} at 0, or start as many as it says")
    gpus = gpus_of_node(environment)
    if start.by == "srun" and gpus not in (0, start.devices) and not train.devices:
        raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE = {start.devices}: this node has {gpus} GPUs, and one process "
                          f"goes with one GPU; give srun --ntasks-per-node={gpus}, or name train.devices="
                          f"{start.devices} to leave the others unused")
