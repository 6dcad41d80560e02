"""train.compile: no second graph of anything, whatever a batch holds; the numbers of eager kernels but for rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import scheduler
from torch._inductor.utils import sympy_product

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


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler asks of a norm's backward what it asks on a GPU, and fuses nothing."""
    question = scheduler.MixOrderReduction
    asked, is_gpu = question.__dict__["can_fuse"].__func__, scheduler._is_gpu_triton_backend

    def can_fuse(cls: Any, *nodes: Any) -> bool:
        scheduler._is_gpu_triton_backend = lambda *_: True
        try:
            asked(cls, *nodes)
        finally:
            scheduler._is_gpu_triton_backend = is_gpu
        return False

    def sizes(cls: Any, node: Any) -> tuple[Any, ...]:
        return tuple(sympy_product(one) if isinstance(one, list | tuple) else one for one in node.group[1])

    monkeypatch.setattr(question, "can_fuse", classmethod(can_fuse))
    monkeypatch.setattr(question, "get_numel_rnumel", classmethod(sizes))


@pytest.mark.skipif(not hasattr(scheduler, "_is_gpu_triton_backend"), reason="written against torch 2.13")
@pytest.mark.parametrize("asks", [False, True], ids=["as we compile", "as torch does"])
def test_a_gpus_compiler_does_not_ask_how_long_a_norm_is(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would compare the number of concepts with the width, and compile again for a batch on the other side."""
    as_on_a_gpu(monkeypatch)
    if asks:
        monkeypatch.setattr(fused, "compile_options", lambda: {})
    norm, width = fused.Compiled(fused.rms_norm, (0,)), 4096
    gain = torch.nn.Parameter(torch.ones(width))
    for length in (1000, 1100, 2000, 1300):
        norm(torch.zeros(length, width, dtype=torch.bfloat16, requires_grad=True), gain, 1e-5).sum().backward()
    assert (graphs() > 1) is asks


def test_the_options_that_a_compiler_has_are_used() -> None:
    known = torch._inductor.list_options()
    assert {"deterministic", "triton.mix_order_reduction"} <= set(known) or torch.__version__ < "2.11"
    assert all(fused.compile_options()[name] is value for name, value in
               (("deterministic", True), ("triton.mix_order_reduction", False)) if name in known)


def test_a_kernel_on_disk_that_was_made_for_other_lengths_is_not_taken(monkeypatch: pytest.MonkeyPatch,
                                                                      tmp_path: Path) -> None:
    """The compiler's own key has the axis and not its length, and blocks may follow the length."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = replace(small("fixed"), kind="dense", decoder_layers=1)

    def hits(tokens: int) -> int:
        fused.compiled.cache_clear()
        torch._dynamo.reset()
        counters.clear()
        assemble(config, torch.float32, "sdpa", "none", True).prime(tokens, torch.device("cpu"))
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

    assert [hits(256), hits(512)] == [0, 0]
    assert hits(256) > 3, "the same lengths"
