"""Kernels through torch.compile give what they give op by op, gradients too, in every release of torch.

Releases have differed: 2.11 gave no gradient to what a function returns unchanged by a cast, and read logits that had
been overwritten.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dlcm_lightning.ops import fused
from dlcm_lightning.ops.fused import EAGER, compiled
from tests.gpu.test_ops import distances, outcome

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["norm", "added", "swiglu", "turned", "head"])
def test_compiled_equals_fp64(name: str, dtype: torch.dtype, bound: float) -> None:
    expected = outcome(name, EAGER, CPU, torch.float64)
    assert max(distances(outcome(name, compiled(), CPU, dtype), expected)) < bound


@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("vocabulary", [61, 64, 1003])
def test_losses_are_of_the_logits_and_not_of_what_they_become(vocabulary: int, differentiate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, vocabulary, generator=generator)
    targets = torch.randint(-30, vocabulary, (200,), generator=generator)
    mine, theirs = logits.clone(), logits.clone()
    loss = compiled().softmax_gradient(mine, targets, 0.5, differentiate)
    torch.testing.assert_close(loss, EAGER.softmax_gradient(theirs, targets, 0.5, differentiate))
    if differentiate:
        torch.testing.assert_close(mine, theirs)
