"""Decoding with state equals one forward: every form, batch, cut and growth of caches; and the mutants it must catch.

Sequences are cut into calls at random, some rows a call, one token or several a row, while other slots hold other
things. Each token's boundary must be that of one packed forward, its logits equal to 1e-9 in float64 and 1e-4 in fp32.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlcm_lightning.model import boundary, concepts, layers
from dlcm_lightning.model.decoder import CrossAttention
from dlcm_lightning.model.dlcm import DLCM, LanguageModel, build_model
from dlcm_lightning.ops.incremental import Extension
from dlcm_lightning.ops.rope import rotation
from dlcm_lightning.ops.segments import Segments
from tests import reference as oracle
from tests.model.conftest import FORMS, loaded, small, tokens_and_noise

EXACT, ROUNDED = 1e-9, 1e-4
"""Of logits, in float64 and fp32."""
LENGTHS = [23, 1, 70, 9]


def models(form: str) -> LanguageModel:
    """A DLCM of that form in float64, or the dense model."""
    if form == "dense":
        config = replace(small(), kind="dense", decoder_layers=3)
        return build_model(config, torch.float64, "sdpa", seed=3).eval()
    config = small(form)
    return loaded(config, oracle.random_state(config, seed=3)).eval()


def difference(model: LanguageModel, lengths: list[int], sampled: bool, seed: int, *, capacity: int = 8,
               backbone_rows: list[int] | None = None) -> float | str:
    """The largest difference of logits between one forward and calls cut at random; words where boundaries differ.

    backbone_rows: is given the number of rows that run through the backbone."""
    choose = random.Random(seed)
    tokens, noise, documents = (one.to(model.where) for one in tokens_and_noise(lengths, seed))
    drawn = noise if sampled else None
    with torch.no_grad():
        whole = model(tokens, documents, drawn)
        expected = model.logits(whole.hidden)
    starts = documents.cu_seqlens.tolist()
    slots = choose.sample(range(len(lengths) + 2), len(lengths))
    state = model.new_state(len(lengths) + 2, capacity)
    if isinstance(model, DLCM) and backbone_rows is not None:
        count_rows(model, backbone_rows)
    done, worst = [0] * len(lengths), 0.0
    while any(one < length for one, length in zip(done, lengths, strict=True)):
        rows = [row for row, length in enumerate(lengths) if done[row] < length and choose.random() < 0.7]
        if not rows:
            continue
        counts = [min(choose.choice([1, 1, 1, 2, 7, 40]), lengths[row] - done[row]) for row in rows]
        where = torch.cat([torch.arange(starts[row] + done[row], starts[row] + done[row] + count)
                           for row, count in zip(rows, counts, strict=True)]).to(model.where)
        now = model.extend(tokens[where], counts, [slots[row] for row in rows], state,
                           None if drawn is None else drawn[where])
        if whole.segmentation is not None and now.segmentation is not None and not torch.equal(
                now.segmentation.boundaries, whole.segmentation.boundaries[where]):
            return f"boundaries after {done}"
        apart = (model.logits(now.hidden) - expected[where]).abs().max().item()
        worst = max(worst, apart) if apart == apart else apart  # what is no number stays
        done = [one + (counts[rows.index(row)] if row in rows else 0) for row, one in enumerate(done)]
    assert [state.tokens[slot] for slot in slots] == lengths
    if whole.concepts is not None:
        assert [state.concepts[slot] for slot in slots] == whole.concepts.documents.lengths().tolist()
    return worst


def count_rows(model: DLCM, into: list[int]) -> None:
    """Rows that the backbone's feed-forwards see, one a layer."""
    first = model.backbone.layers[0].ffn
    first.register_forward_pre_hook(lambda _, arguments: into.append(arguments[0].shape[0]))


@pytest.mark.parametrize("form", [*FORMS, "dense"])
def test_decoding_equals_one_forward_in_float64(form: str, sampled: bool) -> None:
    assert difference(models(form), LENGTHS, sampled, seed=1) < EXACT


