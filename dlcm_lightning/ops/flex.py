"""torch's FlexAttention over documents: one kernel for forward and backward each, the same bits every time.

The deterministic backward of torch's varlen kernel (FlashAttention 2) gives every document and head to few blocks, and
takes 1.9 times as long as this one on an H200 for documents of 8,192 tokens (`python -m benchmarks.attention`).
FlexAttention is compiled for one length of the axis. The token axis has one; that of concepts changes with every batch.
So a shape has to be announced (`prime`), before the first step of a run; any other is for the varlen kernel.

Which blocks of 128 x 128 scores there are at all, and which need no mask, follows from the documents at the ends of
blocks: documents are consecutive, so that two tokens of one document have nothing but that document between them.
torch's own `create_block_mask` looks at every score instead, two to four milliseconds a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dlcm_lightning.ops.fused import compile_options, copy_of
from dlcm_lightning.ops.segments import Segments

BLOCK = 128


def kernel_options(head_dim: int) -> dict[str, Any]:
    """Of torch's kernel. Every query sees at least itself; under 128 queries torch would take its kernel for decoding,
    which these blocks are not for; the scale may be multiplied into the queries where it is a power of two; and for
    heads of 64 the forward's blocks are those that were fastest on an H200 (0.65 ms instead of 0.93 for a document of
    8,192 tokens and 24 heads)."""
    options: dict[str, Any] = {"ROWS_GUARANTEED_SAFE": True, "FORCE_USE_FLEX_ATTENTION": True}
    if head_dim in (16, 64, 256):
        options["PRESCALE_QK"] = True
    if head_dim == 64:
        options |= {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_stages": 3, "fwd_num_warps": 4}
    return options


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """dense (n, n) bool -> (1, 1, n) int32 how many blocks are true in each row, (1, 1, n, n) int32 which, true ones in
    front."""
    which = dense.int().argsort(dim=-1, descending=True, stable=True)
    return dense.sum(-1, dtype=torch.int32)[None, None], which.int()[None, None]


def causal_within(segments: Segments, size: int) -> BlockMask:
    """Query i sees key j <= i of the same segment; `size` is the length of the axis."""
    ids = segments.ids(size)  # (size,)
    begin = torch.arange(0, size, BLOCK, device=ids.device)
    first, last = ids[begin], ids[(begin + BLOCK - 1).clamp(max=size - 1)]  # (n,) segments at the ends of each block
    block = torch.arange(len(begin), device=ids.device)
    row, column = block[:, None], block[None, :]  # of queries, of keys
    full = (column < row) & (first[None, :] == last[:, None])
    partial = (column <= row) & (last[None, :] >= first[:, None]) & ~full

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[query] == ids[key])

    (kv_number, kv_which), (q_number, q_which) = _ordered(partial), _ordered(partial.t())
    (full_kv_number, full_kv_which), (full_q_number, full_q_which) = _ordered(full), _ordered(full.t())
    return BlockMask(
        seq_lengths=(size, size), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask,
        kv_num_blocks=kv_number, kv_indices=kv_which, q_num_blocks=q_number, q_indices=q_which,
        full_kv_num_blocks=full_kv_number, full_kv_indices=full_kv_which,
        full_q_num_blocks=full_q_number, full_q_indices=full_q_which)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, grouped: bool, options: Any) -> Tensor:
    out: Tensor = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=options)
    return out


class Flex:
    """The compiled kernels of this process, by shape."""

    def __init__(self) -> None:
        self.shapes: set[tuple[Any, ...]] = set()
        """That have been announced."""
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        """A compiled function each, since the compiler ends a process that has compiled one function eight times."""
        self._mask: tuple[Tensor, BlockMask] | None = None
        """Of the last documents that were asked for, which a whole micro-batch shares."""

    @staticmethod
    def shape_of(query: Tensor, key: Tensor) -> tuple[Any, ...]:
        return tuple(query.shape), tuple(key.shape), query.dtype, query.device

    def knows(self, query: Tensor, key: Tensor) -> bool:
        """Whether it takes arrays like these."""
        return self.shape_of(query, key) in self.shapes

    def prime(self, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
              ) -> None:
        """Takes arrays of this shape from now on; compiles what gradients, as they are on or off, need."""
        grad, documents = torch.is_grad_enabled(), Segments.from_lengths([tokens], device)
        query, key, value = (torch.zeros(tokens, number, head_dim, dtype=dtype, device=device, requires_grad=grad)
                             for number in (heads, kv_heads, kv_heads))
        out = self(query, key, value, documents)
        if grad:
            torch.autograd.grad(out, (query, key, value), torch.zeros_like(out))
        else:  # values are then a part of the joint projection (`rotate_split`)
            joined = torch.zeros(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
            self(query, key, joined[:, heads + kv_heads:], documents)
        self.shapes.add(self.shape_of(query, key))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """query (T, H, d), key and value (T, K, d) -> (T, H, d)."""
        if self._mask is None or self._mask[0] is not segments.cu_seqlens:
            self._mask = segments.cu_seqlens, causal_within(segments, query.shape[0])
        q, k, v = (one.transpose(0, 1)[None] for one in (query, key, value))
        differentiates = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        kind = (differentiates, torch.is_inference_mode_enabled(),
                *((one.shape, one.stride(), one.dtype, one.device) for one in (q, k, v)))
        if (run := self._graphs.get(kind)) is None:
            run = self._graphs[kind] = torch.compile(copy_of(_attend), fullgraph=True, dynamic=False,
                                                     options=compile_options())
        out = run(q, k, v, self._mask[1], query.shape[1] != key.shape[1], kernel_options(query.shape[-1]))
        return out[0].transpose(0, 1)


FLEX = Flex()
