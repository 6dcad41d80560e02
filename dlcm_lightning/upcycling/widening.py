"""Layers of a width, made into layers of k times the width that compute the same, k times over.

    narrow:  x (T, D) -> y          wide:  [x, x, ...] (T, k D) -> [y, y, ...]

Everything is repeated in blocks: the width k times, heads and key-value heads k times, units of the feed-forward f
times. A matrix that reads m copies of what it read is repeated m times along its inputs and divided by m; RMSNorm of a
repeated vector is the repeated norm, and a rotary angle depends on the place within a head, which does not move
(Net2Net, arXiv 1511.05641, for these blocks).

Copies that are equal in all they read and in all that reads them get equal gradients and stay equal for ever. So noise
is added to what reads copies, with a mean of exactly zero over the copies: the function does not see it, the gradients
do. Splitting in unequal shares would not serve, since AdamW divides the scale of a gradient out.

Axes of matrices: rows are outputs, columns inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcm_lightning.upcycling.source import Shape

SPREAD = 0.5
"""Standard deviation of the noise, as a share of that of the divided matrix. An assumption, not measured."""


def rows_of(tensor: Tensor, times: int) -> Tensor:
    """Outputs repeated in blocks; of a vector, its entries."""
    return torch.cat([tensor] * times)


def reading_copies(matrix: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """(O, I) -> (O, copies I): reads a repeated vector as `matrix` reads it once."""
    if copies == 1:
        return matrix
    part = matrix / copies
    noise = torch.randn(copies, *matrix.shape, generator=generator, dtype=matrix.dtype) * (SPREAD * part.std())
    return torch.cat(list(part + noise - noise.mean(0)), dim=1)


def widen(within: str, tensor: Tensor, shape: Shape, times: int, units: int, seed: int) -> Tensor:
    """A tensor of a layer, by its name within the layer, `times` as wide and with `units` times as many units in its
    feed-forward. shape: of the narrow one. fp64 inside. seed: of the noise."""
    generator = torch.Generator().manual_seed(seed)
    wide = tensor.double()
    if within.endswith("norm.weight"):
        return rows_of(wide, times)
    if within == "attention.qkv.weight":
        heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        wide = torch.cat([rows_of(part, times) for part in wide.split([heads, kv_heads, kv_heads])])
        return reading_copies(wide, times, generator)
    if within == "ffn.gate_up.weight":
        wide = torch.cat([rows_of(part, units) for part in wide.chunk(2)])
        return reading_copies(wide, times, generator)
    return reading_copies(rows_of(wide, times), units if within == "ffn.down.weight" else times, generator)
