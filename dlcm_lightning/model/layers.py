"""LLaMA blocks: pre-RMSNorm, rotary self-attention with grouped keys, SwiGLU, no biases.

Every stack of the model, and the dense baseline, is made of these. Blocks take numbers, not configs. Activations keep
the dtype they come in; norms compute at least in fp32. Query, key and value are one matrix, gate and up another: fewer
and larger products.

Axes: T positions of a packed axis (tokens or concepts), W width, H heads, K key-value heads, d head width, I FFN width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlcm_lightning.model.cache import KeyValues
from dlcm_lightning.model.mup import MupLinear, Role, RoleModule
from dlcm_lightning.ops.attention import attention
from dlcm_lightning.ops.fused import UsesKernels
from dlcm_lightning.ops.incremental import Extension, attend, causal_bias
from dlcm_lightning.ops.rope import Rotation, rotation
from dlcm_lightning.ops.segments import Segments


@dataclass(frozen=True)
class StackShape:
    """Numbers of one stack of blocks."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_epsilon: float
    rope_base: float
    role: Role
    """TOKEN or CONCEPT: what its hidden matrices are in the muP table."""
    branch_scale: float = 1.0
    """What every residual branch is multiplied by."""
    recompute: str = "none"
    """What a block runs again in the backward instead of keeping it: none, selective (the feed-forward), full."""


def norm_role(role: Role) -> Role:
    """The role of norms beside hidden matrices of `role`."""
    return Role.NORM_CONCEPT if role is Role.CONCEPT else Role.NORM_TOKEN


class RMSNorm(UsesKernels, RoleModule):
    """x / rms(x) * gain over the last axis, in at least fp32, returned in the dtype of x."""

    def __init__(self, role: Role, width: int, epsilon: float) -> None:
        super().__init__(role, width)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.epsilon)


class AddNorm(RMSNorm):
    """An RMSNorm of a sum that is needed too."""

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x + delta, and its norm; where there is no delta, x and its norm."""
        if delta is None:
            return x, super().forward(x)
        return self.kernels.add_norm(x, delta, self.weight, self.epsilon)


class BranchLinear(MupLinear):
    """The last matrix of a residual branch: y = scale x W^T."""

    def __init__(self, role: Role, fan_in: int, fan_out: int, scale: float) -> None:
        super().__init__(role, fan_in, fan_out)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.scale == 1 else y * self.scale


class SelfAttention(UsesKernels, nn.Module):
    """Causal attention within segments, rotary positions (T, W) -> (T, W)."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.qkv = MupLinear(shape.role, shape.width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.out = BranchLinear(shape.role, shape.heads * shape.head_dim, shape.width, shape.branch_scale)

    def forward(self, x: Tensor, segments: Segments, angles: Rotation, backend: str) -> Tensor:
        query, key, value = self._turned(x, angles)
        return self.out(attention(query, key, value, segments, backend).flatten(1))

    def extend(self, x: Tensor, new: Extension, angles: Rotation, cache: KeyValues, bias: Tensor | None, backend: str
               ) -> Tensor:
        """The same of new positions (N, W), which the cache is given. bias: of `attend`."""
        query, key, value = self._turned(x, angles)
        cache.write(key, value, new)
        if new.fresh:
            return self.out(attention(query, key, value, new.segments, backend).flatten(1))
        keys, values = (new.rows_of(one, new.longest) for one in (cache.keys, cache.values))
        return self.out(attend(query, keys, values, new, bias).flatten(1))

    def _turned(self, x: Tensor, angles: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (T, H + 2K, d)
        return self.kernels.rotate_split(qkv, angles.cos, angles.sin, self.heads, self.kv_heads)


class FeedForward(UsesKernels, nn.Module):
    """SwiGLU (T, W) -> (T, W)."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.gate_up = MupLinear(shape.role, shape.width, 2 * shape.ffn)
        self.down = BranchLinear(shape.role, shape.ffn, shape.width, shape.branch_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.swiglu(self.gate_up(x)))


class Block(nn.Module):
    """x + attention(norm x), then + ffn(norm x). The last sum is left to whoever is next, who reads it anyway."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        role = norm_role(shape.role)
        self.attention_norm = AddNorm(role, shape.width, shape.norm_epsilon)
        self.attention = SelfAttention(shape)
        self.ffn_norm = AddNorm(role, shape.width, shape.norm_epsilon)
        self.ffn = FeedForward(shape)
        self.recompute = shape.recompute

    def forward(self, x: Tensor, delta: Tensor | None, segments: Segments, angles: Rotation, backend: str
                ) -> tuple[Tensor, Tensor]:
        """x (T, W), and what the block before has to add to it -> the same of this block."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x, delta, segments, angles, backend)
        if delta is not None:
            x = x + delta  # one array is kept, not two
        if self.recompute == "full":
            return _recomputed(self._whole, x, None, segments, angles, backend)
        x = x + self.attention(self.attention_norm(x, None)[1], segments, angles, backend)
        return x, _recomputed(self._feed_forward, x)

    def _whole(self, x: Tensor, delta: Tensor | None, segments: Segments, angles: Rotation, backend: str
               ) -> tuple[Tensor, Tensor]:
        x, normed = self.attention_norm(x, delta)
        x, normed = self.ffn_norm(x, self.attention(normed, segments, angles, backend))
        return x, self.ffn(normed)

    def extend(self, x: Tensor, delta: Tensor | None, new: Extension, angles: Rotation, cache: KeyValues,
               bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        """`forward` of new positions; see `SelfAttention.extend`."""
        x, normed = self.attention_norm(x, delta)
        x, normed = self.ffn_norm(x, self.attention.extend(normed, new, angles, cache, bias, backend))
        return x, self.ffn(normed)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.ffn_norm(x, None)[1])


def _recomputed(run: Callable[..., Any], *arguments: Any) -> Any:
    """run(*arguments), of which the backward keeps the arguments only. Nothing in a block draws random numbers."""
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


class Stack(nn.Module):
    """Blocks over one packed axis, closed by a norm where `final_norm` says so."""

    def __init__(self, shape: StackShape, final_norm: bool) -> None:
        super().__init__()
        self.head_dim, self.rope_base = shape.head_dim, shape.rope_base
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = AddNorm(norm_role(shape.role), shape.width, shape.norm_epsilon) if final_norm else None

    def forward(self, x: Tensor, segments: Segments, backend: str) -> Tensor:
        """x (T, W), segments over T -> (T, W)."""
        size, width, base, dtype = x.shape[0], self.head_dim, self.rope_base, x.dtype
        angles = segments.once((rotation, size, width, base, dtype), lambda: rotation(
            segments.positions(size), width, base, dtype))  # stacks over one axis turn alike
        delta: Tensor | None = None
        for layer in self.layers:
            x, delta = layer(x, delta, segments, angles, backend)
        return self._closed(x, delta)

    def extend(self, x: Tensor, new: Extension, cache: list[KeyValues], backend: str) -> Tensor:
        """The same of new positions (N, W) after those in the caches, one a layer, which are given them."""
        angles = rotation(new.positions, self.head_dim, self.rope_base, x.dtype)
        bias = None if new.fresh else causal_bias(new, torch.promote_types(x.dtype, torch.float32))
        delta: Tensor | None = None
        for layer, own in zip(self.layers, cache, strict=True):
            assert isinstance(layer, Block)
            x, delta = layer.extend(x, delta, new, angles, own, bias, backend)
        return self._closed(x, delta)

    def _closed(self, x: Tensor, delta: Tensor | None) -> Tensor:
        if self.norm is not None:
            return self.norm(x, delta)[1]
        return x if delta is None else x + delta