@pytest.mark.parametrize("form", [*FORMS, "dense"])
def test_decoding_equals_one_forward_in_fp32(form: str, sampled: bool) -> None:
    model = models(form).float()
    model.compute_dtype = torch.float32
    assert difference(model, LENGTHS, sampled, seed=2) < ROUNDED


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from([*FORMS, "dense"]), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
       sampled=st.booleans(), seed=st.integers(0, 10**6), capacity=st.integers(1, 80))
def test_any_cut_of_any_batch_equals_one_forward(form: str, lengths: list[int], sampled: bool, seed: int, capacity: int
                                                 ) -> None:
    assert difference(models(form), lengths, sampled, seed, capacity=capacity) < EXACT


def test_the_backbone_runs_once_for_every_closed_concept(sampled: bool) -> None:
    """The packed forward of `difference` comes before the counting."""
    model = models("both")
    assert isinstance(model, DLCM)
    rows: list[int] = []
    assert difference(model, LENGTHS, sampled, seed=4, backbone_rows=rows) < EXACT
    tokens, noise, documents = tokens_and_noise(LENGTHS, 4)
    with torch.no_grad():
        segmentation = model(tokens, documents, noise if sampled else None).segmentation
    assert segmentation is not None
    closed = int(segmentation.boundaries.sum())
    assert sum(rows[:-1]) == closed and len(LENGTHS) < closed < sum(LENGTHS)  # the last is the forward just made


def test_caches_grow_three_times_and_keep_what_they_hold() -> None:
    model = models("both")
    tokens, _, documents = tokens_and_noise([70], 5)
    state = model.new_state(1, 8)
    capacities = set()
    hidden = []
    for token in tokens:
        hidden.append(model.step(token[None], [0], state).hidden)
        capacities.add(state.encoder[0].capacity)
    assert capacities == {8, 16, 32, 64, 128}
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(hidden), model(tokens, documents).hidden, rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", [*FORMS, "dense"])
def test_a_slot_begins_anew_and_goes_on_from_another_s_copy(form: str) -> None:
    """What a sequence left behind is not seen by the next one in its slot; a fork goes on as its origin does."""
    model = models(form)
    tokens, _, _ = tokens_and_noise([30, 20], 6)
    state = model.new_state(3, 8)
    model.prefill(tokens[:30], [30], [1], state)
    model.prefill(tokens[30:45], [15], [1], state)
    state.copy([1], [2])
    now = model.extend(torch.cat([tokens[45:], tokens[45:]]), [5, 5], [1, 2], state)
    with torch.no_grad():
        expected = model(tokens[30:], Segments.from_lengths([20])).hidden[15:]
    torch.testing.assert_close(now.hidden, torch.cat([expected, expected]), rtol=0, atol=EXACT)


def test_what_is_no_number_does_not_stay_in_a_slot() -> None:
    model = models("both")
    tokens, _, _ = tokens_and_noise([20, 8], 6)
    state = model.new_state(2, 8)
    model.prefill(tokens, [20, 8], [0, 1], state)
    for caches, held in (((*state.encoder, *state.decoder), state.tokens[0]),
                         ((*state.backbone, state.memory), state.concepts[0])):
        for cache in caches:
            cache.keys[0, :, :held] = cache.values[0, :, :held] = float("nan")
    for one in (*state.boundary.tensors(), *state.concept.tensors()):
        one[0] = float("nan")
    model.prefill(tokens[:2], [2], [0], state)
    hidden = model.step(tokens[2:4], [0, 1], state).hidden
    with torch.no_grad():
        expected = model(tokens[:3], Segments.from_lengths([3])).hidden[-1]
    torch.testing.assert_close(hidden[0], expected, rtol=0, atol=EXACT)


def test_what_does_not_fit_together_is_refused() -> None:
    model = models("both")
    state = model.new_state(2, 8)
    for counts, slots in (([1, 1], [0]), ([2], [0]), ([0, 3], [0, 1]), ([1, 2], [1, 1])):
        with pytest.raises(ValueError, match="give one count"):
            model.extend(torch.zeros(3, dtype=torch.long), counts, slots, state)


