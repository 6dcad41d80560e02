"""Future tokens never change the past: the proof obligation, and the mutants that it must catch.

With the noise frozen, tokens t + 1 ... are replaced, for every t of a document. Boundaries up to t must be bit-equal,
logits up to t equal to 1e-10 in float64 (the number of concepts changes, hence matrix shapes, hence rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dlcm_lightning.model import boundary, concepts, decoder, dlcm
from dlcm_lightning.model.dlcm import DLCM
from dlcm_lightning.ops import attention as attention_module
from dlcm_lightning.ops.attention import BACKENDS, FLASH, why_not
from dlcm_lightning.ops.segments import Concepts, Decisions, Segments
from tests import reference as oracle
from tests import varlen_cpu
from tests.model.conftest import loaded, small

TOLERANCE = 1e-10
LENGTH = 40


def violation(model: DLCM, before: list[int], after: list[int], sampled: bool) -> str | None:
    """The first way in which a future token changes the past of a document of LENGTH tokens, None where there is none.

    before, after: lengths of the documents packed around it.
    """
    generator = torch.Generator().manual_seed(11)
    vocabulary, begin = model.config.vocab_size, sum(before)
    total = begin + LENGTH + sum(after)
    tokens = torch.randint(0, vocabulary, (total,), generator=generator)
    noise = torch.rand(total, generator=generator)
    documents = Segments.from_lengths([*before, LENGTH, *after])
    device = model.embedding.weight.device
    tokens, documents = tokens.to(device), documents.to(device)
    drawn = noise.to(device) if sampled else None
    model.train()
    base = model(tokens, documents, drawn)
    base_logits = model.logits(base.hidden)
    for t in range(LENGTH):
        changed = tokens.clone()
        future = slice(begin + t + 1, total)
        shift = 1 + torch.randint(0, vocabulary - 1, changed[future].shape, generator=generator)
        changed[future] = (changed[future] + shift.to(device)) % vocabulary
        output = model(changed, documents, drawn)
        past = slice(0, begin + t + 1)
        if not torch.equal(output.segmentation.boundaries[past], base.segmentation.boundaries[past]):
            return f"boundaries up to {t}"
        error = (model.logits(output.hidden)[past] - base_logits[past]).abs().max().item()
        if not error < TOLERANCE:
            return f"logits up to {t}: {error}"
    return None


@pytest.mark.parametrize("backend", ["varlen", "sdpa", "reference"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "alone"])
def test_future_tokens_never_change_past_logits(form: str, packed: bool, sampled: bool, backend: str) -> None:
    """varlen runs on the CPU kernel of tests/varlen_cpu.py."""
    if backend == "varlen":
        varlen_cpu.register()
    config = small(form)
    model = loaded(config, oracle.random_state(config, seed=12), backend)
    assert violation(model, [7, 1] if packed else [], [9] if packed else [], sampled) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*FLASH, "varlen"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "alone"])
def test_the_gpu_kernels_are_causal(
    packed: bool, sampled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels take bf16; everything around them stays float64, so that a leak could not hide in rounding."""
    device = torch.device("cuda")
    if reason := why_not(backend, device, torch.bfloat16):
        pytest.skip(f"{backend}: {reason}")
    kernel = BACKENDS[backend]

    def widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
        return kernel(q.bfloat16(), k.bfloat16(), v.bfloat16(), segments).to(q.dtype)

    monkeypatch.setitem(BACKENDS, backend, widened)
    config = small("both")
    model = loaded(config, oracle.random_state(config, seed=12), backend).to(device)
    assert violation(model, [7, 1] if packed else [], [9] if packed else [], sampled) is None


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "alone"])
def test_the_attention_for_long_documents_is_causal_too(
    packed: bool, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "SHORT", 0)
    config = small("both")
    model = loaded(config, oracle.random_state(config, seed=12))
    assert violation(model, [7, 1] if packed else [], [9] if packed else [], sampled) is None


def visible_one_token_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token t sees the concept that closes at t + 1."""
    honest = dlcm.concepts_from_boundaries

    def mutant(decisions: Decisions, documents: Segments) -> Concepts:
        made = honest(decisions, documents)
        closing = (made.closing - 1).clamp(min=0)
        starts = documents.cu_seqlens[:-1].long()
        first = torch.isin(made.closing, starts)
        closing = torch.where(first, made.closing, closing)
        marks = torch.zeros(len(made.owner), dtype=torch.long).index_add(0, closing, torch.ones_like(closing))
        return replace(made, newest=marks.cumsum(0) - 1)

    monkeypatch.setattr(dlcm, "concepts_from_boundaries", mutant)
    monkeypatch.setattr(decoder, "replicate", lambda z, made: z.index_select(0, made.newest))


def pooled_and_visible_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boundary token opens its concept: pooled is [phi(k), phi(k + 1)), seen from phi(k) on."""
    honest = concepts.mean_pool

    def mutant(x: torch.Tensor, made: Concepts) -> torch.Tensor:
        bounds = torch.cat([made.closing, made.closing.new_full((1,), len(x))])
        return honest(x, replace(made, owner=made.newest, closing=bounds[1:] - 1, lengths=bounds.diff()))

    monkeypatch.setattr(concepts, "mean_pool", mutant)


def smoothing_that_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan runs from the last concept to the first."""
    honest = concepts.linear_scan
    monkeypatch.setattr(concepts, "linear_scan", lambda a, x: honest(a.roll(-1).flip(0), x.flip(0)).flip(0))


def boundary_from_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """p_t compares h_t with h_{t+1}, as the rule's formula is printed."""
    monkeypatch.setattr(boundary, "previous", lambda x: torch.cat([x[1:], x[-1:]]))


MUTANTS = [visible_one_token_early, pooled_and_visible_swapped, smoothing_that_looks_ahead,
           boundary_from_the_next_token]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "alone"])
def test_the_proof_fails_for_a_model_that_looks_ahead(
    mutant: Callable[[pytest.MonkeyPatch], None], packed: bool, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("both")
    model = loaded(config, oracle.random_state(config, seed=12))
    mutant(monkeypatch)
    assert violation(model, [7, 1] if packed else [], [9] if packed else [], sampled) is not None


def test_the_running_mean_of_centred_features_uses_the_past_alone() -> None:
    """In training mode, with gradients on, as the batch mean of a normalisation layer would not."""
    config = small("centred")
    model = loaded(config, oracle.random_state(config, seed=13)).train()
    module = model.boundary
    assert isinstance(module, boundary.LearnedBoundary)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, config.d_token, dtype=torch.float64, generator=generator, requires_grad=True)
    documents = Segments.from_lengths([90, 60])
    first = boundary.document_starts(documents, 150)
    for t in (0, 1, 63, 64, 89):
        changed = hidden.detach().clone()
        changed[t + 1:] = torch.randn(149 - t, config.d_token, dtype=torch.float64, generator=generator)
        mean, other = (module.running_mean(module.running_sums(x.detach(), first), documents.positions(150))
                       for x in (hidden, changed))
        assert torch.equal(mean[:t + 1], other[:t + 1])
        assert not torch.equal(mean[t + 1:], other[t + 1:])
