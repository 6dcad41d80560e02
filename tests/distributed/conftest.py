"""What the tests of several ranks share: a small corpus, a small model, and processes that do tasks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.cluster.local import LocalRanks
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import BoundaryConfig, Config, DataConfig, OptimConfig, TrainConfig
from tests.conftest import MODEL

ROOT = Path(__file__).parents[2]
ROWS = 11
"""Of a step: no number of ranks here divides it, so that some ranks have padding rows and all counts differ."""
STEPS = 3
MICRO_ROWS = {(1, 1): 11, (1, 3): 4, (2, 1): 6, (2, 3): 2, (4, 1): 3, (4, 3): 1}
"""By ranks and micro-batches."""
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SECONDS = 240.0


@dataclass(frozen=True)
class Task:
    """What the ranks do for one configuration."""

    action: str
    config: Config
    mutant: str = ""


def step_config(data: DataConfig, ranks: int = 1, micro_batches: int = 1, *, previous: bool | None = None,
                precision: str = "fp64", max_grad_norm: float = 1.0, **train: object) -> Config:
    """Three steps of 11 short rows. previous: the rule for F; by default what the micro-batches ask for."""
    data = replace(data, global_batch_size=ROWS, micro_batch_size=MICRO_ROWS[ranks, micro_batches])
    boundary = BoundaryConfig(form="both", rate_weight=2.0, previous_rate=bool(previous))
    return Config(
        name="steps", seed=5, model=replace(MODEL, boundary=boundary), data=data,
        optim=OptimConfig(total_tokens=data.tokens_per_step * STEPS, warmup_tokens=2 * data.tokens_per_step,
                          max_grad_norm=max_grad_norm),
        train=TrainConfig(precision=precision, devices=ranks, **train))  # type: ignore[arg-type]


Do = Callable[[int, dict[str, Task]], dict[str, dict[str, torch.Tensor]]]


@pytest.fixture(scope="session")
def do(tmp_path_factory: pytest.TempPathFactory) -> Do:
    """Runs tasks by name on so many processes; what each found, by name."""

    def run(ranks: int, tasks: dict[str, Task]) -> dict[str, dict[str, torch.Tensor]]:
        folder = tmp_path_factory.mktemp("ranks")
        listed = []
        for name, task in tasks.items():
            save_config(task.config, folder / f"{name}.yaml")
            listed.append({"action": task.action, "config": str(folder / f"{name}.yaml"), "mutant": task.mutant,
                           "out": str(folder / f"{name}.pt")})
        (folder / "tasks.json").write_text(json.dumps(listed))
        command = [sys.executable, "-m", "tests.distributed.worker", str(folder / "tasks.json")]
        with LocalRanks(command, ranks, folder / "logs", variables={"PYTHONPATH": str(ROOT)}) as processes:
            codes = processes.wait(SECONDS)
            assert codes == [0] * ranks, processes.tail()
        return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in tasks}

    return run
