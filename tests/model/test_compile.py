"""train.compile: no second graph of anything, whatever a batch holds; the numbers of eager kernels but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.model.dlcm import LanguageModel, assemble
from dlcm_lightning.ops import fused
from dlcm_lightning.ops.segments import Segments
from tests import reference as oracle
from tests.model.conftest import SMALL, small

TOKENS = 256
BATCHES = ([256], [100, 3, 153], [2] * 128, [250, 6], [1, 254, 1], [64] * 4)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled yet."""
    fused.compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def build(config: ModelConfig, dtype: torch.dtype, recompute: str, compile_kernels: bool) -> LanguageModel:
    model = assemble(config, dtype, "sdpa", recompute, compile_kernels)
    model.load_state_dict(oracle.random_state(config, seed=3), strict=config.kind == "dlcm")
    return model


def outcome(model: LanguageModel, lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Loss, all gradients in one vector, number of concepts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab_size, (TOKENS,), generator=generator)
    noise = torch.rand(TOKENS, generator=generator)
    model.zero_grad()
    output = model(tokens, Segments.from_lengths(lengths), noise, tokens)
    output.nll_sum.backward()
    grads = torch.cat([one.grad.double().flatten() for one in model.parameters() if one.grad is not None])
    return output.nll_sum.detach().double(), grads, len(output.concepts) if output.concepts is not None else 0


def test_one_graph_a_kernel_whatever_a_batch_holds_and_the_numbers_of_eager_kernels() -> None:
    config = small("both", target_ratio=4.0)
    mine, theirs = (build(config, torch.float32, "none", compiled) for compiled in (True, False))
    mine.prime(TOKENS, torch.device("cpu"))
    primed, concepts = graphs(), set()
    assert primed > 10
    for seed, lengths in enumerate(BATCHES):
        one, other = (outcome(model, lengths, seed) for model in (mine, theirs))
        concepts.add(one[2])
        assert one[2] == other[2]
        assert ((one[0] - other[0]) / other[0]).abs() < ROUNDING[torch.float32]
        assert (one[1] - other[1]).norm() / other[1].norm() < ROUNDING[torch.float32]
        with torch.no_grad():
            mine(torch.zeros(TOKENS, dtype=torch.long), Segments.from_lengths(lengths))
    assert len(concepts) == len(BATCHES), "as many different numbers of concepts"
    assert graphs() == primed, "priming has met everything that a step meets"


def test_a_length_that_is_not_dynamic_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(torch._dynamo, "mark_dynamic", lambda *_: None)
    config = replace(small("both", target_ratio=4.0), encoder_layers=1, backbone_layers=1, decoder_layers=1)
    model = build(config, torch.float32, "none", True)
    outcome(model, BATCHES[0], 0)
    before = graphs()
    outcome(model, BATCHES[1], 1)
    assert graphs() > before


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_bf16_rounds_as_much_as_bf16_does(recompute: str) -> None:
    config = replace(SMALL, kind="dense", decoder_layers=2)
    exact = outcome(build(config, torch.float32, "none", False), BATCHES[1], 0)
    found: dict[bool, Any] = {compiled: outcome(build(config, torch.bfloat16, recompute, compiled), BATCHES[1], 0)
                              for compiled in (True, False)}
    apart = {compiled: ((one[1] - exact[1]).norm() / exact[1].norm()).item() for compiled, one in found.items()}
    assert apart[True] < ROUNDING[torch.bfloat16] and apart[True] < 1.2 * apart[False]
