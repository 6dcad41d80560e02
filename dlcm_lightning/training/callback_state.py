"""What callbacks keep for a checkpoint: numbers go to its JSON, tensors to its tensors.

Lightning's own `state_dict` and `load_state_dict` of a callback, told apart by type; rank 0's are saved, all ranks load
them.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def callbacks_state(trainer: Trainer) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """By the callback's class, numbers; by CLASS/KEY, tensors."""
    numbers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for key, value in callback.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            elif value is not None:
                numbers.setdefault(name, {})[key] = value
    return numbers, tensors


def load_callbacks_state(trainer: Trainer, numbers: dict[str, dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    """Every callback is given what it had saved, and nothing where it had nothing."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        mine = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if state := numbers.get(name, {}) | mine:
            callback.load_state_dict(state)
