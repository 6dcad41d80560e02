"""Models as lm-eval asks them: ours by the packed scorer and the cached generator, and any of the Hugging Face hub by
lm-eval's own class; both share their work over ranks and keep their answers (sharing.py).

lm-eval makes the same requests on every rank and is told of one process: which rank answers what is decided below it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import ConfigError, DataError
from dlcm_lightning.evaluation.tasks.scoring import Request, Scorer
from dlcm_lightning.evaluation.tasks.sharing import Answers, Arguments
from dlcm_lightning.inference.generator import Generator
from dlcm_lightning.inference.sampling import Sampling

GENERATED_AT_ONCE = 16
NEW_TOKENS = 256
"""Where a task names no number, as in lm-eval."""
HUB_BATCH = 256
"""Requests of a Hugging Face model that are kept together; lm-eval cuts them into batches of its own."""


class ConceptLM(TemplateLM):
    """A model of ours, dense ones included."""

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, context: int, answers: Answers) -> None:
        """context: the most tokens of a text, BOS included; of longer ones the first are left out, as lm-eval does."""
        super().__init__()
        self.scorer, self.ids, self.answers, self.max_length = scorer, tokenizer, answers, context
        self.cut: set[tuple[int, ...]] = set()
        """Contexts that were longer than the model's."""

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.ids.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """BOS in front unless it is told otherwise."""
        ids: list[int] = self.ids.encode_documents([string])[0][:-1].tolist()
        return ids[1:] if add_special_tokens is False else ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`."""
        pairs = [tuple(one.args) for one in requests]
        return [(score, greedy) for score, greedy in self.answers.of("loglikelihood", pairs, self._plan, self._score)]

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """requests: lm-eval's ((texts), context ids, continuation ids)."""
        found = self.scorer.score([self.request(context, continuation) for _, context, continuation in requests])
        return [(one.logprob, one.greedy) for one in found]

    def request(self, context: list[int], continuation: list[int]) -> Request:
        """ids of both, of which the last ones are kept: as many as the model reads, and one that is only predicted.
        DataError: there is nothing to predict."""
        if not continuation:
            raise DataError("a task of lm-eval asks for the likelihood of an empty text; leave this task out")
        whole = [*context, *continuation]
        if len(whole) > self.max_length + 1:
            self.cut.add(tuple(context))
            whole = whole[-(self.max_length + 1):]
        split = max(1, len(whole) - len(continuation))
        return Request(tuple(whole[:split]), tuple(whole[split:]))

    def encoded(self, pair: Arguments) -> Request:
        """(context, continuation) as texts. An empty context is a BOS."""
        context, continuation = pair
        if not context:
            return self.request([self.prefix_token_id], self.tok_encode(continuation, False))
        before, after = self._encode_pair(context, continuation)
        return self.request(before, after or self.tok_encode(continuation, False))

    def _plan(self, pairs: Sequence[Arguments]) -> list[list[int]]:
        return self.scorer.plan([self.encoded(pair) for pair in pairs])

    def _score(self, pairs: list[Arguments]) -> list[Any]:
        return [[one.logprob, one.greedy] for one in self.scorer.score_batch([self.encoded(pair) for pair in pairs])]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM.loglikelihood_rolling`: a text after BOS, in windows of the context's length."""
        found: list[float] = self.answers.of("rolling", [tuple(one.args) for one in requests], self._plan_texts,
                                             self._roll)
        return found

    def windows(self, text: str) -> list[Request]:
        """Every token of a text once, in pieces as long as the context, each after the last token of the piece
        before."""
        ids = self.tok_encode(text, False)
        pairs = map(make_disjoint_window, get_rolling_token_windows(
            token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1))
        return [Request(tuple(context), tuple(continuation)) for context, continuation in pairs]

    def _plan_texts(self, texts: Sequence[Arguments]) -> list[list[int]]:
        """Texts of about a batch of tokens, the longest first."""
        lengths = [len(self.tok_encode(text)) for (text,) in texts]
        return by_length(lengths, lambda longest: max(1, self.scorer.batch_tokens // longest))

    def _roll(self, texts: list[Arguments]) -> list[Any]:
        windows = [self.windows(text) for (text,) in texts]
        scores = iter(self.scorer.score([one for group in windows for one in group]))
        return [sum(next(scores).logprob for _ in group) for group in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`: greedy, unless a task asks for a temperature."""
        asked = with_occurrences(requests)
        for prompt, options, _ in asked:
            ids, room = self.tok_encode(prompt), self._room(sampling_of(options))
            if len(ids) > room:
                self.cut.add(tuple(ids))
        found: list[str] = self.answers.of(
            "generate", asked, lambda prompts: by_length([len(one[0]) for one in prompts],
                                                         lambda _: GENERATED_AT_ONCE), self._generate)
        return found

    def _room(self, wish: Sampling) -> int:
        """The most tokens of a prompt, so that there is room for what it asks for, or for half of the context."""
        return self.max_length - 1 - min(wish.max_tokens, self.max_length // 2)

    def _generate(self, prompts: list[Arguments]) -> list[Any]:
        """Prompts with the same wishes decode together."""
        found: dict[int, str] = {}
        boundaries: Literal["sampled", "thresholded"] = "sampled" if self.scorer.drawn else "thresholded"
        wishes = [replace(sampling_of(options), seed=occurrence, boundaries=boundaries)
                  for _, options, occurrence in prompts]
        for wish in dict.fromkeys(wishes):
            numbers = [number for number, one in enumerate(wishes) if one == wish]
            ids = [self.tok_encode(prompts[number][0])[-self._room(wish):] for number in numbers]
            texts = Generator(self.scorer.model, self.ids, self.max_length).generate(
                ids, wish, batch_size=GENERATED_AT_ONCE)
            found |= {number: one.text for number, one in zip(numbers, texts, strict=True)}
        return [found[number] for number in range(len(prompts))]


class HubLM(HFLM):
    """A model of transformers: lm-eval's own class, whose answers are shared and kept."""

    answers: Answers

    def __init__(self, path: str, device: str, dtype: str, batch_size: int, context: int | None,
                 trust_remote_code: bool) -> None:
        """answers: to be set. context: the most tokens of a text; the model's own where nothing is said."""
        with _alone():
            super().__init__(pretrained=path, device=device, dtype=dtype, batch_size=batch_size, max_length=context,
                             trust_remote_code=trust_remote_code)
        self._rank, self._world_size = 0, 1

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        ask = super().loglikelihood
        return [(score, greedy) for score, greedy in
                self._shared("loglikelihood", requests, lambda some: ask(some, disable_tqdm=True))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        ask = super().loglikelihood_rolling
        return self._shared("rolling", requests, lambda some: ask(some, disable_tqdm=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        ask = super().generate_until
        return self._shared("generate", requests, lambda some: ask(some, disable_tqdm=True), with_occurrences(requests))

    def _shared(self, kind: str, requests: list[Instance], ask: Callable[[list[Instance]], list[Any]],
                asked: list[Arguments] | None = None) -> list[Any]:
        asked = asked or [tuple(one.args) for one in requests]
        by_arguments = {repr(arguments): one for arguments, one in zip(asked, requests, strict=True)}

        def compute(some: list[Arguments]) -> list[Any]:
            return [list(one) if isinstance(one, tuple) else one
                    for one in ask([by_arguments[repr(arguments)] for arguments in some])]

        return self.answers.of(kind, asked, lambda all_of_them: by_length(
            [len(str(one)) for one in all_of_them], lambda _: HUB_BATCH), compute)


@contextmanager
def _alone() -> Iterator[None]:
    """lm-eval's class would make itself one of the ranks, and share the questions a second time."""
    hidden = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
              if name in os.environ}
    try:
        yield
    finally:
        os.environ |= hidden


def with_occurrences(requests: Sequence[Instance]) -> list[Arguments]:
    """(prompt, options, how many equal ones came before): a task that draws several texts for a prompt wants others;
    0 where nothing is drawn."""
    times: Counter[str] = Counter()
    asked: list[Arguments] = []
    for one in requests:
        prompt, options = one.args
        key = repr(one.args)
        drawn = normalize_gen_kwargs(dict(options), NEW_TOKENS)["do_sample"]
        asked.append((prompt, options, times[key] if drawn else 0))
        times[key] += 1
    return asked


def by_length(lengths: Sequence[int], most: Callable[[int], int]) -> list[list[int]]:
    """Batches of numbers, the longest first; most: how many of a batch whose longest has that length."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches: list[list[int]] = []
    while order:
        count = most(lengths[order[0]])
        batches.append(order[:count])
        order = order[count:]
    return batches


def sampling_of(options: dict[str, Any]) -> Sampling:
    """lm-eval's `generation_kwargs`. ConfigError: one that this generator does not know."""
    wished = normalize_gen_kwargs(dict(options), NEW_TOKENS)
    known = {"until", "max_gen_toks", "temperature", "do_sample", "top_k", "top_p"}
    if unknown := sorted(set(wished) - known):
        raise ConfigError(f"generation_kwargs: {unknown[0]} is not one of {', '.join(sorted(known))}; this generator "
                          "cannot do it, leave the task out")
    return Sampling(
        temperature=float(wished["temperature"]) if wished["do_sample"] else 0.0, top_k=int(wished.get("top_k") or 0),
        top_p=float(wished.get("top_p") or 1.0), max_tokens=int(wished["max_gen_toks"]),
        stop=tuple(one for one in wished["until"] if one))

