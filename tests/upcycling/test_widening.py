"""A wider stack computes the same several times over, exactly; and its copies learn different things."""

from __future__ import annotations

import pytest
import torch

from dlcm_lightning.model import mup
from dlcm_lightning.model.layers import Stack, StackShape
from dlcm_lightning.model.mup import Role
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.upcycling import widening
from dlcm_lightning.upcycling.source import PIECES, Shape, layer_name
from dlcm_lightning.upcycling.widening import widen

EXACT = 1e-10
LAYERS = 2
SHAPE = Shape(layers=LAYERS, width=12, heads=4, kv_heads=2, head_dim=6, ffn=20, vocab_size=9, norm_epsilon=1e-5,
              rope_base=100.0)
DOCUMENTS = Segments.from_lengths([7, 4])
MULTIPLES = [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)]


def stack(times: int = 1, units: int = 1) -> Stack:
    shape = StackShape(LAYERS, times * SHAPE.width, times * SHAPE.heads, times * SHAPE.kv_heads, SHAPE.head_dim,
                       units * SHAPE.ffn, SHAPE.norm_epsilon, SHAPE.rope_base, Role.CONCEPT)
    return Stack(shape, final_norm=False).double()


@pytest.fixture
def narrow() -> Stack:
    torch.manual_seed(0)
    made = stack()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.5)
    return made


def widened(narrow: Stack, times: int, units: int) -> Stack:
    made = stack(times, units)
    owners = dict(mup.role_parameters(made))
    for layer in range(LAYERS):
        for within in PIECES:
            name = layer_name("x", layer, within).removeprefix("x.")
            value = narrow.state_dict()[name]
            with torch.no_grad():
                owners[name].weight.copy_(widen(within, value, SHAPE, times, units, seed=layer))
    return made


def apart(narrow: Stack, wide: Stack, times: int) -> float:
    x = torch.randn(11, SHAPE.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        once, several = narrow(x, DOCUMENTS, "reference"), wide(torch.cat([x] * times, 1), DOCUMENTS, "reference")
    assert several.shape == (11, times * SHAPE.width)
    return ((several - torch.cat([once] * times, 1)).abs().max() / once.abs().max()).item()


@pytest.mark.parametrize(("times", "units"), MULTIPLES)
def test_a_repeated_vector_gives_the_repeated_result(narrow: Stack, times: int, units: int) -> None:
    assert apart(narrow, widened(narrow, times, units), times) < EXACT


def test_without_the_division_it_does_not(narrow: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widening, "reading_copies", lambda matrix, copies, _: torch.cat([matrix] * copies, 1))
    assert apart(narrow, widened(narrow, 2, 2), 2) > 0.1


@pytest.mark.parametrize(("times", "units"), [(2, 2), (2, 1), (1, 2)])
def test_copies_get_gradients_of_their_own(narrow: Stack, times: int, units: int,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the noise, copies of heads and units would stay equal for ever."""

    def distance() -> float:
        wide = widened(narrow, times, units)
        x = torch.randn(11, times * SHAPE.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        wide(x, DOCUMENTS, "reference").square().sum().backward()
        block = wide.layers[0]
        if units > 1:
            gradient = block.ffn.gate_up.weight.grad[: units * SHAPE.ffn]
            one, other = gradient[: SHAPE.ffn], gradient[SHAPE.ffn: 2 * SHAPE.ffn]
        else:
            rows = SHAPE.heads * SHAPE.head_dim
            one, other = block.attention.qkv.weight.grad[:rows], block.attention.qkv.weight.grad[rows: 2 * rows]
        return ((one - other).norm() / one.norm()).item()

    assert distance() > 0.1
    monkeypatch.setattr(widening, "SPREAD", 0.0)
    assert distance() < EXACT
