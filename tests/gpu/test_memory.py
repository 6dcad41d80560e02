"""A step holds as much memory as `dlcm estimate` says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlcm_lightning.compose import load_config
from dlcm_lightning.scaling.memory import rank_memory
from tests.steps import Steps


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
