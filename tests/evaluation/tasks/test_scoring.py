"""Scores of packed batches, with shared contexts, equal one forward for every continuation."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dlcm_lightning.evaluation.tasks import scoring
from dlcm_lightning.evaluation.tasks.scoring import Request, Score, Scorer
from dlcm_lightning.inference.sampling import key_of
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.model.cache import DecodingState
from dlcm_lightning.model.dlcm import LanguageModel, build_model
from dlcm_lightning.ops.noise import uniform_at
from dlcm_lightning.ops.segments import Segments
from tests.model.conftest import FORMS, SMALL
from tests.model.test_extend import models

EXACT = 1e-9


def requests(seed: int = 0) -> list[Request]:
    """Contexts with one continuation and with several, of one token and of many, out of order; one asked twice."""
    choose = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(choose.randrange(SMALL.vocab_size) for _ in range(count))

    made: list[Request] = []
    wanted = ((1, [5]), (30, [1, 1, 1, 1]), (17, [1, 9, 4]), (60, [12, 12]), (8, [1]), (3, [20, 1]))
    for length, continuations in wanted:
        context = ids(length)
        made += [Request(context, ids(count)) for count in continuations]
    made.append(made[5])
    choose.shuffle(made)
    return made


def alone(model: LanguageModel, request: Request, drawn: bool) -> Score:
    """By a forward of nothing but this text."""
    text = torch.tensor((*request.context, *request.continuation[:-1]))
    noise = None
    if drawn:
        keys = torch.full((len(text),), key_of(0, request.context, 0, "boundary"))
        noise = uniform_at(keys, torch.arange(len(text)))
    with torch.no_grad():
        hidden = model(text, Segments.from_lengths([len(text)]), noise).hidden
        logprobs = model.logits(hidden).log_softmax(-1)[len(request.context) - 1:]
    targets = torch.tensor(request.continuation)
    return Score(logprobs.gather(1, targets[:, None]).sum().item(), bool((logprobs.argmax(-1) == targets).all()))


def difference(model: LanguageModel, asked: list[Request], found: list[Score], drawn: bool) -> float:
    expected = [alone(model, one, drawn) for one in asked]
    assert [one.greedy for one in found] == [one.greedy for one in expected]
    return largest(found, expected)


def largest(found: list[Score], expected: list[Score]) -> float:
    """Difference; what is no number is one too."""
    apart = [one.logprob - other.logprob for one, other in zip(found, expected, strict=True)]
    return torch.tensor(apart, dtype=torch.float64).abs().max().item()


LEARNED = [form for form in FORMS if form not in ("rule", "fixed")]


@pytest.mark.parametrize(("form", "boundaries"), [
    *((form, "thresholded") for form in (*FORMS, "dense")),
    *((form, boundaries) for form in LEARNED for boundaries in ("half", "sampled"))])
def test_scores_are_those_of_each_text_alone(form: str, boundaries: Boundaries) -> None:
    model, asked = models(form), requests()
    for batch_tokens in (1, 64, 4096):
        found = Scorer(model, boundaries, batch_tokens=batch_tokens).score(asked)
        assert difference(model, asked, found, boundaries == "sampled") < EXACT


def test_a_rule_changes_what_is_scored() -> None:
    model, asked = models("both"), requests()
    found = {rule: [one.logprob for one in Scorer(model, rule).score(asked)]  # type: ignore[arg-type]
             for rule in ("calibrated", "half", "sampled")}
    assert found["calibrated"] != found["half"] != found["sampled"] != found["calibrated"]
    assert [one.logprob for one in Scorer(model).score(asked)] == found["calibrated"], "the model's own again"


def test_in_fp32_scores_do_not_depend_on_what_else_is_asked() -> None:
    """Bounds of the order of rounding, whatever the batch and the order."""
    config = replace(SMALL, vocab_size=SMALL.vocab_size)
    model, asked = build_model(config, torch.float32, "sdpa", seed=4), requests()
    one = Scorer(model).score(asked)
    order = list(range(len(asked)))
    random.Random(1).shuffle(order)
    other = Scorer(model, batch_tokens=50).score([asked[number] for number in order])
    for place, number in enumerate(order):
        assert abs(other[place].logprob - one[number].logprob) < 1e-5 * abs(one[number].logprob)


def test_drawn_boundaries_are_those_of_the_context_whatever_else_reads_the_same_text() -> None:
    model = models("both")
    context = (5, 9, 2, 44, 7, 7, 1, 30)
    asked = [Request(context, (7, 9, 11)), Request((*context, 7, 9), (13,)), Request((*context, 7), (9, 11))]
    found = Scorer(model, "sampled").score(asked)
    assert difference(model, asked, found, True) < EXACT
    assert Scorer(model, "sampled").score(asked[:1]) == found[:1]


def test_many_continuations_of_one_context_are_cut_into_batches() -> None:
    """As of tasks whose contexts are empty."""
    model = models("both")
    asked = [Request((1,), tuple((one * 7 + place) % 50 for place in range(1 + one % 9))) for one in range(60)]
    scorer = Scorer(model, batch_tokens=64)
    batches = scorer.plan(asked)
    assert sorted(number for batch in batches for number in batch) == list(range(60)) and len(batches) > 3
    for batch in batches:
        assert sum(len(asked[number].continuation) - 1 for number in batch) <= 64
        assert len(batch) * max(len(asked[number].continuation) for number in batch) <= 4 * 64
    assert difference(model, asked, scorer.score(asked), False) < EXACT


def test_greedy_means_that_every_token_is_the_likeliest() -> None:
    model = models("both")
    context = (3, 1, 4, 1, 5)
    text = list(context)
    with torch.no_grad():
        for _ in range(4):
            hidden = model(torch.tensor(text), Segments.from_lengths([len(text)])).hidden[-1:]
            text.append(int(model.logits(hidden).argmax()))
    likely = tuple(text[5:])
    other = (*likely[:2], (likely[2] + 1) % SMALL.vocab_size, likely[3])
    found = Scorer(model).score([Request(context, likely), Request(context, other)])
    assert [one.greedy for one in found] == [True, False] and found[0].logprob > found[1].logprob


def test_a_plan_asks_everything_once_and_contexts_stay_together() -> None:
    asked = requests()
    for batch_tokens in (1, 90, 100_000):
        batches = Scorer(models("both"), batch_tokens=batch_tokens).plan(asked)
        assert sorted(number for batch in batches for number in batch) == list(range(len(asked)))
        of = [{asked[number].context for number in batch} for batch in batches]
        if batch_tokens > 1:
            assert all(not one & other for place, one in enumerate(of) for other in of[:place])
        for batch, contexts in zip(batches, of, strict=True):
            size = sum(map(len, contexts)) + sum(len(asked[number].continuation) - 1 for number in batch)
            assert size <= batch_tokens or len(batch) == 1
    assert len(batches) == 1


def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodingState, "copy", lambda self, sources, targets: self.tokens.__setitem__(
        slice(None), [max(self.tokens)] * len(self.tokens)))


def noise_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Scorer._noise
    monkeypatch.setattr(Scorer, "_noise", lambda self, pieces: before(
        self, [(context, 0, count) for context, _, count in pieces]))


def noise_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "key_of", lambda seed, context, sample, purpose: seed)


def last_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Scorer._scores
    monkeypatch.setattr(Scorer, "_scores", lambda self, hidden, asked: before(self, hidden.roll(1, 0), asked))


@pytest.mark.parametrize("mutant", [no_copy, noise_from_the_first_token, noise_of_a_batch, last_tokens_only])
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: object) -> None:
    model, asked = models("both"), requests()
    mutant(monkeypatch)  # type: ignore[operator]
    try:
        found = Scorer(model, "sampled").score(asked)
        expected = [alone(model, one, True) for one in asked]
    except (ValueError, IndexError, RuntimeError):
        return
    assert not largest(found, expected) < 1e-3
