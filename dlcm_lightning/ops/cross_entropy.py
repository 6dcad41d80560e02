"""Cross-entropy of a linear head that never holds the (T, V) logits of the whole batch.

With 128,815 ids the logits of one 8192-token row are 4 GB in fp32, several times all activations of the body. The head
is therefore run over chunks of tokens, and since the loss is a sum whose gradient scales with one number, the gradient
is computed while a chunk's logits exist: three matrix products in all, none repeated in the backward.

Sums are fp32 (or wider). Axes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcm_lightning.ops.fused import EAGER, Kernels
from dlcm_lightning.ops.linear import add_product

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
"""Logits held at a time. 16 MB in fp32 stay in a CPU's last cache, and below the size from which glibc returns freed
memory to the kernel; a GPU wants products that fill it."""


VOCABULARY_MULTIPLE = {"cuda": 128}
"""What V is rounded up to inside: rows of 128,815 numbers start where no tensor core can read them."""


def padded_vocabulary(vocabulary: int, device: torch.device) -> int:
    """Rows of the head's weight as it is multiplied."""
    return vocabulary + -vocabulary % VOCABULARY_MULTIPLE.get(device.type, 1)


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time."""
    return max(64, CHUNK_ELEMENTS.get(device.type, 2**26) // vocabulary // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, differentiate: bool, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        vocabulary, width = weight.shape
        low = hidden.new_zeros(padded_vocabulary(vocabulary, hidden.device), width)  # rows of padding stay zero
        low[:vocabulary].copy_(weight)
        losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)  # (T,)
        grad_hidden = torch.empty_like(hidden if differentiate else hidden[:0])
        grad_weight = torch.zeros(low.shape if differentiate else (0, width), dtype=wide, device=hidden.device)
        step = chunk_tokens(vocabulary, hidden.device)
        for begin in range(0, hidden.shape[0], step):
            chunk, target = hidden[begin:begin + step], targets[begin:begin + step]
            logits = chunk @ low.t()  # (chunk, padded V), then their gradient; padding columns are zero as either
            losses[begin:begin + step] = kernels.softmax_gradient(logits[:, :vocabulary], target, scale, differentiate)
            if differentiate:
                grad_hidden[begin:begin + step] = logits @ low
                add_product(grad_weight, logits, chunk)
        ctx.save_for_backward(grad_hidden, grad_weight[:vocabulary])
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaled in fp32: rounding 1 / count to bf16 first would bend every gradient by the same quarter of a percent.
        scaled = (grad_hidden.to(grads[0].dtype) * grads[0]).to(grad_hidden.dtype)
        return scaled, (grad_weight * grads[0]).to(ctx.weight_dtype), None, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0,
                         kernels: Kernels = EAGER) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of `targets` under softmax(scale * hidden weight^T).

    hidden (T, D), weight (V, D), targets (T,) int64, negative where nothing is predicted.
    Returns the sum over targets (a scalar that carries the gradient) and the terms (T,), zero where there is no
    target, for statistics only; both at least fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, torch.is_grad_enabled(), kernels)
