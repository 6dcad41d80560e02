"""Attention kernels of a GPU against the definition, with what the model gives them."""

from __future__ import annotations

import pytest
import torch

from dlcm_lightning.ops.attention import BACKENDS, FLASH, why_not
from dlcm_lightning.ops.flex import FLEX
from dlcm_lightning.ops.segments import Segments

HEAD_DIM = 64
DOCUMENTS = {"one": [700], "thirty": [1 + 7 * k % 101 for k in range(30)], "ones": [1] * 64,
             "blocks": [128, 256, 100, 28]}


def outcome(backend: str, heads: int, kv_heads: int, segments: Segments, device: torch.device, dtype: torch.dtype
            ) -> list[torch.Tensor]:
    """Output and gradients; queries, keys and values are views of one array, as some callers have them."""
    tokens = int(segments.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, HEAD_DIM, generator=generator).to(torch.bfloat16)
    joined = qkv.to(device, dtype).requires_grad_()
    query, key, value = joined.split((heads, kv_heads, kv_heads), dim=1)
    if backend == "flex" and not FLEX.knows(query, key):  # which else is varlen
        FLEX.prime(tokens, heads, kv_heads, HEAD_DIM, dtype, device)
    out = BACKENDS[backend](query, key, value, segments.to(device))
    weights = torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(device, dtype)
    return [out.detach(), *torch.autograd.grad(out, [joined], weights)]


@pytest.mark.parametrize("backend", ["flex", "varlen", *FLASH, "sdpa"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 3), (4, 1)])
@pytest.mark.parametrize("slack", [0, 300], ids=["exact", "bound"])
def test_equals_the_definition_and_itself(backend: str, documents: str, heads: int, kv_heads: int, slack: int,
                                          cuda: torch.device) -> None:
    """slack: by how much the longest document is overestimated."""
    if reason := why_not(backend, cuda, torch.bfloat16):
        pytest.skip(reason)
    lengths = DOCUMENTS[documents]
    exact = Segments.from_lengths(lengths)
    segments = Segments(exact.cu_seqlens, exact.max_seqlen + slack)
    expected = outcome("reference", heads, kv_heads, exact, torch.device("cpu"), torch.float64)
    first = outcome(backend, heads, kv_heads, segments, cuda, torch.bfloat16)
    for one, other in zip(first, expected, strict=True):
        assert ((one.double().cpu() - other).norm() / other.norm()).item() < 1e-2
    for _ in range(20):
        again = outcome(backend, heads, kv_heads, segments, cuda, torch.bfloat16)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
