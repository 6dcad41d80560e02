"""First-order linear recurrence over a packed axis: y_m = a_m y_{m-1} + x_m, as a blocked scan.

Two uses: smoothing of concepts, z~_m = g_m z_m + (1 - g_m) z~_{m-1} (Eq. 11 names it, H-Net Eq. 5 gives the form),
and the causal running sum of a document (a = 1). A segment's first coefficient is exactly 0: a gate clamped to
1 - 1e-4 would leak the previous document.

The closed form by cumulative products underflows after some ten concepts. Here the axis is cut into blocks of `BLOCK`;
inside a block the decay between every pair of positions is a product of at most `BLOCK` coefficients in [0, 1], so it
can only underflow where the true weight is nil, and applying it is a matrix product. The carries of the blocks are
the same recurrence, 1/BLOCK as long, solved by the same function. No loop over positions.

The backward is the recurrence run in reverse: dx_m = dy_m + a_{m+1} dx_{m+1} and da_m = <dx_m, y_{m-1}>.
Shapes: a (M,), x (M, E), computed in x's dtype, which callers keep at fp32 or wider.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


def _scan(a: Tensor, x: Tensor, ones: Tensor | None = None) -> Tensor:
    """ones: (BLOCK, BLOCK), below the diagonal zeros; the same for every level."""
    size, width = x.shape
    if size == 0:
        return x.clone()
    blocks = -(-size // BLOCK)
    if padding := blocks * BLOCK - size:
        a, x = F.pad(a, (0, padding)), F.pad(x, (0, 0, 0, padding))
    a, x = a.reshape(blocks, BLOCK), x.reshape(blocks, BLOCK, width)

    # decay[b, i, j] = a_{j+1} ... a_i for i >= j: ones up to the diagonal, then the running product down each column.
    ones = x.new_ones(BLOCK, BLOCK).triu() if ones is None else ones
    decay = torch.where(ones == 0, a[:, :, None], ones).cumprod(1).tril()
    inner = decay @ x  # (blocks, BLOCK, width)
    if blocks > 1:
        entering = a.cumprod(1)  # (blocks, BLOCK) what is left, at each position, of the block before
        carry = _scan(entering[:-1, -1], inner[:-1, -1], ones)  # (blocks - 1, width) y at each block's last position
        inner[1:] += entering[1:, :, None] * carry[:, None, :]
    return inner.view(blocks * BLOCK, width)[:size]


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        y = _scan(a, x)
        ctx.save_for_backward(a, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        a, y = ctx.saved_tensors
        following = F.pad(a[1:], (0, 1))  # (M,) a_{m+1}
        dx = _scan(following.flip(0), grads[0].flip(0)).flip(0)
        da = None
        if ctx.needs_input_grad[0]:
            da = (dx * F.pad(y[:-1], (0, 0, 1, 0))).sum(1)
        return da, dx


def linear_scan(a: Tensor, x: Tensor) -> Tensor:
    """y_m = a_m y_{m-1} + x_m with y_0 = 0. a (M,) in [0, 1], x (M, E), equal floating dtypes; returns (M, E)."""
    if a.dtype != x.dtype:
        raise ValueError(f"linear_scan: a is {a.dtype}, x is {x.dtype}; give both the same dtype")
    return _LinearScan.apply(a, x)
