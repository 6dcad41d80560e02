"""Uniform numbers that are a function of a key and a position: the dice of the boundary, and of what is generated.

    u[b, i] = the upper 24 bits of splitmix64(key[b] + i x golden), as a float in [0, 1)

The key of a row is a hash of (seed, sample), so a token's number depends neither on the batch it came in nor on the
device: integers alone, in torch's wrapping int64. Where a shift would copy the sign, the copies are masked away.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shift to the right that moves zeros in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """keys (B,) int64 -> (B, count) float32 in [0, 1), 24 bits each, on the device of the keys."""
    return uniform_at(keys[:, None], torch.arange(count, device=keys.device))


def uniform_at(keys: Tensor, positions: Tensor) -> Tensor:
    """keys and positions int64, of shapes that go together -> float32 in [0, 1): u[key, position]."""
    values = keys + (positions + 1) * _GOLDEN
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return _shifted(values ^ _shifted(values, 31), 40).float() * 2.0**-24
