"""The host waits for a GPU nowhere in a step but for the number of concepts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.steps import CONFIG, MODEL, Steps


@pytest.mark.parametrize("kind", ["dlcm", "dense"])
@pytest.mark.parametrize("compile_kernels", [False, True], ids=["eager", "compiled"])
def test_nothing_in_a_step_waits_for_the_device_but_the_number_of_concepts(kind: str, compile_kernels: bool,
                                                                            cuda: torch.device) -> None:
    """That one is awaited by an event, which this mode lets pass; tests/training/test_waits.py counts it."""
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
