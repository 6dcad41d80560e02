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

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}
"""Logits held at a time. 16 MB in fp32 stay in a CPU's last cache, and below the size from which glibc returns freed
memory to the kernel; a GPU wants products that fill it."""


def _chunk_tokens(vocabulary: int, device: torch.device) -> int:
    return max(64, CHUNK_ELEMENTS.get(device.type, 2**26) // vocabulary // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, differentiate: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        low = weight.to(hidden.dtype)
        losses = torch.empty(targets.shape, dtype=wide, device=hidden.device)  # (T,)
        grad_hidden = torch.empty_like(hidden if differentiate else hidden[:0])
        grad_weight = torch.zeros_like(weight if differentiate else weight[:0], dtype=wide)
        step = _chunk_tokens(weight.shape[0], hidden.device)
        rows = torch.arange(min(step, hidden.shape[0]), device=hidden.device)
        for begin in range(0, hidden.shape[0], step):
            chunk, target = hidden[begin:begin + step], targets[begin:begin + step]
            counted = target >= 0
            picked = target.clamp(min=0)[:, None]
            logits = (chunk @ low.t()).to(wide).mul_(scale)  # (chunk, V)
            if not differentiate:
                loss = logits.logsumexp(-1) - logits.gather(1, picked).squeeze(1)
                losses[begin:begin + step] = torch.where(counted, loss, 0.0)
                continue
            # In place: logits become probabilities, then the gradient with respect to the logits.
            logits -= logits.amax(-1, keepdim=True)
            shifted = logits.gather(1, picked).squeeze(1)
            total = logits.exp_().sum(-1, keepdim=True)
            losses[begin:begin + step] = torch.where(counted, total.squeeze(1).log() - shifted, 0.0)
            factor = counted[:, None].to(wide) * scale
            logits *= factor / total
            logits[rows[:len(target)], picked.squeeze(1)] -= factor.squeeze(1)
            grad_logits = logits.to(hidden.dtype)
            grad_hidden[begin:begin + step] = grad_logits @ low
            grad_weight += grad_logits.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaled in fp32: rounding 1 / count to bf16 first would bend every gradient by the same quarter of a percent.
        scaled = (grad_hidden.to(grads[0].dtype) * grads[0]).to(grad_hidden.dtype)
        return scaled, (grad_weight * grads[0]).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of `targets` under softmax(scale * hidden weight^T).

    hidden (T, D), weight (V, D), targets (T,) int64, negative where nothing is predicted.
    Returns the sum over targets (a scalar that carries the gradient) and the terms (T,), zero where there is no
    target, for statistics only; both at least fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, torch.is_grad_enabled())
