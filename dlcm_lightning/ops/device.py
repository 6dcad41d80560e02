"""Whether this process computes on a GPU. `DLCM_DEVICE=cpu` takes the CPU though there is one, everywhere; it is how
the tests run on a machine with GPUs."""

from __future__ import annotations

import os

import torch

from dlcm_lightning.errors import ConfigError

DEVICE = "DLCM_DEVICE"


def on_gpu() -> bool:
    """Whether there is a GPU to be used. ConfigError: DLCM_DEVICE asks for what is not there."""
    wanted = os.environ.get(DEVICE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE} = {wanted!r}: choose cpu or cuda, or leave it out")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{DEVICE} = 'cuda': torch finds no GPU here; driver and torch's CUDA have to agree")
    return wanted != "cpu" and torch.cuda.is_available()
