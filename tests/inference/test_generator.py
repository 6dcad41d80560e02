"""Texts are what one forward at a time would give, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import ConfigError, RunError
from dlcm_lightning.inference import Begun, Completion, Generator, Piece, Sampling
from dlcm_lightning.model.dlcm import DLCM, build_model
from dlcm_lightning.ops.segments import Segments
from tests.model.conftest import FORMS

GREEDY = Sampling(temperature=0, max_tokens=24)
PROMPTS = ["the river", "", "of a", "hills and the sea and the stone " * 5, "第一章"]


def without_cache(generator: Generator, prompt: str, tokens: int) -> tuple[list[int], list[bool]]:
    """The likeliest token after a whole forward, again and again; and the boundaries of the last forward."""
    ids = generator.encode(prompt)
    first = len(ids)
    model, segmentation = generator.model, None
    for _ in range(tokens):
        with torch.no_grad():
            output = model(torch.tensor(ids), Segments.from_lengths([len(ids)]))
            logits = model.logits(output.hidden[-1:])[0]
        logits[generator.tokenizer.bos_id] = float("-inf")
        segmentation = output.segmentation
        ids.append(int(logits.argmax()))
        if ids[-1] == generator.tokenizer.eos_id:
            break
    return ids[first:], [] if segmentation is None else segmentation.boundaries.tolist()


@pytest.mark.parametrize("form", [*FORMS, "dense"])
def test_greedy_texts_are_those_of_whole_forwards(form: str, make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(form, torch.float64)
    for one in generator.generate(PROMPTS, GREEDY, batch_size=3):
        ids, boundaries = without_cache(generator, PROMPTS[one.prompt], 24)
        assert one.ids == ids
        assert one.boundaries == boundaries


@pytest.mark.parametrize("boundaries", ["thresholded", "sampled"])
def test_a_seed_gives_one_text_in_any_batch(boundaries: str, make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    sampling = Sampling(seed=4, max_tokens=30, boundaries=boundaries)  # type: ignore[arg-type]
    alone = [generator.generate([prompt], sampling)[0] for prompt in PROMPTS]
    for batch_size in (1, 2, 3, 8):
        together = generator.generate(PROMPTS[::-1], sampling, batch_size=batch_size)[::-1]
        assert [one.ids for one in together] == [one.ids for one in alone]
        assert [one.boundaries for one in together] == [one.boundaries for one in alone]


def test_seeds_samples_and_repeated_prompts_give_other_texts(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    sampling = Sampling(seed=4, max_tokens=30)
    samples = generator.generate(["the river"], sampling, samples=4, batch_size=3)
    assert len({one.text for one in samples}) == 4
    again = generator.generate(["the river"] * 4, sampling)
    assert [one.text for one in again] == [one.text for one in samples]
    other = generator.generate(["the river"], Sampling(seed=5, max_tokens=30))
    assert other[0].text != samples[0].text


def test_pieces_are_the_text_and_concepts_count_up(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    texts: dict[tuple[int, int], str] = {}
    concepts: dict[tuple[int, int], int] = {}
    for event in generator.stream(PROMPTS, Sampling(seed=2, max_tokens=40), samples=2, batch_size=4):
        key = event.prompt, event.sample
        if isinstance(event, Begun):
            concepts[key] = sum(event.boundaries)
            texts[key] = ""
        elif isinstance(event, Piece):
            assert event.concept >= concepts[key] - 1
            concepts[key] = event.concept
            texts[key] += event.text
        else:
            assert event.text == texts.pop(key)
            assert event.concepts >= concepts[key]
    assert not texts


def test_the_backbone_runs_once_a_closed_concept(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    assert isinstance(generator.model, DLCM)
    rows: list[int] = []
    generator.model.backbone.layers[0].ffn.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
    done = generator.generate(PROMPTS, GREEDY, batch_size=3)
    assert sum(rows) == sum(one.concepts for one in done) < sum(len(one.boundaries) for one in done)


def test_a_stop_string_ends_a_text_before_it(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    whole = generator.generate(["of a"], GREEDY)[0].text
    stop = next(whole[begin:begin + 3] for begin in range(4, len(whole) - 3) if "�" not in whole[begin:begin + 3])
    one = generator.generate(["of a"], Sampling(temperature=0, max_tokens=24, stop=("never there", stop)))[0]
    assert one.finish == "stop" and one.text == whole[: whole.index(stop)]
    assert len(one.ids) < 24


def test_eos_length_and_context_end_texts(make_generator: Callable[..., Generator], tokenizer: Tokenizer) -> None:
    generator = make_generator(context=40)
    done = generator.generate(["of a", "the river " * 5], Sampling(temperature=0, max_tokens=25))
    assert [one.finish for one in done] == ["length", "context"]
    assert len(done[1].prompt_ids) + len(done[1].ids) == 40
    third = done[0].ids[2]
    with torch.no_grad():  # what was the third token is now the end
        weight = generator.model.unembedding.weight
        weight[[third, tokenizer.eos_id]] = weight[[tokenizer.eos_id, third]]
    one = generator.generate(["of a"], Sampling(temperature=0, max_tokens=25))[0]
    assert one.finish == "eos" and one.ids == [*done[0].ids[:2], tokenizer.eos_id]
    assert one.text == tokenizer.decode(one.ids)


def test_bos_and_ids_beyond_the_tokenizer_are_never_chosen(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    with torch.no_grad():
        generator.model.unembedding.weight[generator.tokenizer.bos_id] *= 1000
    done = generator.generate(PROMPTS, Sampling(temperature=5, top_p=1, max_tokens=40))
    assert all(generator.tokenizer.bos_id not in one.ids for one in done)


def test_what_cannot_be_asked_is_said(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(context=8)
    for prompts, words in ((["a " * 50], "prompt 1 has .* tokens, and the context is 8"), (["\udcff"], "UTF-8"),
                           ([[10**6]], "id 1000000 is none of the model's"), ([[-1]], "id -1 is none")):
        with pytest.raises(ConfigError, match=words):
            generator.generate(prompts)  # type: ignore[arg-type]
    for options in ({"samples": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            generator.generate(["a"], **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"prompts = 'a': give several, as \['a'\]"):
        generator.generate("a")
    assert generator.generate([]) == []
    with torch.no_grad():
        generator.model.decoder.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="logits are not numbers"):
        generator.generate(["a"])


def test_ids_are_taken_as_prompts(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    ids = generator.encode("the river")
    texts = {one.text for one in (*generator.generate(["the river"], GREEDY), *generator.generate([ids], GREEDY),
                                  *generator.generate([ids[1:]], GREEDY))}
    assert len(texts) == 1


def test_another_tokenizer_is_refused(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator()
    small = build_model(replace(generator.model.config, vocab_size=100), torch.float32, "sdpa", 0)
    with pytest.raises(ConfigError, match=r"ids, but the model knows 100 \(model.vocab_size\)"):
        Generator(small, generator.tokenizer, 10)


def test_completions_are_in_order(make_generator: Callable[..., Generator]) -> None:
    done = make_generator().generate(PROMPTS, Sampling(max_tokens=3), samples=2, batch_size=4)
    assert [(one.prompt, one.sample) for one in done] == [(p, s) for p in range(len(PROMPTS)) for s in range(2)]
    assert all(isinstance(one, Completion) for one in done)
