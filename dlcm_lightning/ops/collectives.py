"""Ranks, and sums over them that mean the same in one process and in many."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks that share the work; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if _distributed() else 1


def rank() -> int:
    """This process among them; 0 where torch.distributed is not initialised."""
    return dist.get_rank() if _distributed() else 0


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, without gradient; a new tensor, the argument is left as it was."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total
