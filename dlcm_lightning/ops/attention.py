"""Causal attention within the segments of a packed axis, behind one signature.

Every attention of the model is this one operation: self-attention of a token stack (documents over tokens), of the
backbone (documents over concepts), and cross-attention, whose keys are replicated per token beforehand (Eq. 17), so
that query i and key i always sit at the same place. The backends take equal arguments and are compared with each
other by test; which one runs is chosen once, by `choose_backend`, and named in the log.

    flex       torch's FlexAttention, compiled for the length of the token axis; varlen on any other (GPU)
    varlen     torch's own varlen kernel (GPU)
    flash4     FlashAttention 4 (Hopper, Blackwell; extra `flash4`)
    flash3     FlashAttention 3 (Ampere, Hopper; built from source)
    flash      FlashAttention 2 (Ampere and later; extra `gpu`)
    sdpa       scaled_dot_product_attention over documents grouped by length: exact, and no loop over documents
    reference  one document at a time, the whole score matrix in memory: the oracle, and the fallback in float64

The `sdpa` backend pads each document to a multiple of `BUCKET` and runs one call per padded length. Padding stands at
the end, where causality hides it, so no mask is needed and the cost follows sum(length^2), not (sum length)^2. On a
CPU, documents up to `SHORT` positions take explicit batched products instead: torch's CPU kernel works in blocks that
short documents do not fill, and `python -m benchmarks.attention` shows by how much it loses.

Axes: T tokens (or concepts), H query heads, K key-value heads, d head width.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcm_lightning.config import AttentionBackend, ConfigError
from dlcm_lightning.ops.flex import FLEX
from dlcm_lightning.ops.segments import Segments

BUCKET = 32
"""Positions to whose multiple `sdpa` pads a document: fewer distinct shapes against less padding."""

SHORT = 1024
"""Padded length up to which a CPU keeps a document's whole score matrix."""


def _optional(module: str, name: str) -> Callable[..., Any] | None:
    """A function of an optional package, or None where it cannot be imported, for whatever reason: packages that
    compile themselves meet versions of others that they were not made for."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:
        return None


_torch_varlen = _optional("torch.nn.attention.varlen", "varlen_attn")
_torch_varlen_parameters = frozenset(inspect.signature(_torch_varlen).parameters) if _torch_varlen else frozenset()


@dataclass(frozen=True)
class FlashAttention:
    """A release of FlashAttention as a backend. CUDA, fp16 or bf16.

    Its packages name the arguments that all know alike, but not in the same order. None asks for torch's deterministic
    mode; unless it is told, each adds up the gradient of the queries in any order.
    """

    package: str
    module: str
    capabilities: range
    """Major compute capabilities whose backward can be deterministic."""

    @functools.cached_property
    def kernel(self) -> Callable[..., Any] | None:
        """None where the package is not installed. Imported when it is asked for: the fourth takes half a second."""
        return _optional(self.module, "flash_attn_varlen_func")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        assert self.kernel is not None
        cuts, longest = segments.cu_seqlens, segments.max_seqlen
        out = self.kernel(query, key, value, cu_seqlens_q=cuts, cu_seqlens_k=cuts, max_seqlen_q=longest,
                          max_seqlen_k=longest, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
        return out[0] if isinstance(out, tuple) else out  # with the logarithms of the sums


AMPERE, NEWEST = 8, 100
"""Major compute capabilities; torch's own kernels come with new cards."""
FLASH: dict[str, FlashAttention] = {
    "flash4": FlashAttention("flash-attn-4", "flash_attn.cute", range(9, 12)),
    "flash3": FlashAttention("flash-attn-3", "flash_attn_interface", range(8, 10)),
    "flash": FlashAttention("flash-attn", "flash_attn", range(AMPERE, 13)),
}


def varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """torch's varlen kernel. CUDA, fp16 or bf16. Older releases spell causality `is_causal` and know no GQA."""
    assert _torch_varlen is not None
    options: dict[str, Any] = {}
    if "window_size" in _torch_varlen_parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in _torch_varlen_parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    else:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return _torch_varlen(query, key, value, segments.cu_seqlens, segments.cu_seqlens, segments.max_seqlen,
                         segments.max_seqlen,
                         **options)


def flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """FlexAttention for shapes that it was primed for, `varlen` for others."""
    return (FLEX if FLEX.knows(query, key) else varlen)(query, key, value, segments)


