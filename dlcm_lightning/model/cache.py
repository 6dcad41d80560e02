"""What a model remembers of sequences while it decodes: one row of every array belongs to one *slot*.

    encoder, decoder   keys and values of every token, by layer
    boundary           the previous query, and the running sum that centres features
    open concept       sum of the states of the tokens that no concept has closed over yet
    backbone           keys and values of every concept, by layer
    smoothed           the newest smoothed concept
    memory             keys and values of the cross-attention, once a concept, and the token that closed each

A dense model has a decoder alone. How many tokens, concepts and open tokens a slot has is known on the host. Arrays are
made once and written in place; where a sequence outgrows them, they are made twice as long.

Axes: S slots, K key-value heads, C positions that a slot can hold, d head width, D token width, E concept width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dlcm_lightning.ops.incremental import Extension

FAR = 2**40
"""Where a concept lies that is not there."""


@dataclass
class Arrays:
    """Tensors whose first axis is the slot."""

    def tensors(self) -> list[Tensor]:
        return [getattr(self, one.name) for one in fields(self)]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Slots `sources` (n,) to slots `targets` (n,), all read before one is written."""
        for tensor in self.tensors():
            tensor[targets] = tensor[sources]


@dataclass
class KeyValues(Arrays):
    """Of one attention."""

    keys: Tensor
    """(S, K, C, d)."""
    values: Tensor
    """(S, K, C, d)."""

    @staticmethod
    def empty(slots: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
              ) -> KeyValues:
        keys, values = (torch.zeros(slots, kv_heads, capacity, head_dim, dtype=dtype, device=device) for _ in range(2))
        return KeyValues(keys, values)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def write(self, key: Tensor, value: Tensor, new: Extension) -> None:
        """key and value (N, K, d) of the new positions."""
        slots = new.slot_index[new.owner]
        self.keys[slots, :, new.positions] = key
        self.values[slots, :, new.positions] = value

    def grow(self, capacity: int) -> None:
        self.keys, self.values = (_longer(one, 2, capacity, 0) for one in (self.keys, self.values))


@dataclass
class ConceptMemory(KeyValues):
    """Of the cross-attention: one position a concept."""

    closing: Tensor
    """(S, C) int64: the token that closed each concept; FAR where there is none."""

    def grow(self, capacity: int) -> None:
        super().grow(capacity)
        self.closing = _longer(self.closing, 1, capacity, FAR)


@dataclass
class BoundaryState(Arrays):
    """What the next decision needs of the tokens before it."""

    previous: Tensor
    """(S, D) at least fp32: the query of the last token; for form `rule` its state."""
    sums: Tensor
    """(S, D) at least fp32: of the states of all tokens; not used where features are not centred."""


@dataclass
class ConceptState(Arrays):
    """The concept that is open, and the newest one that is closed."""

    open_sums: Tensor
    """(S, D) at least fp32: of the states of the tokens since the last boundary."""
    smoothed: Tensor
    """(S, E) at least fp32: the newest smoothed concept."""


class DecodingState:
    """Everything that a model remembers of the sequences in its slots. Made by `LanguageModel.new_state`."""

    def __init__(self, slots: int, encoder: list[KeyValues], decoder: list[KeyValues], backbone: list[KeyValues],
                 memory: ConceptMemory | None = None, boundary: BoundaryState | None = None,
                 concept: ConceptState | None = None) -> None:
        self.tokens = [0] * slots
        """Tokens that each slot has seen."""
        self.concepts = [0] * slots
        """Concepts that it has closed."""
        self.open_tokens = [0] * slots
        """Tokens since its last boundary."""
        self.encoder, self.decoder, self.backbone = encoder, decoder, backbone
        self._memory, self._boundary, self._concept = memory, boundary, concept

    @property
    def slots(self) -> int:
        return len(self.tokens)

    @property
    def memory(self) -> ConceptMemory:
        assert self._memory is not None, "a dense model has no concepts"
        return self._memory

    @property
    def boundary(self) -> BoundaryState:
        assert self._boundary is not None, "a dense model has no boundaries"
        return self._boundary

    @property
    def concept(self) -> ConceptState:
        assert self._concept is not None, "a dense model has no concepts"
        return self._concept

    def arrays(self) -> Iterator[Arrays]:
        yield from (*self.encoder, *self.decoder, *self.backbone)
        yield from (one for one in (self._memory, self._boundary, self._concept) if one is not None)

    def reset(self, slots: Sequence[int]) -> None:
        """These slots are as new, whatever was in them."""
        for slot in slots:
            read = self.tokens[slot], self.concepts[slot]
            self.tokens[slot] = self.concepts[slot] = self.open_tokens[slot] = 0
            # What is masked is multiplied by zero, and zero times what is not a number is none.
            for caches, count in (((*self.encoder, *self.decoder), read[0]), (self.backbone, read[1])):
                for cache in caches if count else ():
                    cache.keys[slot, :, :count] = cache.values[slot, :, :count] = 0
            if self._memory is not None:
                self.memory.keys[slot, :, : read[1]] = self.memory.values[slot, :, : read[1]] = 0
                self.memory.closing[slot] = FAR
                self.boundary.sums[slot] = 0
                self.concept.open_sums[slot] = self.concept.smoothed[slot] = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Slots `targets` go on from where `sources` are; all are read before one is written."""
        for counts in (self.tokens, self.concepts, self.open_tokens):
            for target, value in zip(targets, [counts[source] for source in sources], strict=True):
                counts[target] = value
        device = (self.decoder[0]).keys.device
        where = [torch.tensor(list(one), device=device) for one in (sources, targets)]
        for arrays in self.arrays():
            arrays.copy(*where)

    def reserve_tokens(self, longest: int) -> None:
        """There is room for so many tokens in every slot."""
        for one in (*self.encoder, *self.decoder):
            if one.capacity < longest:
                one.grow(max(longest, 2 * one.capacity))

    def reserve_concepts(self, longest: int) -> None:
        """There is room for so many concepts in every slot."""
        for one in (*self.backbone, self.memory):
            if one.capacity < longest:
                one.grow(max(longest, 2 * one.capacity))

    @property
    def bytes(self) -> int:
        """What all arrays take."""
        return sum(one.numel() * one.element_size() for arrays in self.arrays() for one in arrays.tensors())


def _longer(tensor: Tensor, axis: int, length: int, filling: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([tensor, tensor.new_full(shape, filling)], axis)
