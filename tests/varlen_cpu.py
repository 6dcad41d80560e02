"""A CPU kernel for torch's varlen operation, so that our call of it runs where there is no GPU.

torch ships the operation with CUDA kernels only. Registered here is the definition, one sequence at a time, refusing
what the real kernels refuse. It proves that the `varlen` backend passes the right arguments through torch's public
function, forward and backward; it proves nothing about the CUDA kernels.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor


def _attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, causal: bool) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for begin, end in pairwise(starts.tolist()):
        q = query[begin:end].transpose(0, 1)
        k, v = (x[begin:end].repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(1, 2) / query.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def _check(query: Tensor, key: Tensor, starts: Tensor, other: Tensor, longest: int, causal: bool) -> None:
    assert starts.dtype == torch.int32 and torch.equal(starts, other), "cumulative lengths are int32, alike for q and k"
    assert int(starts[-1]) == query.shape[0] == key.shape[0], "every row belongs to a sequence"
    assert int(starts.diff().max()) <= longest, "max_q and max_k bound the longest sequence"
    assert causal, "window (-1, 0) is causal"


def _forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, *rest):  # type: ignore[no-untyped-def]
    _check(query, key, cu_seq_q, cu_seq_k, min(max_q, max_k), is_causal)
    out = _attend(query, key, value, cu_seq_q, is_causal)
    return out, query.new_empty(query.shape[:2]), query.new_empty(2)


def _backward(grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, *rest):  # type: ignore[no-untyped-def]
    _check(query, key, cu_seq_q, cu_seq_k, min(max_q, max_k), is_causal)
    repeats, scale = query.shape[1] // key.shape[1], query.shape[-1] ** -0.5
    grads: tuple[list[Tensor], ...] = ([], [], [])
    for begin, end in pairwise(cu_seq_q.tolist()):
        q, g = (x[begin:end].transpose(0, 1) for x in (query, grad))  # (H, L, d)
        k, v = (x[begin:end].repeat_interleave(repeats, 1).transpose(0, 1) for x in (key, value))
        scores = (q @ k.transpose(1, 2) * scale)
        weights = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf")).softmax(-1)
        inner = g @ v.transpose(1, 2)
        slope = weights * (inner - (inner * weights).sum(-1, keepdim=True)) * scale
        for collected, whole in zip(grads, (slope @ k, slope.transpose(1, 2) @ q, weights.transpose(1, 2) @ g),
                                    strict=True):
            collected.append(whole.transpose(0, 1))
    shared = [torch.cat(part).unflatten(1, (-1, repeats)).sum(2) for part in grads[1:]]
    return torch.cat(grads[0]), *shared


@functools.cache
def register() -> None:
    """Once per process."""
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", _forward)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", _backward)
