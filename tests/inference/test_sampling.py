"""Filters are Hugging Face's; draws follow the probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.inference.sampling import Sampling, choose, filtered, key_of
from dlcm_lightning.ops.noise import uniform_at


def logits(rows: int = 6, vocabulary: int = 50) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("asked", [
    {"top_k": 5}, {"top_k": 500}, {"top_p": 0.7}, {"top_p": 0.05}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05}, {"temperature": 0.3, "top_p": 0.8},
])
def test_filters_leave_what_hugging_face_leaves(asked: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, **asked})
    expected = logits() / sampling.temperature
    for name, warper, off in (("top_k", "TopKLogitsWarper", 0), ("top_p", "TopPLogitsWarper", 1),
                              ("min_p", "MinPLogitsWarper", 0)):
        if (value := getattr(sampling, name)) != off:
            expected = getattr(transformers, warper)(value)(None, expected)
    assert torch.equal(filtered(logits() / sampling.temperature, sampling), expected)


def test_the_repetition_penalty_is_hugging_face_s() -> None:
    transformers = pytest.importorskip("transformers")
    texts = torch.randint(0, 50, (6, 9), generator=torch.Generator().manual_seed(2))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter_(1, texts, True)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(texts, logits()).argmax(-1)
    sampling = Sampling(temperature=0, repetition_penalty=1.7)
    assert torch.equal(choose(logits(), sampling, torch.zeros(6), seen), expected)
    assert not torch.equal(expected, logits().argmax(-1))


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    count = 20_000
    drawn = uniform_at(torch.tensor(key_of(0, [1], 0, "token")), torch.arange(count))
    chosen = choose(scores.expand(count, -1), Sampling(temperature=1.0, top_p=1.0), drawn, None)
    shares = torch.bincount(chosen, minlength=5) / count
    assert (shares - scores[0].softmax(-1)).abs().max() < 4 * (0.25 / count) ** 0.5


def test_a_token_that_is_left_out_is_never_drawn() -> None:
    scores = torch.tensor([[float("-inf"), 1.0, float("-inf"), 0.0, float("-inf")]])
    for edge in (0.0, 1 - 2**-24, 0.5):
        chosen = choose(scores, Sampling(temperature=1.0, top_p=1.0), torch.tensor([edge]), None)
        assert int(chosen) in (1, 3)


def test_a_temperature_near_nothing_is_greedy() -> None:
    drawn = torch.rand(6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(logits(), Sampling(temperature=1e-38), drawn, None), logits().argmax(-1))


def test_greedy_is_the_likeliest() -> None:
    assert torch.equal(choose(logits(), Sampling(temperature=0), torch.rand(6), None), logits().argmax(-1))


def test_keys_depend_on_everything_and_on_nothing_else() -> None:
    keys = [key_of(seed, ids, sample, purpose) for seed in (0, 1) for ids in ([1], [1, 2], [12])
            for sample in (0, 1) for purpose in ("token", "boundary")]
    assert len(set(keys)) == len(keys)
    assert key_of(3, [4, 5], 6, "token") == key_of(3, (4, 5), 6, "token")


@pytest.mark.parametrize("asked", [
    {"temperature": float("nan")}, {"temperature": -1}, {"temperature": float("inf")}, {"temperature": "1"},
    {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": 2},
    {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}, {"seed": -1}, {"max_tokens": 0},
    {"max_tokens": True}, {"stop": ("",)}, {"stop": "end"}, {"stop": ("\udcff",)}, {"boundaries": "random"},
])
def test_what_means_nothing_is_refused_by_name(asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(ConfigError, match=f"^{name} = "):
        Sampling(**asked)
