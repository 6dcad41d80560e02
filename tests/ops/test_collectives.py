"""Groups of processes wait alike, whoever has made them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dlcm_lightning.config import Config
from dlcm_lightning.ops.collectives import COLLECTIVE_TIMEOUT, ControlGroup, wait_alike
from dlcm_lightning.training.callbacks import resume
from dlcm_lightning.training.run import pretrain


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    yield
    dist.destroy_process_group()


def timeouts() -> list[timedelta]:
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_a_group_that_a_library_has_made_waits_as_long_as_that_of_all_ranks(alone: None) -> None:
    dist.new_group([0], backend="gloo", timeout=timedelta(seconds=10))
    assert sorted(timeouts()) == [timedelta(seconds=10), COLLECTIVE_TIMEOUT]
    wait_alike()
    assert timeouts() == [COLLECTIVE_TIMEOUT] * 2


def test_the_group_of_hosts_says_how_long_it_waits(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr("dlcm_lightning.ops.collectives.world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **options: given.append(options["timeout"]))
    ControlGroup()
    assert given == [COLLECTIVE_TIMEOUT]


def test_a_run_asks_for_it_when_its_engine_has_made_its_groups(run_config: Config, monkeypatch: pytest.MonkeyPatch
                                                               ) -> None:
    asked: list[int] = []
    monkeypatch.setattr(resume, "wait_alike", lambda: asked.append(1))
    pretrain(run_config, lambda _: None)
    assert asked == [1]
