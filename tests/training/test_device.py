"""Device and precision follow from the machine and the place of a process; seen on a CPU, for GPUs too."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dlcm_lightning.cluster.world import World
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.ops import attention
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training import device as device_module
from dlcm_lightning.training.device import choose_device, resolve_precision
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.training.strategies.choice import choose_strategy
from tests.training.test_run import last, stop_after

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[torch.device]]:
    """Claims so many GPUs. Returns the devices that were made current, by torch's own rule for what can be one."""

    def claim(count: int) -> list[torch.device]:
        current: list[torch.device] = []

        def set_device(where: Any) -> None:
            torch.cuda._utils._get_device_index(where)  # as torch.cuda.set_device asks for it
            current.append(where)

        monkeypatch.delenv("DLCM_DEVICE", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        return current

    return claim


@pytest.mark.parametrize(("visible", "local_rank", "local_size", "index"), [
    (1, 0, 1, 0), (8, 0, 1, 0), (8, 5, 8, 5), (8, None, None, 0), (1, 3, 4, 0),  # each task sees its own
])
def test_a_process_has_the_gpu_of_its_place_by_its_index(
        gpus: Callable[[int], list[torch.device]], run_config: Config, visible: int, local_rank: int | None,
        local_size: int | None, index: int) -> None:
    current = gpus(visible)
    where = choose_device(World("variables", local_rank or 0, local_size or 1, local_rank, local_size))
    assert where == torch.device("cuda", index) and current == [where]
    for ranks in (1, 2):
        engine: Any = choose_strategy(replace(run_config.train, devices=ranks), where)
        assert torch.cuda._utils._get_device_index(engine.root_device) == index, "Lightning makes it current"


def test_more_processes_than_gpus_are_refused(gpus: Callable[[int], list[torch.device]]) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match="is process 3 of 4 on this node and sees 2 GPUs"):
        choose_device(World("torchrun", 3, 4, 3, 4))


def test_the_cpu_is_taken_where_it_is_asked_for(gpus: Callable[[int], list[torch.device]],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    current = gpus(2)
    monkeypatch.setenv("DLCM_DEVICE", "cpu")
    assert choose_device() == CPU and not current
    monkeypatch.setenv("DLCM_DEVICE", "gpu")
    with pytest.raises(ConfigError, match="DLCM_DEVICE = 'gpu': choose cpu or cuda"):
        choose_device()
    gpus(0)
    monkeypatch.setenv("DLCM_DEVICE", "cuda")
    with pytest.raises(ConfigError, match="torch finds no GPU here"):
        choose_device()


def test_flash_attention_is_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own default adds up gradients in any order, and it does not look at torch's mode."""
    told: list[bool] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int,
               max_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
               window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
               deterministic: bool = False) -> torch.Tensor:  # the signature of flash-attn 2.8
        assert causal
        told.append(deterministic)
        return attention.reference(q, k, v, Segments(cu_q, max_q))

    monkeypatch.setattr(attention, "_flash_varlen", kernel)
    x, segments = torch.ones(4, 2, 8), Segments.from_lengths([3, 1])
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for mode in (True, False):
            torch.use_deterministic_algorithms(mode)
            attention.attention(x, x, x, segments, "flash")
    finally:
        torch.use_deterministic_algorithms(before)
    assert told == [True, False]


def rates(monkeypatch: pytest.MonkeyPatch, **found: float) -> None:
    monkeypatch.setattr(device_module, "_quick_rate", lambda dtype: found[str(dtype).removeprefix("torch.")])


def test_auto_takes_what_multiplies_faster_here_whatever_the_processor_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    rates(monkeypatch, bfloat16=151e9, float32=252e9)
    dtype, why = resolve_precision("auto", CPU)
    assert dtype == torch.float32 and "bf16 multiplies at 151 GFLOP/s here, fp32 at 252" in why
    rates(monkeypatch, bfloat16=960e9, float32=230e9)
    assert resolve_precision("auto", CPU)[0] == torch.bfloat16
    assert resolve_precision("auto", CPU, "float32") == (torch.float32, "as the run has begun")
    assert resolve_precision("fp64", CPU, "float32")[0] == torch.float64


def test_timing_both_takes_a_moment() -> None:
    resolve_precision("auto", CPU)
    began = time.perf_counter()
    resolve_precision("auto", CPU)
    assert time.perf_counter() - began < 20 * device_module.PROBE_SECONDS


def test_a_run_keeps_the_precision_that_it_has_begun_with(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(run_config, train=replace(run_config.train, precision="auto"))
    rates(monkeypatch, bfloat16=1e9, float32=2e9)
    stop_after(config, 3)
    rates(monkeypatch, bfloat16=2e9, float32=1e9)
    assert last(config).manifest.identity.precision == "float32"
    said: list[str] = []
    assert pretrain(config, said.append).precision == "float32"
    assert any("float32: as the run has begun" in line for line in said)
