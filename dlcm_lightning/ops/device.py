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


def gpu_of(local_rank: int | None, local_size: int | None, here: str) -> torch.device:
    """The GPU that goes with the place of a process among those of its node. here: its name, for messages.
    ConfigError: more processes than GPUs."""
    visible, number = torch.cuda.device_count(), local_rank or 0
    if visible == 1 and (local_size or 1) > 1:
        number = 0  # its launcher shows every process its own
    if number >= visible:
        raise ConfigError(f"{here} is process {number} of {local_size} on this node and sees {visible} GPUs; start one "
                          "process per GPU (train.devices, srun --ntasks-per-node, torchrun --nproc-per-node), and let "
                          "each see all of them or its own")
    return torch.device("cuda", number)
