"""Every operation on a GPU: what a CPU computes in fp64, its gradients too, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dlcm_lightning.ops.cross_entropy import linear_cross_entropy
from dlcm_lightning.ops.fused import EAGER, Kernels, compiled
from dlcm_lightning.ops.linear import LowCopies, add_product, mixed_linear
from dlcm_lightning.ops.noise import uniform
from dlcm_lightning.ops.pool_and_replicate import mean_pool, replicate
from dlcm_lightning.ops.rope import rotation
from dlcm_lightning.ops.scan import linear_scan
from dlcm_lightning.ops.segments import Concepts, Segments, concepts_from_boundaries

TOKENS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 1000, 96, 4, 2, 64, 1003
REPETITIONS = 20


def concepts(device: torch.device) -> Concepts:
    generator = torch.Generator().manual_seed(0)
    documents = Segments.from_lengths([400, 1, 599])
    boundaries = torch.rand(TOKENS, generator=generator) < 0.25
    boundaries[documents.cu_seqlens[:-1].long()] = True
    return concepts_from_boundaries(boundaries.to(device), documents.to(device))


def scan(kernels: Kernels, a: Tensor, x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear_scan(a.sigmoid().to(wide), x.to(wide))


def pooled(kernels: Kernels, x: Tensor) -> Tensor:
    return mean_pool(x, concepts(x.device))


def replicated(kernels: Kernels, x: Tensor) -> Tensor:
    found = concepts(x.device)
    return replicate(x[:len(found)], found)


def norm(kernels: Kernels, x: Tensor, gain: Tensor) -> Tensor:
    return kernels.rms_norm(x, gain, 1e-5)


def added(kernels: Kernels, x: Tensor, delta: Tensor, gain: Tensor) -> Tensor:
    return torch.cat(kernels.add_norm(x, delta, gain, 1e-5))


def swiglu(kernels: Kernels, x: Tensor) -> Tensor:
    return kernels.swiglu(x)


def turned(kernels: Kernels, x: Tensor) -> Tensor:
    angles = rotation(torch.arange(TOKENS, device=x.device), HEAD_DIM, 10_000.0, x.dtype)
    return torch.cat(kernels.rotate_split(x, angles.cos, angles.sin, HEADS, KV_HEADS), dim=1)


def product(kernels: Kernels, x: Tensor, weight: Tensor) -> Tensor:
    return mixed_linear(x, weight)


def accumulated(kernels: Kernels, left: Tensor, right: Tensor) -> Tensor:
    """What the head does with the gradient of its weight, chunk by chunk."""
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
            ctx.save_for_backward(left, right)
            total = torch.zeros(left.shape[1], right.shape[1], device=left.device,
                                dtype=torch.promote_types(left.dtype, torch.float32))
            for part, other in zip(left.split(300), right.split(300), strict=True):
                add_product(total, part, other)
            return total

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            left, right = ctx.saved_tensors
            low = grads[0].to(left.dtype)
            return right @ low.t(), left @ low

    return Sum.apply(left, right)


def copied(kernels: Kernels, x: Tensor, weight: Tensor) -> Tensor:
    low = LowCopies([weight], x.dtype).of(0)
    assert low is not None
    return mixed_linear(x, weight, low)


def head(kernels: Kernels, hidden: Tensor, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(-30, VOCABULARY, (TOKENS,), generator=generator).to(hidden.device)
    return linear_cross_entropy(hidden, weight, targets, 0.5, kernels)[0]


OPS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "scan": (scan, ((TOKENS,), (TOKENS, WIDTH))),
    "pooled": (pooled, ((TOKENS, WIDTH),)),
    "replicated": (replicated, ((TOKENS, WIDTH),)),
    "norm": (norm, ((TOKENS, WIDTH), (WIDTH,))),
    "added": (added, ((TOKENS, WIDTH), (TOKENS, WIDTH), (WIDTH,))),
    "swiglu": (swiglu, ((TOKENS, 2 * WIDTH),)),
    "turned": (turned, ((TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM),)),
    "product": (product, ((TOKENS, WIDTH), (2 * WIDTH, WIDTH))),
    "copied": (copied, ((TOKENS, WIDTH), (2 * WIDTH, WIDTH))),
    "accumulated": (accumulated, ((TOKENS, WIDTH), (TOKENS, 2 * WIDTH))),
    "head": (head, ((TOKENS, WIDTH), (VOCABULARY, WIDTH))),
}
WEIGHTS = {"norm": 1, "added": 2, "product": 1, "copied": 1, "head": 1}
"""Which argument is a weight, stored in fp32 whatever is computed in."""


def outcome(name: str, kernels: Kernels, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients."""
    op, shapes = OPS[name]
    generator = torch.Generator().manual_seed(2)
    inputs = []
    for number, shape in enumerate(shapes):
        stored = dtype if WEIGHTS.get(name) != number else torch.promote_types(dtype, torch.float32)
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
        inputs.append(value.to(device, stored).requires_grad_())
    out = op(kernels, *inputs)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def distances(mine: list[Tensor], theirs: list[Tensor]) -> Iterator[float]:
    for one, other in zip(mine, theirs, strict=True):
        yield ((one.double().cpu() - other.double().cpu()).norm() / other.double().cpu().norm()).item()


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPS)
def test_equals_the_cpu_in_fp64_and_itself(name: str, dtype: torch.dtype, bound: float, kernels: str,
                                           cuda: torch.device) -> None:
    chosen = EAGER if kernels == "eager" else compiled()
    expected = outcome(name, EAGER, torch.device("cpu"), torch.float64)
    first = outcome(name, chosen, cuda, dtype)
    assert max(distances(first, expected)) < bound
    for _ in range(REPETITIONS):
        again = outcome(name, chosen, cuda, dtype)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_noise_is_the_same_number(cuda: torch.device) -> None:
    keys = torch.randint(-2**62, 2**62, (7,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(uniform(keys, 500), uniform(keys.to(cuda), 500).cpu())


def test_concepts_are_the_same_whole_numbers(cuda: torch.device) -> None:
    mine, theirs = concepts(cuda), concepts(torch.device("cpu"))
    for name in ("closing", "lengths", "owner", "newest"):
        assert torch.equal(getattr(mine, name).cpu(), getattr(theirs, name)), name
    assert torch.equal(mine.documents.cu_seqlens.cpu(), theirs.documents.cu_seqlens)
