"""Device and precision follow from the machine and the place of a process; seen on a CPU, for GPUs too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlcm_lightning.cluster.world import World
from dlcm_lightning.config import Config, ConfigError, ModelConfig, TrainConfig
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.ops import attention
from dlcm_lightning.training import device as device_module
from dlcm_lightning.training import loop, rendezvous
from dlcm_lightning.training import run as run_module
from dlcm_lightning.training.contract import check_trainer
from dlcm_lightning.training.device import choose_device, resolve_precision
from dlcm_lightning.training.metrics.sums import COLUMNS, SCALARS, MetricSums
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.training.speed import Machine, speed_of
from dlcm_lightning.training.strategies import ddp
from dlcm_lightning.training.strategies.choice import choose_strategy
from dlcm_lightning.training.strategies.ddp import DdpStrategy
from tests.training.test_run import last, stop_after

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """Claims so many GPUs. Returns the devices that were made current, by torch's own rule for what can be one, and
    "used" where CUDA was begun."""

    def claim(count: int) -> list[Any]:
        current: list[Any] = []

        def set_device(where: Any) -> None:
            torch.cuda._utils._get_device_index(where)  # as torch.cuda.set_device asks for it
            current.append(where)

        monkeypatch.delenv("DLCM_DEVICE", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "init", lambda: current.append("used"))
        return current

    return claim


@pytest.mark.parametrize(("visible", "local_rank", "local_size", "index"), [
    (1, 0, 1, 0), (8, 0, 1, 0), (8, 5, 8, 5), (8, None, None, 0), (1, 3, 4, 0),  # each task sees its own
])
def test_a_process_has_the_gpu_of_its_place_by_its_index(
        gpus: Callable[[int], list[Any]], run_config: Config, visible: int, local_rank: int | None,
        local_size: int | None, index: int) -> None:
    current = gpus(visible)
    where = choose_device(World("variables", local_rank or 0, local_size or 1, local_rank, local_size))
    assert where == torch.device("cuda", index) and current == [where, "used"]
    for ranks in (1, 2):
        engine: Any = choose_strategy(replace(run_config.train, devices=ranks), where)
        assert torch.cuda._utils._get_device_index(engine.root_device) == index, "Lightning makes it current"


def test_more_processes_than_gpus_are_refused(gpus: Callable[[int], list[Any]]) -> None:
    gpus(2)
    with pytest.raises(ConfigError, match="is process 3 of 4 on this node and sees 2 GPUs"):
        choose_device(World("torchrun", 3, 4, 3, 4))


def test_the_cpu_is_taken_where_it_is_asked_for(gpus: Callable[[int], list[Any]],
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


def test_a_run_keeps_the_attention_that_it_has_begun_with(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kernel rounds otherwise, so that the run would not end as if it had not been stopped."""
    assert attention.choose_backend("auto", CPU, torch.float32, begun="reference") == "reference"
    assert attention.choose_backend("auto", CPU, torch.float32, begun="varlen") == "sdpa", "which a CPU has not"
    stop_after(run_config, 3)
    assert last(run_config).manifest.identity.attention == "sdpa"
    monkeypatch.setattr(run_module, "choose_backend", lambda *_, **__: "reference")
    with pytest.raises(ConfigError, match=r"was trained with sdpa, here it means reference"):
        pretrain(run_config, lambda _: None)


def test_auto_takes_what_torch_compile_makes_only_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    assert attention.choose_backend("auto", gpu, torch.bfloat16) == "varlen"
    assert attention.choose_backend("auto", gpu, torch.bfloat16, compiled=True) == "flex"
    assert attention.choose_backend("auto", gpu, torch.bfloat16, compiled=True, begun="varlen") == "varlen"
    assert attention.choose_backend("auto", gpu, torch.float32, compiled=True) == "sdpa"


