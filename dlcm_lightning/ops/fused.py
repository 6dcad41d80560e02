"""What stands between the matrix products of a block, each as one function that `torch.compile` turns into one kernel.

A product and an attention are kernels of libraries already; what is left of a block is reading and writing memory, and
written out op by op it reads and writes everything many times. `Kernels` names these functions. `EAGER` runs them op by
op, on any device; `compiled()` runs the same functions through torch.compile (`train.compile`).

Only functions without parameters are compiled, not modules: what an engine hangs onto a module (gathering a weight,
cutting it, counting gradients) stays outside of every graph, and each engine runs the same kernels.

The length of the packed axis, the first of every tensor here, changes with every batch. It is marked dynamic, all other
sizes are constants; a graph of its own is kept for each combination of those, so that none is ever compiled twice.
A kernel's blocks may follow the first length that it is compiled for, and the sums over the packed axis (the gain of a
norm) with them. So a compiled run compiles everything for one length that is always the same before its first step, and
a run that is resumed computes what it computed: `prime`.

Axes: T positions of a packed axis (tokens, concepts, or rows of the head), W width, H heads, K key-value heads, d head
width, I FFN width, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x (T, ..., W), gain (W,) -> x / rms(x) * gain over the last axis, computed in at least fp32, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, (x.shape[-1],), gain.to(wide.dtype), epsilon).to(x.dtype)


def add_norm(x: Tensor, delta: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x and delta (T, W), gain (W,) -> their sum, and its `rms_norm`."""
    total = x + delta
    return total, rms_norm(total, gain, epsilon)


def _activated(joined: Tensor) -> Tensor:
    gate, up = joined.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input: the activation is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> Tensor:
        ctx.save_for_backward(joined)
        return _activated(joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (joined,) = ctx.saved_tensors
        gate, up = joined.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate) * grads[0]], dim=-1)


def swiglu(joined: Tensor) -> Tensor:
    """joined (T, 2 I), gate in front of up -> silu(gate) * up (T, I)."""
    return _SwiGLU.apply(joined) if torch.is_grad_enabled() else _activated(joined)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, d), its halves as pairs, turned by angles (T, 1, d / 2)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)  # else torch 2.11 gives it no gradient


