"""Rotary position embeddings, counted within the segment: tokens in the token stacks, concepts in the backbone.

Halves are paired (x[:d/2] with x[d/2:], as LLaMA checkpoints on the hub are laid out). Turning by these angles is a
function of `fused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
