"""Products with weights that are stored in fp32 and multiplied in the dtype of what they are multiplied with.

The gradient of a weight is a sum over all positions. A GPU adds it up in fp32 in any case; asked for it in fp32, it
neither rounds it to bf16 nor has it converted by another kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDENING = {"cuda"}
"""Devices whose products of bf16 can be had in fp32."""


def _wide_product(left: Tensor, dtype: torch.dtype) -> bool:
    return left.device.type in WIDENING and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16)


def transposed_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left (T, O), right (T, I), equal dtypes -> left^T right (O, I) in `dtype`."""
    if _wide_product(left, dtype):
        return torch.mm(left.t(), right, out_dtype=dtype)
    return (left.t() @ right).to(dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (O, I) += left^T right."""
    if _wide_product(left, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, total.dtype, out=total)
    elif left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, low: Tensor | None) -> Tensor:
        low = weight.to(x.dtype) if low is None else low
        ctx.save_for_backward(x, low)
        ctx.weight_dtype = weight.dtype
        return torch.nn.functional.linear(x, low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, low = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = (grads[0] @ low) if ctx.needs_input_grad[0] else None
        grad_weight = transposed_product(grad, x.flatten(0, -2), ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def mixed_linear(x: Tensor, weight: Tensor, low: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I) of any float dtype -> x weight^T (..., O) in the dtype of x. low: the weight in that
    dtype, where there is one already; the gradient is the weight's all the same."""
    if not torch.is_grad_enabled():  # decoding is many small products: an autograd function costs as much as one
        return torch.nn.functional.linear(x, weight.to(x.dtype) if low is None else low)
    return _MixedLinear.apply(x, weight, low)


class LowCopies:
    """Weights in the dtype that they are multiplied in, made by one kernel an optimizer step instead of by one at every
    use. A copy counts as long as its weight is the one that it was made of."""

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        """weights: stored in another dtype, and staying where they are."""
        self.weights = weights
        self.copies = [torch.empty_like(one, dtype=dtype, requires_grad=False) for one in weights]
        self.versions: list[int] = []
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """After the weights have changed."""
        torch._foreach_copy_(self.copies, self.weights)
        self.versions = [one._version for one in self.weights]

    def of(self, number: int) -> Tensor | None:
        """Of the weight of that number; None where somebody has changed it since."""
        return self.copies[number] if self.weights[number]._version == self.versions[number] else None
