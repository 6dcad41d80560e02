"""New positions of sequences whose beginnings a cache holds, and attention from them to everything so far.

A packed batch says where its documents begin. Here some documents, *rows*, are continued: row r has `before[r]`
positions in the cache, in slot `slots[r]`, and some new ones, which lie end to end like documents of a packed batch. A
prompt is a row with nothing before it, a decoding step a row of one new position. The same type describes tokens, and
concepts.

How many positions there are is known on the host; nothing here waits for a device.

Axes: n rows, N new positions of all rows together, S slots, C positions that a slot can hold, H heads, K key-value
heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dlcm_lightning.ops.segments import Segments


@dataclass(frozen=True)
class Extension:
    """What is new, and where it belongs."""

    slots: list[int]
    """Where the rows are in the cache."""
    counts: list[int]
    """New positions of each row, at least one."""
    before: list[int]
    """Positions of each row that are in the cache already."""
    slot_index: Tensor
    """(n,) int64: `slots`."""
    segments: Segments
    """The rows over the new positions."""
    owner: Tensor
    """(N,) int64: the row of each new position."""
    positions: Tensor
    """(N,) int64: the place of each new position in its sequence."""
    leading: bool
    """Whether the rows are the first slots in their order: then nothing has to be gathered."""

    @staticmethod
    def of(slots: list[int], before: list[int], counts: list[int], device: torch.device) -> Extension:
        """slots: one a row, none twice."""
        starts = list(accumulate(counts, initial=0))
        rows = torch.arange(len(slots), device="cpu")  # whatever torch's default device is
        owner = rows.repeat_interleave(torch.tensor(counts, device="cpu")) if max(counts) > 1 else rows
        offsets = torch.tensor([past - start for past, start in zip(before, starts, strict=False)], device="cpu")
        positions = torch.arange(starts[-1], device="cpu") + offsets[owner]
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cpu")
        return Extension(slots, counts, before, torch.tensor(slots, device="cpu").to(device),
                         Segments(cu_seqlens.to(device), max(counts)), owner.to(device), positions.to(device),
                         slots == list(range(len(slots))))

    @property
    def fresh(self) -> bool:
        """Whether all rows begin here: then they are a packed batch."""
        return not any(self.before)

    @property
    def single(self) -> bool:
        """Whether each row has one new position."""
        return self.segments.max_seqlen == 1

    @property
    def longest(self) -> int:
        """Positions of the longest row, its new ones included."""
        return max(past + count for past, count in zip(self.before, self.counts, strict=True))

    @property
    def firsts(self) -> Tensor:
        """(n,) int64: the first new position of every row."""
        return self.segments.cu_seqlens[:-1].long()

    @property
    def lasts(self) -> Tensor:
        """(n,) int64: its last."""
        return self.segments.cu_seqlens[1:].long() - 1

    def rows_of(self, cache: Tensor, length: int) -> Tensor:
        """cache (S, K, C, ...) -> (n, K, length, ...): what the rows have there."""
        return (cache[: len(self.counts)] if self.leading else cache.index_select(0, self.slot_index))[:, :, :length]

    def table(self) -> Tensor:
        """(n, P) int64, P the most new positions of a row: places in their sequences; beyond a row's own, those that
        would follow."""
        most = torch.arange(self.segments.max_seqlen, device=self.positions.device)
        return self.positions.index_select(0, self.firsts)[:, None] + most


def attend(query: Tensor, keys: Tensor, values: Tensor, new: Extension, bias: Tensor | None) -> Tensor:
    """Softmax attention of new positions over rows of a cache, scale 1/sqrt(d), weights at least in fp32.

    query (N, H, d); keys and values (n, K, L, d), K divides H; bias (n, P, L), -inf where a position may not look,
    None where all may look everywhere. Returns (N, H, d) in the dtype of the query.
    """
    rows, kv_heads, _, width = keys.shape
    most = new.segments.max_seqlen
    ragged = rows * most != query.shape[0]
    place = (new.owner, new.positions - new.positions.index_select(0, new.firsts)[new.owner]) if ragged else None
    if place is not None:
        laid = query.new_zeros(rows, most, *query.shape[1:])
        laid[place] = query
    else:
        laid = query.unflatten(0, (rows, most))
    q = laid.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (n, K, H / K, P, d)
    groups = q.shape[2]
    q = q.reshape(rows, kv_heads, groups * most, width)
    if query.is_cuda:
        mask = None if bias is None else bias.to(query.dtype)[:, None, None].expand(-1, 1, groups, -1, -1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=None if mask is None else mask.flatten(2, 3))
    else:
        scores = (q * width**-0.5) @ keys.transpose(2, 3)  # (n, K, H / K x P, L)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if bias is not None:
            scores = (scores.unflatten(2, (groups, most)) + bias[:, None, None]).flatten(2, 3)
        out = scores.softmax(-1).to(values.dtype) @ values
    out = out.unflatten(2, (groups, most)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (n, P, H, d)
    return out[place] if place is not None else out.flatten(0, 1)


def causal_bias(new: Extension, dtype: torch.dtype) -> Tensor | None:
    """(n, P, L) for `attend`: 0 where a position is not in the future, -inf where it is."""
    if new.single and len(set(new.before)) == 1:
        return None
    keys = torch.arange(new.longest, device=new.positions.device)
    return torch.zeros((), dtype=dtype, device=keys.device).masked_fill(keys > new.table()[..., None], float("-inf"))
