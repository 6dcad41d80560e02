"""Whole optimizer steps on a GPU: the same bits twice, the loss of a CPU, no wait, as much memory as estimated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlcm_lightning.compose import load_config
from dlcm_lightning.scaling.memory import rank_memory
from tests.steps import CONFIG, MODEL, Steps


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
    batches = run.batches(1)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.compute(batches)
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
