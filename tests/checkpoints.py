"""Checkpoints without a training run behind them, as two ranks would have written them."""

from __future__ import annotations

from pathlib import Path

import torch

from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.folder import CALLBACKS, CONFIG, Fingerprint, Identity, Manifest, complete, describe_file
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config
from dlcm_lightning.run_directory import unfinished

STATE, OTHER = (tensors.file_name(number, 2) for number in range(2))
IDENTITY = Identity("rows", "float32")


def leave_checkpoint(run: Path, step: int, config: Config, identity: Identity = IDENTITY, tokens: int | None = None
                     ) -> Manifest:
    """tokens: consumed; a hundred a step where not given."""
    folder = unfinished(run, step)
    folder.mkdir(parents=True)
    tensors.write({"weight/a": torch.arange(1000.0), "buffer/n": torch.tensor([1, 2])}, folder / STATE)
    tensors.write({"weight/b": torch.full((3, 2), float(step), dtype=torch.float64)}, folder / OTHER)
    (folder / CALLBACKS).write_text('{"Watch": {"rows": 3}}')
    save_config(config, folder / CONFIG)
    files = {name: describe_file(folder / name) for name in (STATE, OTHER, CALLBACKS, CONFIG)}
    manifest = Manifest(step, tokens or step * 100, "ddp", 2, identity, Fingerprint(1.5, "101"), files)
    complete(run, manifest)
    return manifest
