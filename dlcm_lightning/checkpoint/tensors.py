"""Tensors by name in safetensors files, several files a checkpoint, one writer each.

    weight/NAME  exp_avg/NAME  exp_avg_sq/NAME     of every parameter, whole, NAME as in `LanguageModel`
    buffer/NAME                                    of the module that is trained
    callback/NAME/KEY                              what watches a run, where it holds tensors

Which file holds what follows from nothing but the files: a checkpoint that four ranks wrote is read by one, or three.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".safetensors"


def file_name(writer: int, writers: int) -> str:
    return f"state-{writer:05d}-of-{writers:05d}{SUFFIX}"


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """With the permissions that any new file has here: safetensors would let nobody but its writer read it. OSError: a
    disk that is full or not writable."""
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # how it reports the system's errors
        raise OSError(str(error)) from error
    path.chmod(permissions)


def share_out(sizes: dict[str, int], writers: int) -> dict[str, int]:
    """Name -> writer: the largest first, each to whoever has least, so that all write about as much."""
    load = [0] * writers
    found = {}
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        found[name] = load.index(min(load))
        load[found[name]] += sizes[name]
    return found


class Tensors:
    """All tensors of a checkpoint, read when asked for. A context manager."""

    def __init__(self, files: Iterable[Path], prefix: str = "") -> None:
        """prefix: left out of names that begin with it. ValueError: a file that is no safetensors file, or two with a
        tensor of one name."""
        self._open: dict[str, tuple[safe_open, str]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a safetensors file ({error})") from error
            for stored in file.keys():  # noqa: SIM118 - no dict
                name = stored.removeprefix(prefix)
                if name in self._open:
                    raise ValueError(f"{path}: {name} is in another file of the checkpoint too")
                self._open[name] = file, stored

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._open.clear()

    def names(self, kind: str = "") -> list[str]:
        """Sorted; of a kind: without its prefix."""
        return sorted(name.removeprefix(kind) for name in self._open if name.startswith(kind))

    def get(self, name: str) -> Tensor:
        """KeyError: there is none."""
        file, stored = self._open[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def shape(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Without reading it."""
        file, stored = self._open[name]
        piece = file.get_slice(stored)
        return torch.Size(piece.get_shape()), DTYPES[piece.get_dtype()]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
