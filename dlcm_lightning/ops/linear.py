"""Products with weights that are stored in fp32 and multiplied in the dtype of what they are multiplied with.

The gradient of a weight is a sum over all positions. A GPU adds it up in fp32 in any case; asked for it in fp32, it
neither rounds it to bf16 nor has it converted by another kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _wide_product(left: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of `left` can be had in a wider dtype."""
    return left.is_cuda and dtype == torch.float32 and left.dtype in (torch.bfloat16, torch.float16)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low = weight.to(x.dtype)
        ctx.save_for_backward(x, low)
        ctx.weight_dtype = weight.dtype
        return torch.nn.functional.linear(x, low)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, low = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = (grads[0] @ low) if ctx.needs_input_grad[0] else None
        grad_weight = transposed_product(grad, x.flatten(0, -2), ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def mixed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., I), weight (O, I) of any float dtype -> x weight^T (..., O) in the dtype of x."""
    return _MixedLinear.apply(x, weight)
