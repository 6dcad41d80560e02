"""Sums over ranks that mean the same in one process and in many."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks that share the work; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, without gradient; a new tensor, the argument is left as it was."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total
