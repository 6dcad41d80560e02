"""An export as files: read by name, without making a model of it. What stands in it: export/portable.py.

Training begins with one (`train.init_from`), and upcycling reads dense ones.
"""

from __future__ import annotations

import json
from pathlib import Path

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.checkpoint.tensors import Tensors
from dlcm_lightning.compose import load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.errors import CheckpointError

ABOUT, CONFIG, TOKENIZER = "portable.json", "config.yaml", "tokenizer.json"
PREFIX = "model."
"""In front of every name where Hugging Face's transformers is to load it."""


class Exported:
    """A folder that `dlcm export` or `dlcm upcycle` wrote."""

    def __init__(self, folder: str | Path) -> None:
        """CheckpointError: there is none."""
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            what = "holds no" if self.folder.is_dir() else "is no folder, hence has no"
            raise CheckpointError(f"{self.folder}: {what} {ABOUT}; name what `dlcm export` or `dlcm upcycle` wrote")

    def check_whole(self) -> None:
        """CheckpointError: a file is missing, cannot be read or is not as portable.json says."""
        try:
            files: dict[str, str] = json.loads((self.folder / ABOUT).read_bytes())["files"]
            for name, stated in files.items():
                if sha256_of(self.folder / name) != stated:
                    raise CheckpointError(f"{self.folder / name} is damaged: its sha256 differs from {ABOUT}'s; write "
                                          "the folder again")
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder}: not a whole exported model ({error!r}); write it again") from error
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error}); correct the permissions") from error

    @property
    def config(self) -> Config:
        """Of the run that wrote it, or that it was written for."""
        return load_saved_config(self.folder / CONFIG)

    def tokenizer_fingerprint(self) -> str:
        """sha256 of the tokenizer.json that it was trained with; that of its own file, unless portable.json says
        another, as where BOS was added for transformers. CheckpointError: it cannot be read."""
        try:
            stated: str | None = json.loads((self.folder / ABOUT).read_bytes()).get("tokenizer")
            return stated or sha256_of(self.folder / TOKENIZER)
        except OSError as error:
            raise CheckpointError(f"{self.folder / TOKENIZER}: cannot be read ({error}); write it again") from error

    def tensors(self) -> Tensors:
        """CheckpointError: they cannot be read."""
        try:
            return Tensors(sorted(self.folder.glob("model*.safetensors")), prefix=PREFIX)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {error}; write it again") from error
