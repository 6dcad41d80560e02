"""Which format a source is in, by what lies there."""

from __future__ import annotations

from pathlib import Path

from dlcm_lightning.checkpoint.exported import ABOUT
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.run_directory import CHECKPOINTS
from dlcm_lightning.upcycling import gguf, huggingface, own_models
from dlcm_lightning.upcycling.source import DenseSource


def open_source(path: str | Path) -> DenseSource:
    """CheckpointError: there is nothing, or a model that cannot be had here."""
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: is no .gguf file; name one, or the folder of a Hugging Face model, an "
                                  "export or a run of ours")
        return gguf.read_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    if (path / ABOUT).is_file():
        return own_models.read_export(path)
    if (path / CHECKPOINTS).is_dir():
        return own_models.read_run(path)
    return huggingface.read_folder(path)
