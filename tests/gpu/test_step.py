"""Whole optimizer steps on a GPU: the same bits twice, the loss of a CPU, no wait, as much memory as estimated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.rows import synthetic_batch
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config, DataConfig, ModelConfig, OptimConfig, SourceConfig, TrainConfig
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.scaling.memory import rank_memory
from dlcm_lightning.training.module import PretrainModule

MODEL = ModelConfig(vocab_size=1003, d_token=128, d_concept=256, encoder_layers=2, backbone_layers=2, decoder_layers=2,
                    heads_token=4, kv_heads_token=2, heads_concept=4, kv_heads_concept=2, head_dim=64, ffn_token=256,
                    ffn_concept=256)
CONFIG = Config(
    name="gpu", seed=1, model=MODEL, train=TrainConfig(devices=1, nodes=1),
    data=DataConfig(corpus="shards", root="nowhere", sequence_length=512, global_batch_size=4, micro_batch_size=2,
                    sources=[SourceConfig("a", "en", 1.0)]),
    optim=OptimConfig(total_tokens=10**6, warmup_tokens=0),
)


class Steps:
    """A module and its optimizer."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        backend = choose_backend(config.model.attention, device, dtype, compiled=config.train.compile)
        self.module = PretrainModule(config, dtype, backend, torch.ones(config.model.vocab_size, dtype=torch.long))
        self.module.configure_model()
        self.module.to(device)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.copies = self.module.model.keep_low_copies()
        if config.train.compile or backend == "flex":
            self.module.model.prime(config.data.micro_batch_size * config.data.sequence_length, device)

    def step(self, number: int) -> torch.Tensor:
        """The loss of a step, before its update."""
        count = self.config.micro_batches
        batches = [synthetic_batch(self.config, "sample", number * count + k) for k in range(count)]
        if self.device.type == "cuda":
            batches = [batch.pin_memory().to(self.device, non_blocking=True) for batch in batches]
        for k, batch in enumerate(batches):
            (self.module.training_step(batch, k) / count).backward()
        torch.nn.utils.clip_grad_norm_(self.module.model.parameters(), 1.0)
        self.optimizer.step()
        if self.copies is not None:
            self.copies.refresh()
        self.optimizer.zero_grad()
        self.module.after_step()
        assert self.module.last_step is not None
        return self.module.last_step.total("nll") / self.module.last_step.total("targets")

    def state(self) -> list[torch.Tensor]:
        moments = [value for one in self.optimizer.state.values() for value in one.values()]
        return [*self.module.state_dict().values(), *moments]


@pytest.mark.parametrize("compile_kernels", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_same_bits_twice(recompute: str, compile_kernels: bool, cuda: torch.device) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, recompute=recompute, compile=compile_kernels))
    runs = [Steps(config, cuda, torch.bfloat16) for _ in range(2)]
    for run in runs:
        for number in range(4):
            run.step(number)
    states = [run.state() for run in runs]
    assert len(states[0]) > 100
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("compile_kernels", [False, True], ids=["eager", "compiled"])
def test_the_loss_of_a_cpu(compile_kernels: bool, cuda: torch.device) -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, compile=compile_kernels))
    mine = Steps(config, cuda, torch.float32)
    theirs = Steps(CONFIG, torch.device("cpu"), torch.float32)
    for number in range(3):
        assert mine.step(number).item() == pytest.approx(theirs.step(number).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["dlcm", "dense"])
@pytest.mark.parametrize("compile_kernels", [False, True], ids=["eager", "compiled"])
def test_nothing_in_a_step_waits_for_the_device_but_the_number_of_concepts(kind: str, compile_kernels: bool,
                                                                            cuda: torch.device) -> None:
    """That one is awaited by an event, which this mode lets pass; tests/model/test_waits.py counts it."""
    config = replace(CONFIG, model=replace(MODEL, kind=kind),  # type: ignore[arg-type]
                     train=replace(CONFIG.train, compile=compile_kernels))
    run = Steps(config, cuda, torch.bfloat16)
    run.step(0)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_memory_is_what_the_estimate_says(recompute: str, cuda: torch.device) -> None:
    config = load_config("configs/run/ladder_87m.yaml", [
        "data.micro_batch_size=4", "data.global_batch_size=8", f"train.recompute={recompute}", "train.compile=true"])
    config = replace(config, train=replace(config.train, devices=1, nodes=1))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = Steps(config, cuda, torch.bfloat16)
    for number in range(3):
        run.step(number)
    peak = torch.cuda.max_memory_allocated() - before
    step = run.module.last_step
    assert step is not None
    concepts = step.scalar("concepts").item() / config.data.tokens_per_step
    said = rank_memory(config, config.train, config.data.micro_batch_size, concepts, config.micro_batches).total
    print(f"{recompute}: peak {peak / 2**30:.2f} GiB, estimate {said / 2**30:.2f} GiB")
    assert 0.9 < peak / said < 1.1
