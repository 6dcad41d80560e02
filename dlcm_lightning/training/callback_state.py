"""What callbacks keep for a checkpoint: their `state_dict`, as JSON and tensors, and back to what it was.

Lightning's own `state_dict`, `load_state_dict` and `state_key`; rank 0's are saved, all ranks load them. A checkpoint
holds nothing that has to be unpickled, so a state is made of None, numbers, texts, bytes, lists, tuples, sets, dicts,
tensors, NumPy's arrays and numbers, and paths. JSON has no name for some of these: they stand there as {TAG: ...}.
"""

from __future__ import annotations

import base64
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dlcm_lightning.errors import CheckpointError

TENSOR, ARRAY, NUMBER, ENTRIES = "__tensor__", "__array__", "__number__", "__entries__"
PLAIN = (str, int, float, bool, type(None))
SEQUENCES: dict[str, type[Any]] = {"__tuple__": tuple, "__set__": set, "__frozenset__": frozenset}


CallbacksState = tuple[dict[str, dict[str, Any]], dict[str, Tensor]]


def callbacks_state(trainer: Trainer) -> CallbacksState:
    """By the callback's `state_key`, what JSON can hold, and the tensors that it names. CheckpointError: a state is of
    something else; it names callback and key."""
    tensors: dict[str, Tensor] = {}
    kept = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = callback.state_key
        try:
            if state := callback.state_dict():
                kept[name] = _encoded(name, dict(state), tensors)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"callback {name}: its state_dict fails: {type(error).__name__}: {error}") from error
    return kept, tensors


def load_callbacks_state(trainer: Trainer, kept: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Every callback is given what it had saved, and nothing where it had nothing."""
    named = set(_named(list(kept.values())))
    classes = [type(callback).__name__ for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        once = [name] if classes.count(name) == 1 else []  # as it was saved by earlier versions
        for name in dict.fromkeys((callback.state_key, *once)):
            state = _decoded(kept.get(name, {}), tensors)
            state |= {key.removeprefix(f"{name}/"): value for key, value in tensors.items()
                      if key.startswith(f"{name}/") and key not in named}  # once they were not named
            if state:
                callback.load_state_dict(state)
                break


def _encoded(where: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """As JSON holds it; its tensors are put beside."""
    def each(values: Any) -> list[Any]:
        return [_encoded(f"{where}/{number}", one, tensors) for number, one in enumerate(values)]

    if isinstance(value, np.generic) and isinstance(value.item(), PLAIN):
        return {NUMBER: [value.dtype.str, value.item()]}
    if isinstance(value, PLAIN):
        return value
    if (isinstance(value, Tensor) and value.layout == torch.strided) or (isinstance(value, np.ndarray) and (
            value.dtype.kind in "biuf" and value.dtype.itemsize <= 8)):
        while where in tensors:
            where += "'"
        plain = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        tensors[where] = plain.detach().to("cpu", copy=True).contiguous()  # its own: two may be views of one
        return {TENSOR if isinstance(value, Tensor) else ARRAY: where}
    if isinstance(value, list):
        return each(value)
    if isinstance(value, tuple | set | frozenset) and not hasattr(value, "_fields"):
        tag = next(tag for tag, kind in SEQUENCES.items() if isinstance(value, kind))
        return {tag: each(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _encoded(f"{where}/{key}", one, tensors) for key, one in value.items()}
        return {ENTRIES: [each(entry) for entry in value.items()]}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, PurePath):
        return {"__path__": str(value)}
    raise CheckpointError(f"callback {where}: its state_dict holds a {type(value).__module__}.{type(value).__name__}, "
                          "which a checkpoint here cannot hold: nothing in it is pickled; give numbers, texts, lists, "
                          "dicts or tensors")


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, inner), = value.items()
        if tag == TENSOR:
            return tensors[inner]
        if tag == ARRAY:
            return tensors[inner].numpy()
        if tag == NUMBER:
            return np.dtype(inner[0]).type(inner[1])
        if tag in SEQUENCES:
            return SEQUENCES[tag](_decoded(one, tensors) for one in inner)
        if tag == ENTRIES:
            return {key: one for key, one in _decoded(inner, tensors)}
        if tag == "__bytes__":
            return base64.b64decode(inner)
        if tag == "__path__":
            return Path(inner)
    return {key: _decoded(one, tensors) for key, one in value.items()}


def _named(value: Any) -> list[str]:
    """Names of tensors that stand inside."""
    if isinstance(value, list):
        return [name for one in value for name in _named(one)]
    if not isinstance(value, dict):
        return []
    if len(value) == 1 and next(iter(value)) in (TENSOR, ARRAY):
        return list(value.values())
    return [name for one in value.values() for name in _named(one)]
