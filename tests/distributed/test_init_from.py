"""The weights of an export reach every rank, however a strategy cuts a model; the next step is then the same one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.config import DataConfig
from dlcm_lightning.export.portable import export, load_state
from dlcm_lightning.training.run import pretrain
from tests.distributed.conftest import STRATEGIES, Do, Task, step_config

Found = dict[str, torch.Tensor]
ROUNDED = 1e-4
"""Of the first step's loss gradient norm, over strategies, in float32."""


@pytest.fixture(scope="module")
def exported(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three steps, so that the boundary's buffers are not zero."""
    folder = tmp_path_factory.mktemp("exported")
    first = step_config(config, precision="fp32")
    pretrain(replace(first, train=replace(first.train, output_dir=str(folder / "runs"), nodes=1)), lambda _: None)
    return export(folder / "runs" / first.name, folder / "out")


@pytest.fixture(scope="module")
def found(do: Do, config: DataConfig, exported: Path) -> dict[str, Found]:
    tasks = {}
    for strategy in STRATEGIES:
        begun = replace(step_config(config, 2, 1, strategy=strategy, precision="fp32", init_from=str(exported)), seed=9)
        tasks |= {strategy: Task("initial", begun), f"{strategy}-steps": Task("gradients", begun)}
    return do(2, tasks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_begins_with_the_numbers_of_the_export(found: dict[str, Found], exported: Path,
                                                              strategy: str) -> None:
    expected = load_state(exported)
    assert expected["boundary.rate_bias"] != 0
    assert expected.keys() <= found[strategy].keys()
    for name, value in expected.items():
        assert torch.equal(found[strategy][name].cpu(), value), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_step_from_there_is_the_same_under_every_strategy(found: dict[str, Found], strategy: str) -> None:
    norm, expected = (found[f"{one}-steps"]["0/norm"].item() for one in (strategy, "ddp"))
    assert norm == pytest.approx(expected, rel=ROUNDED)
    assert found[f"{strategy}-steps"]["0/rate"] == found["ddp-steps"]["0/rate"]
