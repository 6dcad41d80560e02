"""Pretraining of Dynamic Large Concept Models (arXiv 2512.24617) with PyTorch Lightning.

    from dlcm_lightning import PretrainData, PretrainModule, load_config, load_model, pretrain, trainer_arguments

`load_config` composes a run; `pretrain` trains it as the command does; `PretrainModule` and `PretrainData` are a
LightningModule and a LightningDataModule for a Trainer of one's own, which `trainer_arguments` says what to be told;
`load_model` opens what `dlcm export` wrote. Each is imported when it is asked for: a configuration needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["PretrainData", "PretrainModule", "load_config", "load_model", "pretrain", "trainer_arguments"]
_MODULES = {
    "PretrainData": "training.datamodule", "PretrainModule": "training.module", "load_config": "compose",
    "load_model": "export.portable", "pretrain": "training.run", "trainer_arguments": "training.contract",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dlcm_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dlcm_lightning.{_MODULES[name]}"), name)
