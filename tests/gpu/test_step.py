"""Whole optimizer steps on a GPU: the same bits twice, the loss of a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.steps import CONFIG, Steps


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
