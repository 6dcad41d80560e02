"""Ranks, sums over them that mean the same in one process and in many, and words between hosts.

Numbers of the loss travel with the tensors' own backend. Words (objects, decisions, errors) travel between the hosts,
over gloo, so that no device is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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


class Hosts:
    """Words between the processes of a run. Made by all of them at the same point."""

    def __init__(self) -> None:
        self.ranks, self.rank = world_size(), rank()
        self._group = dist.new_group(backend="gloo") if self.ranks > 1 else None

    def gather(self, word: T) -> list[T]:
        """Of every rank, in their order."""
        if self._group is None:
            return [word]
        words: list[Any] = [None] * self.ranks
        dist.all_gather_object(words, word, group=self._group)
        return words

    def largest(self, number: int) -> int:
        """Over all ranks."""
        if self._group is None:
            return number
        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def first(self, ask: Callable[[], T]) -> T:
        """What rank 0 answers, on all ranks; what it raises, all raise."""
        word: list[Any] = [None, None]
        if self.rank == 0:
            try:
                word[0] = ask()
            except Exception as error:
                word[1] = error
        if self._group is not None:
            dist.broadcast_object_list(word, 0, group=self._group)
        if word[1] is not None:
            raise word[1]
        answer: T = word[0]
        return answer
