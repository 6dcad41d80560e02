"""Products with weights of another dtype."""

from __future__ import annotations

import torch

from dlcm_lightning.ops.linear import LowCopies, add_product, mixed_linear, transposed_product
from tests.ops.test_ops import gradients, random


def close(one: torch.Tensor, other: torch.Tensor, bound: float = 1e-11) -> None:
    assert ((one - other).norm() / other.norm()).item() < bound


def test_equals_a_product_with_the_cast_weight() -> None:
    x, weight = random(2, 5, 7).bfloat16().requires_grad_(), random(3, 7, seed=1).float().requires_grad_()
    mine, theirs = mixed_linear(x, weight), x @ weight.bfloat16().t()
    assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)
    for one, other in zip(gradients(mine, (x, weight)), gradients(theirs, (x, weight)), strict=True):
        assert one.dtype == other.dtype
        close(one.double(), other.double(), 1e-2)


def test_copies_give_the_same_bits_and_count_only_while_their_weight_stays() -> None:
    weights = [random(3, 7, seed=seed).float().requires_grad_() for seed in range(2)]
    copies = LowCopies(list(weights), torch.bfloat16)
    x = random(5, 7).bfloat16()
    for number, weight in enumerate(weights):
        low = copies.of(number)
        assert low is not None
        plain, copied = mixed_linear(x, weight), mixed_linear(x, weight, low)
        assert torch.equal(plain, copied)
        assert torch.equal(*(torch.autograd.grad(one.sum(), weight)[0] for one in (plain, copied)))
    with torch.no_grad():
        weights[0].add_(1)  # as an average of weights that a callback puts in their place
    assert copies.of(0) is None and copies.of(1) is not None
    copies.refresh()
    low = copies.of(0)
    assert low is not None and torch.equal(low, weights[0].bfloat16())


def test_products_of_transposed_arrays_add_up() -> None:
    left, right = random(9, 4), random(9, 5, seed=1)
    close(transposed_product(left, right, torch.float64), left.t() @ right)
    total = torch.ones(4, 5, dtype=torch.float64)
    add_product(total, left, right)
    close(total, 1 + left.t() @ right)
    mixed = torch.ones(4, 5)
    add_product(mixed, left.bfloat16(), right.bfloat16())
    close(mixed.double(), 1 + left.t() @ right, 2e-2)
