"""Rotary position embeddings, counted within the segment: tokens in the token stacks, concepts in the backbone.

Halves are paired (x[:d/2] with x[d/2:], as LLaMA checkpoints on the hub are laid out). The rotation is orthogonal, so
its backward is the rotation by the opposite angle: nothing but the angles is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Angles of a packed axis, computed once per stack and shared by its layers."""

    cos: Tensor
    """(T, 1, d/2), at least fp32."""
    sin: Tensor
    """(T, 1, d/2), at least fp32."""


def rotation(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Rotation:
    """positions (T,) int64 within their segment -> angles position * base^(-2i/d), i < d/2."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.double()[:, None, None] * base**-exponents
    working = torch.promote_types(dtype, torch.float32)
    return Rotation(angles.cos().to(working), angles.sin().to(working))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """x (T, heads, d) turned by its positions' angles, in its own dtype."""
    return _Rotate.apply(x, angles.cos, angles.sin)
