"""What the numbers of a run are computed with: the dtype of its products and the kernel of its attention.

Both are chosen on the machine where the configuration leaves them open, and another choice rounds otherwise. So a run
keeps what it has begun with. The command reads that from its checkpoints (run.py); this is the same for the module in a
Trainer of its own, and for Lightning's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer

from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.training.device import BY_NAME, DTYPES, resolve_precision


def choose_arithmetic(config: Config, device: torch.device, trainer: Trainer | None, dtype: torch.dtype | None,
                      backend: str | None) -> tuple[torch.dtype, str]:
    """dtype, backend: where they are given, they count. One rank's choice of the dtype counts for all."""
    if dtype is None and trainer is not None:
        mine = resolve_precision(config.train.precision, device)[0]
        dtype = BY_NAME[trainer.strategy.broadcast(str(mine).removeprefix("torch."))]
    elif dtype is None:  # a checkpoint that is loaded says it better
        dtype = DTYPES.get(config.train.precision, torch.float32)
    return dtype, backend or choose_backend(config.model.attention, device, dtype, compiled=config.train.compile)


def saved_arithmetic(model: LanguageModel) -> dict[str, str]:
    """As Lightning's checkpoints hold it."""
    return {"compute_dtype": str(model.compute_dtype).removeprefix("torch."), "attention": model.backend}


def keep_arithmetic(checkpoint: Mapping[str, Any], model: LanguageModel, config: Config, device: torch.device, *,
                    dtype_is_open: bool, backend_is_open: bool, continues: bool) -> None:
    """Sets `model.compute_dtype` and `model.backend` to what a checkpoint was trained with, where the configuration
    leaves them open.

    device: that it will compute on. continues: whether training goes on; what only reads weights may attend with
    another kernel. ConfigError: it is not open, or cannot run here, and is another.
    """
    step, begun = checkpoint["global_step"], BY_NAME[checkpoint["compute_dtype"]]
    if config.train.precision == "auto" and dtype_is_open:
        model.compute_dtype = begun
    elif model.compute_dtype != begun:
        raise ConfigError(f"train.precision = {config.train.precision!r}: the checkpoint of step {step} was "
                          f"trained in {checkpoint['compute_dtype']}; set the field alike, or to auto")
    attention = checkpoint.get("attention", "")  # checkpoints of earlier versions do not say
    if config.model.attention == "auto" and backend_is_open:
        model.backend = choose_backend("auto", device, model.compute_dtype, compiled=config.train.compile,
                                       begun=attention)
    if continues and attention not in ("", model.backend):
        raise ConfigError(f"model.attention = {config.model.attention!r}: the checkpoint of step {step} was trained "
                          f"with {attention}, here it means {model.backend}, which rounds otherwise; continue on a "
                          "machine like the first")