class _ShortCausal(torch.autograd.Function):
    """Causal attention of equally long documents by batched products, scores kept for the backward.

    query (B, repeats * L, d), key and value (B, L, d), B = documents x key-value heads: the query heads that share a
    key head are stacked along the rows, so that grouped keys are neither copied nor summed over afterwards.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = key.shape[1]
        future = torch.full((length, length), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
        bias = future.repeat(query.shape[1] // length, 1)
        weights = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights = ctx.saved_tensors
        grad_weights = grads[0] @ value.transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_scores *= query.shape[-1] ** -0.5
        grad_value = weights.transpose(1, 2) @ grads[0]
        return grad_scores @ key, grad_scores.transpose(1, 2) @ query, grad_value


def _short_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (n, L, H, d), key and value (n, L, K, d) -> (n, L, H, d)."""
    documents, length, heads, width = query.shape
    kv_heads = key.shape[2]
    q = query.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(documents * kv_heads, -1, width)
    k, v = (x.transpose(1, 2).reshape(documents * kv_heads, length, width) for x in (key, value))
    out = _ShortCausal.apply(q, k, v).view(documents, kv_heads, -1, length, width)
    return out.permute(0, 3, 1, 2, 4).reshape(documents, length, heads, width)


def _sdpa_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (n, L, H, d), key and value (n, L, K, d) -> (n, L, H, d)."""
    grouped = query.shape[2] != key.shape[2]
    if grouped and query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
        # Of torch's kernels that know groups only one takes these dtypes there, and it keeps the map of all positions.
        repeats = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
        grouped = False
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """scaled_dot_product_attention over documents grouped by padded length. Any device and dtype."""
    starts = segments.cu_seqlens.long()
    lengths = starts[1:] - starts[:-1]
    padded = (lengths + BUCKET - 1) // BUCKET * BUCKET  # (N,)
    padded_sorted, order = padded.sort(stable=True)
    sizes, counts = (column.tolist() for column in torch.unique_consecutive(padded_sorted, return_counts=True))
    total = sum(size * count for size, count in zip(sizes, counts, strict=True))

    # One gather lays the documents out by padded length; a padding slot repeats its document's last position.
    places = Segments(torch.cat([padded_sorted.new_zeros(1), padded_sorted.cumsum(0)]), sizes[-1])
    document = order[places.ids(total)]  # (total,)
    offset = places.positions(total)
    source = starts[document] + torch.minimum(offset, lengths[document] - 1)
    real = offset < lengths[document]
    back = torch.empty(query.shape[0], dtype=torch.long, device=query.device)
    back[source[real]] = real.nonzero().squeeze(1)

    outputs = []
    grouped = [tensor.index_select(0, source) for tensor in (query, key, value)]
    begin = 0
    for size, count in zip(sizes, counts, strict=True):
        q, k, v = (tensor[begin:begin + size * count].unflatten(0, (count, size)) for tensor in grouped)
        causal = _short_causal if query.device.type == "cpu" and size <= SHORT else _sdpa_causal
        outputs.append(causal(q, k, v).flatten(0, 1))
        begin += size * count
    return torch.cat(outputs).index_select(0, back)


def reference(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """One document at a time with an explicit score matrix. Any device and dtype; slow."""
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    bounds = segments.cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        q = query[begin:end].transpose(0, 1)  # (H, L, d)
        k, v = (x[begin:end].repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {
    "flex": flex,
    "varlen": varlen,
    **FLASH,
    "sdpa": sdpa,
    "reference": reference,
}


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on this device in this dtype, or None where it can."""
    if backend in ("flex", "varlen", *FLASH):
        if device.type != "cuda":
            return f"it needs a CUDA device, this is {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it needs bf16, this is {dtype}"
        if backend in FLASH and FLASH[backend].kernel is None:
            return f"the package {FLASH[backend].package} is not installed"
        if backend not in FLASH and _torch_varlen is None:
            return "this torch has no torch.nn.attention.varlen"
        has = torch.cuda.get_device_capability(device)
        needs = FLASH[backend].capabilities if backend in FLASH else range(AMPERE, NEWEST)
        if has[0] not in needs:
            most = f" to {needs[-1]}" if needs[-1] < NEWEST - 1 else " or more"
            return f"it needs compute capability {needs[0]}{most}, this card has {has[0]}.{has[1]}"
    return None


def choose_backend(wanted: AttentionBackend, device: torch.device, dtype: torch.dtype, *, begun: str = "",
                   compiled: bool = False) -> str:
    """The backend to run: the one that is asked for, or the fastest that this machine has. begun: what a run has begun
    with, which `auto` keeps where it can. compiled: whether `auto` may choose what torch.compile has to make.

    Raises ConfigError where the one asked for cannot run here, with the reason and what can.
    """
    if wanted == "auto":
        if begun in BACKENDS and why_not(begun, device, dtype) is None:
            return begun
        return next(name for name in BACKENDS if (compiled or name != "flex") and why_not(name, device, dtype) is None)
    if reason := why_not(wanted, device, dtype):
        others = [name for name in BACKENDS if why_not(name, device, dtype) is None]
        raise ConfigError(f"model.attention = {wanted!r}: {reason}; here run: {', '.join(others)}, or auto")
    return wanted


def attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, backend: str) -> Tensor:
    """Causal softmax attention within segments, scale 1/sqrt(d).

    query (T, H, d), key and value (T, K, d), K divides H; returns (T, H, d) in the dtype of the query.
    """
    return BACKENDS[backend](query, key, value, segments)
