"""Ranks, sums over them that mean the same in one process and in many, and messages between the hosts.

Numbers of the loss travel with the tensors' own backend. Objects, decisions and errors travel between the hosts, over
gloo, so that no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""That one rank may come to a collective later than another."""


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


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """`tensor` of rank `source`, into the tensors of all."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def wait_alike() -> None:
    """Every group that there is by now waits as long as that of all ranks. Meshes of FSDP2 and DeepSpeed make groups of
    their own, to which torch gives ten minutes under NCCL whatever the first was given."""
    if _distributed():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)


class ControlGroup:
    """The processes of a run, speaking to each other. Made by all of them at the same point."""

    def __init__(self) -> None:
        self.ranks, self.rank = world_size(), rank()
        self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if self.ranks > 1 else None

    def gather(self, one: T) -> list[T]:
        """Of every rank, in their order."""
        if self._group is None:
            return [one]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, one, group=self._group)
        return found

    def all_reduce_max(self, number: int) -> int:
        """The largest of all ranks."""
        if self._group is None:
            return number
        value = torch.tensor([number], device="cpu")
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def on_rank_zero(self, act: Callable[[], T]) -> T:
        """What rank 0 finds, on all ranks; what it raises, all raise."""
        found: list[Any] = [None, None]
        if self.rank == 0:
            try:
                found[0] = act()
            except Exception as error:
                found[1] = error
        if self._group is not None:
            dist.broadcast_object_list(found, 0, group=self._group)
        if found[1] is not None:
            raise found[1]
        answer: T = found[0]
        return answer

    def on_all(self, act: Callable[[], T]) -> T:
        """What every rank finds for itself; what one raises, all raise, so that nobody waits for who has left."""
        found: Any = None
        mine: Exception | None = None
        try:
            found = act()
        except Exception as error:
            mine = error
        errors = self.gather(mine)
        if mine is not None:
            raise mine
        for number, one in enumerate(errors):
            if one is not None:
                raise type(one)(f"rank {number}: {one}") from one
        answer: T = found
        return answer
