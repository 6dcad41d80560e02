"""FlexAttention over documents: the definition's result, blocks that are exactly those with a score, one graph.

torch's kernel needs a GPU; what runs here is its definition, through the same call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as library

from dlcm_lightning.model import priming
from dlcm_lightning.ops import attention, flex
from dlcm_lightning.ops.flex import BLOCK, Flex, causal_within
from dlcm_lightning.ops.segments import Segments
from tests import varlen_cpu
from tests.steps import CONFIG, Steps

SIZE = 768
MIXES = ([700, 68], [300, 400, 68], [768], [128] * 6, [1] * 768, [127, 129, 1, 511], [256, 512])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounter]:
    """Counts graphs, and runs them op by op."""
    counter = CompileCounter()
    honest = torch.compile
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)  # no backward on a CPU, it says; but op by op
    monkeypatch.setattr(torch, "compile", lambda function, **_: honest(function, backend=counter, fullgraph=True,
                                                                       dynamic=False))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_blocks_are_those_that_have_a_score_and_full_ones_need_no_mask(lengths: list[int]) -> None:
    segments = Segments.from_lengths(lengths)
    made = causal_within(segments, SIZE)
    ids = segments.ids(SIZE)
    seen = (torch.arange(SIZE)[:, None] >= torch.arange(SIZE)) & (ids[:, None] == ids)
    blocks = seen.view(SIZE // BLOCK, BLOCK, SIZE // BLOCK, BLOCK)
    assert torch.equal(made.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    full = torch.zeros(SIZE // BLOCK, SIZE // BLOCK, dtype=torch.bool)
    assert made.full_kv_num_blocks is not None and made.full_kv_indices is not None
    for row, (count, which) in enumerate(zip(made.full_kv_num_blocks[0, 0], made.full_kv_indices[0, 0], strict=True)):
        full[row, which[:count].long()] = True
    assert torch.equal(full, blocks.all(3).all(1))
    transposed = library.BlockMask.from_kv_blocks(
        made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices, BLOCK, made.mask_mod)
    assert transposed.q_num_blocks is not None and made.q_num_blocks is not None
    assert torch.equal(made.q_num_blocks, transposed.q_num_blocks)


def test_equals_the_definition_in_one_graph_whatever_the_documents(compiler: CompileCounter) -> None:
    generator = torch.Generator().manual_seed(0)
    run = Flex()
    for lengths in MIXES:
        segments = Segments.from_lengths(lengths)
        query, key, value = (torch.randn(SIZE, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2))
        weights = torch.randn(SIZE, 4, 16, generator=generator)
        mine, theirs = run(query, key, value, segments), attention.reference(query, key, value, segments)
        torch.testing.assert_close(mine, theirs)
        for one, other in zip(*(torch.autograd.grad(out, (query, key, value), weights) for out in (mine, theirs)),
                              strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert compiler.frame_count == 1


def test_shapes_that_were_not_announced_go_to_the_varlen_kernel(
    compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of concepts is another one in every batch."""
    monkeypatch.setattr(flex, "FLEX", run := Flex())
    monkeypatch.setattr(attention, "FLEX", run)
    monkeypatch.setattr(attention, "varlen", attention.reference)
    run.prime(SIZE, 4, 2, 16, torch.float32, torch.device("cpu"))
    graphs = compiler.frame_count
    for size in (SIZE, 500, 501, SIZE, 700):
        query, key = (torch.randn(size, heads, 16) for heads in (4, 2))
        segments = Segments.from_lengths([size - 7, 7])
        torch.testing.assert_close(attention.flex(query, key, key, segments),
                                   attention.reference(query, key, key, segments))
    assert compiler.frame_count <= graphs + 1, "with gradients off, once"


def test_any_number_of_shapes_is_compiled(compiler: CompileCounter) -> None:
    """The compiler keeps eight graphs of one function, and ends the process at the ninth."""
    run = Flex()
    for blocks in range(1, 13):
        run.prime(BLOCK * blocks, 4, 2, 16, torch.float32, torch.device("cpu"))
    assert compiler.frame_count == 12


def test_what_a_model_gives_is_what_was_primed(compiler: CompileCounter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and strides, with gradients and without, whatever is computed again."""
    varlen_cpu.register()
    monkeypatch.setattr(priming, "FLEX", run := Flex())
    monkeypatch.setattr(attention, "FLEX", run)
    for recompute in ("none", "selective", "full"):
        config = replace(CONFIG, train=replace(CONFIG.train, recompute=recompute))  # type: ignore[arg-type]
        steps = Steps(config, torch.device("cpu"), torch.bfloat16, "flex")
        primed = compiler.frame_count
        steps.step(0)
        with torch.no_grad():
            steps.module.measure(steps.batches(1)[0], None)
        assert compiler.frame_count == primed >= 3


def test_blocks_are_never_those_of_the_kernel_for_decoding() -> None:
    """torch takes that one for fewer than 128 queries, whose blocks it chooses before ours replace them."""
    assert all(flex.kernel_options(width)["FORCE_USE_FLEX_ATTENTION"] for width in (16, 64, 128))