def test_given_boundaries_bf16_stays_near_float64() -> None:
    """Forms that decide without the hidden states take the same boundaries in any dtype."""
    model = models("fixed")
    low = build_model(model.config, torch.bfloat16, "sdpa", seed=0).eval()
    low.load_state_dict(model.state_dict())
    tokens, _, documents = tokens_and_noise(LENGTHS, 7)
    with torch.no_grad():
        expected = model.logits(model(tokens, documents).hidden)
    state = low.new_state(len(LENGTHS), 8)
    pieces = list(tokens.split(LENGTHS))
    hidden = [[] for _ in LENGTHS]
    for place in range(max(LENGTHS)):
        rows = [row for row, length in enumerate(LENGTHS) if place < length]
        now = low.step(torch.stack([pieces[row][place] for row in rows]), rows, state)
        for row, one in zip(rows, now.hidden, strict=True):
            hidden[row].append(one)
    got = low.logits(torch.cat([torch.stack(one) for one in hidden])).double()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def without_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = CrossAttention.replicas
    monkeypatch.setattr(CrossAttention, "replicas", staticmethod(lambda *given: honest(*given).clamp(max=1)))


def open_mean_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = concepts.close_concepts

    def shifted(*given: Any) -> concepts.ClosedConcepts:
        closed = honest(*given)
        return replace(closed, lengths=closed.lengths + (closed.tokens > 0).long())

    monkeypatch.setattr("dlcm_lightning.model.dlcm.close_concepts", shifted)


def smoothing_state_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = concepts.extend_smoothing
    monkeypatch.setattr("dlcm_lightning.model.dlcm.extend_smoothing",
                        lambda z, gates, new, state: honest(z, gates, new, torch.zeros_like(state)))


def open_sum_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = concepts.Pool.extend

    def forgetful(self: Any, hidden: Any, closed: Any, new: Any, state: Any) -> torch.Tensor:
        state.open_sums.zero_()
        return honest(self, hidden, closed, new, state)

    monkeypatch.setattr(concepts.Pool, "extend", forgetful)


def rope_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backbone: about four tokens a concept."""
    honest = layers.Stack.extend

    def turned(self: layers.Stack, x: Any, new: Extension, cache: Any, backend: str) -> torch.Tensor:
        if x.shape[1] == 48:  # the width of concepts
            monkeypatch.setattr(layers, "rotation", lambda positions, *given: rotation(4 * positions, *given))
        try:
            return honest(self, x, new, cache, backend)
        finally:
            monkeypatch.setattr(layers, "rotation", rotation)

    monkeypatch.setattr(layers.Stack, "extend", turned)


def previous_query_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary, "handed_on", lambda x, new, state: boundary.previous(x))


def running_sum_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = boundary.LearnedBoundary.extend

    def forgetful(self: Any, hidden: Any, new: Any, noise: Any, state: Any) -> Any:
        state.sums.zero_()
        return honest(self, hidden, new, noise, state)

    monkeypatch.setattr(boundary.LearnedBoundary, "extend", forgetful)


def a_neighbour_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows read the caches of other slots."""
    honest = Extension.rows_of
    monkeypatch.setattr(Extension, "rows_of", lambda self, cache, length: honest(self, cache.roll(1, 0), length))


def future_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "causal_bias", lambda new, dtype: None)


MUTANTS = (without_replicas, open_mean_off_by_one, smoothing_state_lost, open_sum_lost, rope_in_tokens,
           previous_query_lost, running_sum_lost, a_neighbour_leaks, future_seen)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_are_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("both")
    assert difference(model, LENGTHS, True, seed=1) < EXACT
    mutant(monkeypatch)
    found = difference(model, LENGTHS, True, seed=1)
    assert isinstance(found, str) or found > 1e-4


def test_what_is_counted_on_the_host_is_counted_there_whatever_torchs_default_device_is() -> None:
    """Scripts around transformers like to set it."""
    model = models("both")
    tokens = torch.randint(0, model.config.vocab_size, (20,), generator=torch.Generator().manual_seed(0))
    documents = Segments.from_lengths([20])
    expected = model.extend(tokens, [20], [0], model.new_state(1, 20)).hidden
    state = model.new_state(1, 20)
    with torch.device("meta"):
        found = model.extend(tokens, [20], [0], state).hidden
        assert torch.equal(model(tokens, documents).hidden, model(tokens, documents).hidden)
    assert torch.equal(found, expected)