@pytest.mark.parametrize("peak", [4e9, None], ids=["a known card", "an unknown one"])
def test_the_share_of_the_peak_stands_wherever_people_look(
        run_config: Config, peak: float | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a card that nobody knows, only the share of what it multiplies at best."""
    monkeypatch.setattr(run_module, "peak_flops", lambda *_: peak)
    monkeypatch.setattr(run_module, "matrix_product_rate", lambda *_: 2e9)
    said: list[str] = []
    report = pretrain(run_config, said.append)
    assert report.speed is not None
    run = Path(run_config.train.output_dir) / run_config.name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    events = EventAccumulator(str(run))
    events.Reload()
    stored = json.loads((run / "report.json").read_text())["speed"]
    bar, words = capsys.readouterr().err, "\n".join(said)
    for line in trained:
        rate = line["tokens_per_second"] * report.speed.flops_per_token
        assert line["share_of_product_rate"] == pytest.approx(rate / 2e9, rel=0.2), "FLOPs follow each line's concepts"
        assert line.get("mfu") == (pytest.approx(line["share_of_product_rate"] / 2) if peak else None)
    tags = events.Tags()["scalars"]
    assert "train_system/share_of_product_rate" in tags and ("train_system/mfu" in tags) is bool(peak)
    assert ("mfu=" in bar) is ("share=" in bar) is bool(peak)
    assert "matrix-product rate" in words and ("MFU" in words) is bool(peak)
    assert stored["matrix_product_rate"] == 2e9 and report.speed.mfu == (
        pytest.approx(report.speed.share / 2) if peak else None)


def test_the_end_after_an_error_waits_for_nobody_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a group down waits for the device, and so for peers that may have gone."""
    taken_down: list[int] = []
    monkeypatch.setattr(rendezvous.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(rendezvous.dist, "destroy_process_group", lambda: taken_down.append(1))
    for on_a_gpu, expected in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda on_a_gpu=on_a_gpu: on_a_gpu)
        taken_down.clear()
        try:
            raise RuntimeError
        except RuntimeError:
            rendezvous.leave_group()
        assert len(taken_down) == expected
        taken_down.clear()
        rendezvous.leave_group()
        assert taken_down == [1], "without an error it is taken down anywhere"


def test_a_peak_is_that_of_the_card_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H200 that is taken for an A100 would look three times as fast; one that nobody knows has no share."""
    named = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12,
             "NVIDIA H200": 989.4e12, "NVIDIA B200": 2.25e15, "NVIDIA GeForce RTX 4090": None, "Tesla V100": None}
    for name, peak in named.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda where, name=name: name)
        assert device_module.peak_flops(torch.bfloat16, torch.device("cuda", 0)) == peak, name
        assert device_module.peak_flops(torch.float32, torch.device("cuda", 0)) is None
    assert device_module.peak_flops(torch.bfloat16, CPU) is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2"])
def test_the_end_of_a_run_copies_nothing_from_a_gpu_to_the_host(
    strategy: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = choose_strategy(TrainConfig(strategy=strategy, devices=2, nodes=1),  # type: ignore[arg-type]
                                  torch.device(device, 0))
    asked: list[str] = []
    for base in type(engine).__mro__[1:]:
        if "teardown" in vars(base):
            monkeypatch.setattr(base, "teardown", lambda self: asked.append("Lightning"))
            break
    engine.teardown()
    assert asked == ([] if device == "cuda" else ["Lightning"])


def test_what_was_logged_stays_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying it waits for the device, on which a collective may wait for peers that have gone."""
    copied: list[str] = []
    engine: Any = choose_strategy(TrainConfig(devices=1, nodes=1), CPU)
    trainer = Trainer(strategy=engine, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    loop.install(trainer, 1)
    ended: list[str] = []
    trainer.fit_loop.epoch_loop.val_loop._data_fetcher = SimpleNamespace(teardown=lambda: ended.append("rows"))
    monkeypatch.setattr(_TrainingEpochLoop, "teardown", lambda self: copied.append("loop"))
    monkeypatch.setattr(_LoggerConnector, "teardown", lambda self: copied.append("metrics"))
    for on_the_device, expected in ((True, []), (False, ["loop", "metrics"])):
        monkeypatch.setattr(engine, "stays_on_the_device", lambda there=on_the_device: there)
        trainer.fit_loop.epoch_loop.teardown()
        trainer._logger_connector.teardown()
        assert copied == expected and ended == ["rows"]


def test_ddp_is_made_under_the_stream_that_gradients_come_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    def stream(*_: Any) -> None:
        raise AssertionError("another stream")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda model, **options: made.update(options, model=model))
    engine = DdpStrategy(torch.device("cuda", 3))
    model = torch.nn.Linear(1, 1)
    engine._setup_model(model)
    assert made["model"] is model and made["device_ids"] == [3] and made["gradient_as_bucket_view"]
    assert made["bucket_cap_mb"] == ddp.BUCKET_MEGABYTES


@pytest.fixture
def sloppy() -> Iterator[None]:
    """As NVIDIA's containers set torch."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_a_run_multiplies_fp32_in_fp32(run_config: Config, sloppy: None) -> None:
    seen: list[str] = []

    class Look(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            seen.append(torch.get_float32_matmul_precision())

    pretrain(run_config, lambda _: None, callbacks=[Look()])
    assert set(seen) == {"highest"}


def test_a_plain_trainer_on_a_gpu_is_told_to(run_config: Config, sloppy: None) -> None:
    engine = SingleDeviceStrategy(torch.device("cuda", 0))
    trainer: Any = SimpleNamespace(strategy=engine, precision="32-true", world_size=1, num_nodes=1)
    with pytest.warns(UserWarning, match="allow_tf32 is True, which would decide boundaries in TF32"):
        check_trainer(trainer, run_config, fitting=False)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_command_keeps_tf32_out_of_the_processes_that_it_starts() -> None:
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    code = ("import os, dlcm_lightning.cli as cli\n"
            "cli.main = lambda: print(os.environ['TORCH_ALLOW_TF32_CUBLAS_OVERRIDE'], "
            "os.environ['PYTORCH_CUDA_ALLOC_CONF']) or 0\ncli.entry()")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["0", "expandable_segments:True"], done.stderr


def test_a_speed_is_of_the_concepts_and_documents_that_came(run_config: Config) -> None:
    model = ModelConfig(vocab_size=100, d_token=64, d_concept=64, heads_token=1, kv_heads_token=1, heads_concept=1,
                        kv_heads_concept=1, ffn_token=64, ffn_concept=64)
    config = replace(run_config, model=model)
    sums = MetricSums(torch.zeros(1, len(COLUMNS), dtype=torch.float64), torch.zeros(len(SCALARS), dtype=torch.float64),
                      torch.zeros(0, dtype=torch.float64))
    machine = Machine(1e9, 4e9)
    assert speed_of(config, sums, 2.0, 0.5, machine) is None
    sums.domains[0, COLUMNS.index("tokens")], sums.domains[0, COLUMNS.index("sampled")] = 1000, 500
    sums.scalar("squared_lengths").fill_(1000 * 40)
    pace = speed_of(config, sums, 2.0, 0.5, machine)
    assert pace is not None and pace.tokens_per_second == 500 and pace.data_wait == 0.25
    assert pace.flops_per_token == training_flops_per_token(model, 40, 0.5)
    assert pace.mfu is not None and pace.share == pytest.approx(4 * pace.mfu) == 500 * pace.flops_per_token / 1e9
    unknown = speed_of(config, sums, 2.0, 0.5, Machine(1e9, None))
    assert unknown is not None and unknown.mfu is None