def _parts(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.split((heads, kv_heads, kv_heads), dim=1)
    return _turned(query, cos, sin), _turned(key, cos, sin), value


class _RotateSplit(torch.autograd.Function):
    """The rotation is orthogonal, so its backward is the rotation by the opposite angle: only the angles are kept."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
                ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key, value = _parts(qkv, cos, sin, heads, kv_heads)
        return query, key, value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        joined = torch.cat([_turned(grads[0], cos, -sin), _turned(grads[1], cos, -sin), grads[2]], dim=1)
        return joined, None, None, None, None


def rotate_split(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (T, H + 2K, d), cos and sin (T, 1, d / 2) -> turned queries (T, H, d), turned keys, and values (T, K, d)."""
    if not torch.is_grad_enabled():
        return _parts(qkv, cos, sin, heads, kv_heads)
    return _RotateSplit.apply(qkv, cos, sin, heads, kv_heads)


def softmax_gradient(logits: Tensor, targets: Tensor, scale: float, differentiate: bool) -> Tensor:
    """Cross-entropy of rows of logits, which become its gradient with respect to them where `differentiate` is true.

    logits (T, V) in any float dtype, to be multiplied by `scale`; targets (T,) int64, negative where nothing is
    predicted. Returns (T,) at least fp32, 0 where there is no target.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).mul_(scale)
    counted, picked = targets >= 0, targets.clamp(min=0)[:, None]
    wide -= wide.amax(-1, keepdim=True)
    shifted = wide.gather(1, picked).squeeze(1)
    total = wide.exp_().sum(-1, keepdim=True)
    if differentiate:
        factor = counted[:, None].to(wide.dtype) * scale
        wide *= factor / total
        logits.copy_(wide.scatter_(1, picked, wide.gather(1, picked) - factor))
    return torch.where(counted, total.squeeze(1).log() - shifted, 0.0)


def softmax_gradient_in_two_passes(logits: Tensor, own: Tensor, targets: Tensor, scale: float, differentiate: bool
                                   ) -> Tensor:
    """The same as it compiles best: one pass over the logits for maximum and sum, one that overwrites them. own: (T, 1)
    the logit of each target, any where there is none; gathered in here, torch 2.11 reads what was overwritten."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    counted, picked = targets >= 0, targets.clamp(min=0)[:, None]
    highest = wide.amax(-1, keepdim=True)
    total = (wide - highest).exp().sum(-1, keepdim=True)
    shifted = (own.to(wide.dtype) * scale - highest).squeeze(1)
    if differentiate:
        here = torch.arange(logits.shape[1], device=logits.device) == picked
        gradient = (wide - highest).exp() / total - here.to(wide.dtype)
        logits.copy_(gradient * (counted[:, None].to(wide.dtype) * scale))
    return torch.where(counted, total.squeeze(1).log() - shifted, 0.0)


@dataclass(frozen=True)
class Kernels:
    """The functions of this file, run one way or the other."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    rotate_split: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor]]
    softmax_gradient: Callable[[Tensor, Tensor, float, bool], Tensor]


EAGER = Kernels(rms_norm, add_norm, swiglu, rotate_split, softmax_gradient)


class UsesKernels:
    """Mixed into modules that do."""

    kernels: Kernels = EAGER


class Compiled:
    """A function of tensors whose first axis is the packed one, but for vectors of other lengths, and of constants."""

    def __init__(self, function: Callable[..., Any], packed: tuple[int, ...]) -> None:
        """packed: which arguments are tensors along the packed axis."""
        self.function, self.packed = function, packed
        self.graphs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        """A compiled function by what is constant in it."""

    def __call__(self, *arguments: Any) -> Any:
        first = arguments[self.packed[0]]
        if first.shape[0] < 2:  # a length that the compiler takes for a constant
            return self.function(*arguments)
        constants = (torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad
                                                     for one in arguments),
                     *((one.shape[1:], one.stride()[1:], one.dtype, one.device) if isinstance(one, Tensor) else one
                       for one in arguments))
        if (run := self.graphs.get(constants)) is None:
            run = self.graphs[constants] = torch.compile(copy_of(self.function), fullgraph=True, dynamic=False,
                                                         options=compile_options())
        for number in self.packed:
            torch._dynamo.mark_dynamic(arguments[number], 0)
        return run(*arguments)


def copy_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """With a code object of its own: the compiler keeps its graphs by code object, and looks through all of them."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__,
                              function.__defaults__, function.__closure__)


def compile_options() -> dict[str, Any]:
    """No choice by timing: two processes, or two lives of one, must choose alike. And none by the length of the packed
    axis: whether the two sums of a norm's backward become one kernel, a GPU's compiler would decide by comparing it
    with the width, and compile again for a batch on the other side."""
    wanted = {"deterministic": True, "triton.mix_order_reduction": False}
    return {name: value for name, value in wanted.items() if name in torch._inductor.list_options()}


@functools.cache
def compiled() -> Kernels:
    """One for the whole process, as the compiler's caches are."""
    two_passes = Compiled(softmax_gradient_in_two_passes, (0, 1, 2))

    def softmax(logits: Tensor, targets: Tensor, scale: float, differentiate: bool) -> Tensor:
        own = logits.gather(1, targets.clamp(min=0)[:, None])
        return two_passes(logits, own, targets, scale, differentiate)

    return Kernels(Compiled(rms_norm, (0,)), Compiled(add_norm, (0, 1)), Compiled(swiglu, (0,)),
                   Compiled(rotate_split, (0, 1, 2)), softmax)
