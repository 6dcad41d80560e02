"""Each operation against its definition, forward and gradient."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlcm_lightning.ops import attention as attention_module
from dlcm_lightning.ops import cross_entropy
from dlcm_lightning.ops.attention import BACKENDS, attention, choose_backend
from dlcm_lightning.ops.cross_entropy import linear_cross_entropy
from dlcm_lightning.ops.pool_and_replicate import mean_pool, replicate
from dlcm_lightning.ops.scan import linear_scan
from dlcm_lightning.ops.segments import Segments, concepts_from_boundaries
from tests import varlen_cpu

GENERATOR = torch.Generator()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR.manual_seed(seed)).requires_grad_()


def gradients(output: torch.Tensor, inputs: tuple[torch.Tensor, ...], seed: int = 99) -> tuple[torch.Tensor, ...]:
    direction = torch.randn(output.shape, dtype=output.dtype, generator=GENERATOR.manual_seed(seed))
    return torch.autograd.grad(output, inputs, direction)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_segments_know_their_pieces_and_refuse_empty_ones() -> None:
    segments = Segments.from_lengths([2, 1, 3])
    assert segments.ids(6).tolist() == [0, 0, 1, 2, 2, 2]
    assert segments.positions(6).tolist() == [0, 1, 0, 0, 1, 2]
    assert (len(segments), segments.max_seqlen) == (3, 3)
    for lengths in ([], [1, 0]):
        with pytest.raises(ValueError, match="segment lengths"):
            Segments.from_lengths(lengths)


def test_the_boundary_token_closes_its_concept_and_document_tails_are_pooled_by_nobody() -> None:
    #            <s> The cat sat on the | <s> a b
    boundaries = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    concepts = concepts_from_boundaries(boundaries, Segments.from_lengths([6, 3]))
    assert concepts.closing.tolist() == [0, 2, 4, 6]
    assert concepts.owner.tolist() == [0, 1, 1, 2, 2, -1, 3, -1, -1]
    assert concepts.lengths.tolist() == [1, 2, 2, 1]
    assert concepts.newest.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert concepts.documents.cu_seqlens.tolist() == [0, 3, 4]


def some_concepts() -> tuple[int, object]:
    boundaries = torch.rand(50, generator=GENERATOR.manual_seed(5)) < 0.3
    documents = Segments.from_lengths([20, 1, 29])
    boundaries[documents.cu_seqlens[:-1].long()] = True
    return 50, concepts_from_boundaries(boundaries, documents)


def test_mean_pool_and_replicate_equal_their_loops() -> None:
    size, concepts = some_concepts()
    x = random(size, 5)
    expected = torch.stack([x[concepts.owner == concept].mean(0) for concept in range(len(concepts))])
    pooled = mean_pool(x, concepts)
    close(pooled, expected)
    close(gradients(pooled, (x,))[0], gradients(expected, (x,))[0])
    z = random(len(concepts), 5)
    spread, expected = replicate(z, concepts), z[concepts.newest]
    close(spread, expected)
    close(gradients(spread, (z,))[0], gradients(expected, (z,))[0])


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 200, 64 * 64 + 3])
def test_the_blocked_scan_equals_the_recurrence(size: int) -> None:
    x = random(size, 3)
    a = torch.rand(size, dtype=torch.float64, generator=GENERATOR.manual_seed(1))
    a[::7] = 0  # documents begin
    a[3::11] = 1e-4
    a.requires_grad_()
    y, state = [], torch.zeros(3, dtype=torch.float64)
    for m in range(size):
        state = a[m] * state + x[m]
        y.append(state)
    expected, got = torch.stack(y), linear_scan(a, x)
    close(got, expected)
    for mine, theirs in zip(gradients(got, (a, x)), gradients(expected, (a, x)), strict=True):
        close(mine, theirs)


def test_the_scan_survives_where_cumulative_products_underflow() -> None:
    a = torch.full((3000,), 1e-4)
    y = linear_scan(a, torch.ones(3000, 1))
    torch.testing.assert_close(y[1:], torch.full((2999, 1), 1 / (1 - 1e-4)))
    with pytest.raises(ValueError, match="same dtype"):
        linear_scan(a.double(), torch.ones(3000, 1))


@pytest.mark.parametrize("short", [1024, 0], ids=["products", "torch kernel"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sdpa_equals_one_document_at_a_time(short: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "SHORT", short)
    segments = Segments.from_lengths([33, 1, 32, 5, 100, 31])
    size = 202
    q, k, v = random(size, 4, 8), random(size, kv_heads, 8, seed=1), random(size, kv_heads, 8, seed=2)
    expected = attention(q, k, v, segments, "reference")
    got = attention(q, k, v, segments, "sdpa")
    close(got, expected)
    for mine, theirs in zip(gradients(got, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        close(mine, theirs)


def test_torchs_varlen_is_called_as_it_wants_to_be() -> None:
    varlen_cpu.register()
    segments = Segments.from_lengths([33, 1, 5, 20])
    q, k, v = random(59, 4, 8), random(59, 2, 8, seed=1), random(59, 2, 8, seed=2)
    expected, got = (attention(q, k, v, segments, backend) for backend in ("reference", "varlen"))
    close(got, expected)
    for mine, theirs in zip(gradients(got, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        close(mine, theirs)


def test_the_cost_of_sdpa_follows_the_lengths_of_documents() -> None:
    """Counted, not timed: 64 documents of 32 tokens take 64 times fewer score entries than one of 2048."""
    def scores(lengths: list[int]) -> int:
        seen = 0
        honest = attention_module._short_causal

        def counting(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            seen += query.shape[0] * query.shape[1] ** 2
            return honest(query, key, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_module, "SHORT", 4096)
            patch.setattr(attention_module, "_short_causal", counting)
            q = torch.zeros(sum(lengths), 1, 4)
            attention(q, q, q, Segments.from_lengths(lengths), "sdpa")
        return seen

    assert scores([2048]) == 64 * scores([32] * 64)


def test_a_backend_that_cannot_run_is_refused_with_the_reason() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.float32) == "sdpa"
    for backend in ("flex", "varlen", "flash4", "flash3", "flash"):
        with pytest.raises(ValueError, match=rf"model\.attention = '{backend}'.*CUDA.*sdpa"):
            choose_backend(backend, cpu, torch.bfloat16)
    assert list(BACKENDS) == ["flex", "varlen", "flash4", "flash3", "flash", "sdpa", "reference"]


@pytest.mark.parametrize("chunk", [64, 128, 10**6])
def test_chunked_cross_entropy_equals_the_whole_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlcm_lightning.ops.cross_entropy.chunk_tokens", lambda vocabulary, device: chunk)
    hidden, weight = random(150, 6), random(11, 6, seed=1)
    targets = torch.randint(0, 11, (150,), generator=GENERATOR.manual_seed(2))
    targets[::5] = -100
    total, terms = linear_cross_entropy(hidden, weight, targets, 0.7)
    expected = torch.nn.functional.cross_entropy(0.7 * hidden @ weight.t(), targets, reduction="sum")
    close(total, expected)
    close(terms.sum(), expected)
    assert (terms[::5] == 0).all()
    for mine, theirs in zip(torch.autograd.grad(3 * total, (hidden, weight)),
                            torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        close(mine, theirs)
    with torch.no_grad():
        close(linear_cross_entropy(hidden, weight, targets, 0.7)[0], expected)


@pytest.mark.parametrize("multiple", [8, 16])
def test_columns_that_pad_the_vocabulary_change_nothing(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """11 ids among 16 columns, as a GPU has 128,815 among 128,896."""
    hidden, weight = random(150, 6), random(11, 6, seed=1)
    targets = torch.randint(0, 11, (150,), generator=GENERATOR.manual_seed(2))
    targets[::5] = -100
    plain = linear_cross_entropy(hidden, weight, targets, 0.7)
    expected = torch.autograd.grad(plain[0], (hidden, weight))
    monkeypatch.setitem(cross_entropy.VOCABULARY_MULTIPLE, "cpu", multiple)
    assert cross_entropy.padded_vocabulary(11, torch.device("cpu")) == 16
    padded = linear_cross_entropy(hidden, weight, targets, 0.7)
    assert torch.equal(padded[1], plain[1])
    for one, other in zip(torch.autograd.grad(padded[0], (hidden, weight)), expected, strict=True):
        close(one, other)


def test_cross_entropy_never_holds_the_logits_of_the_whole_batch() -> None:
    """The largest tensor made on the way, in forward and backward, stays below T x V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    tokens, vocabulary = 4096, 8192
    hidden = torch.zeros(tokens, 8, requires_grad=True)
    weight = torch.zeros(vocabulary, 8, requires_grad=True)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.long))[0].backward()
    assert largest.numel <= tokens * vocabulary // 8


@pytest.mark.parametrize(("dtype", "grouped"), [(torch.float32, False), (torch.float64, False), (torch.bfloat16, True)])
def test_a_gpu_attends_in_fp32_without_the_whole_map(dtype: torch.dtype, grouped: bool,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernels for groups of query heads know 16 bits, or keep all scores."""
    asked: list[tuple[bool, int, int]] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, enable_gqa: bool
               ) -> torch.Tensor:
        asked.append((enable_gqa, key.shape[1], value.shape[1]))
        return torch.empty_like(query)

    monkeypatch.setattr(attention_module.F, "scaled_dot_product_attention", kernel)
    with FakeTensorMode():
        query, key = (torch.empty(2, 64, heads, 16, dtype=dtype, device="cuda:0") for heads in (6, 3))
        assert attention_module._sdpa_causal(query, key, key).shape == query.shape
    assert asked == [(True, 3, 3) if grouped else (False, 6, 6)]
