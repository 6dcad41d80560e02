"""Text from a model: prompts go in, a batch decodes together, finished texts make room for waiting ones.

Every step gives each sequence of the batch one token (`LanguageModel.step`). The active sequences are the first slots
of the model's state: where one ends, a waiting prompt takes its slot, or the last sequence moves there, so that caches
are read in place. Samples of one prompt share its prefill.

In fp32 a text is the same whatever else is in the batch but for rounding, which moves a choice where two are equally
likely to six digits: draws are a function of (seed, prompt, sample, position). `Sampling` says what can be asked.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import ConfigError, RunError
from dlcm_lightning.export.portable import model_of, open_trained
from dlcm_lightning.inference.sampling import Sampling, choose, key_of, utf8
from dlcm_lightning.inference.text import TextStream
from dlcm_lightning.model.cache import DecodingState
from dlcm_lightning.model.dlcm import Extended, LanguageModel
from dlcm_lightning.ops.device import on_gpu
from dlcm_lightning.ops.noise import uniform_at

PREFILL_TOKENS = 8192
"""Of prompts that go through the model at once, unless one alone is longer."""
FIRST_CAPACITY = 1024
"""Tokens for which caches are made at most, before they grow."""
Finish = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class Begun:
    """A prompt that the model has read."""

    prompt: int
    """Number of the prompt, from 0."""
    sample: int
    prompt_ids: list[int]
    """BOS in front."""
    boundaries: list[bool]
    """Whether each of them closes a concept; empty for a dense model."""


@dataclass(frozen=True)
class Piece:
    """New text of one sequence."""

    prompt: int
    """Number of the prompt, from 0."""
    sample: int
    text: str
    concept: int
    """Number of the concept in its sequence, from 0."""


@dataclass(frozen=True)
class Completion:
    """A text that has ended."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    """BOS in front."""
    ids: list[int]
    """New tokens, EOS included where it ended the text."""
    text: str
    """Behind the prompt."""
    text_bytes: int
    """What it takes in its tokens, which may end inside a character."""
    finish: Finish
    """Why it ended: EOS, a stop string, `max_tokens`, or the model's context."""
    boundaries: list[bool]
    """Of every token that the model has read, prompt and new ones but for the last: whether it closes a concept. Empty
    for a dense model."""

    @property
    def concepts(self) -> int:
        """Closed, of prompt and text."""
        return sum(self.boundaries)


@dataclass
class _Sequence:
    """A text in the making."""

    prompt: int
    sample: int
    prompt_ids: list[int]
    stream: TextStream
    key: int
    boundary_key: int
    most: int
    """New tokens that there is room for in the context."""
    ids: list[int] = field(default_factory=list)
    boundaries: list[bool] = field(default_factory=list)
    concepts: int = 0
    """Closed so far."""


class Generator:
    """A model, its tokenizer, and the longest text that it was trained on."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, context: int) -> None:
        """context: tokens of prompt and text together, at most. ConfigError: the tokenizer has other ids than the
        model."""
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(f"tokenizer.json: {tokenizer.vocab_size:,} ids, but the model knows "
                              f"{model.config.vocab_size:,} (model.vocab_size); take the tokenizer it was trained with")
        self.model, self.tokenizer, self.context = model.eval(), tokenizer, context
        banned = torch.zeros(model.config.vocab_size, dtype=torch.bool, device="cpu")
        banned[tokenizer.bos_id] = True  # no text holds it
        banned[tokenizer.vocab_size:] = True
        self._banned = banned.to(model.where)

    @staticmethod
    def load(place: str | Path, *, step: int | None = None, precision: Literal["auto", "fp32", "bf16"] = "auto",
             context: int | None = None) -> Generator:
        """place: a run's directory, or what `dlcm export` wrote. step: of a run's checkpoint. precision: auto is bf16
        on a GPU, fp32 on a CPU, where it is exact and texts are reproducible. context: the run's sequence length.
        CheckpointError: there is no model, or a damaged one."""
        device = torch.device("cuda" if on_gpu() else "cpu")
        low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        dtype = torch.bfloat16 if low else torch.float32
        trained = open_trained(place, step)
        model = model_of(trained.config, trained.state, dtype, device, str(trained.place))
        trained.check(model)
        return Generator(model, trained.tokenizer, context or trained.config.data.sequence_length)

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = Sampling(),  # noqa: B008 - frozen
                 *, samples: int = 1, batch_size: int = 8) -> list[Completion]:
        """Texts that go on the prompts, in the order of prompts and, for each, samples. See `stream`."""
        done = [one for one in self.stream(prompts, sampling, samples=samples, batch_size=batch_size)
                if isinstance(one, Completion)]
        return sorted(done, key=lambda one: (one.prompt, one.sample))

    @torch.inference_mode()
    def stream(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling = Sampling(),  # noqa: B008 - frozen
               *, samples: int = 1, batch_size: int = 8) -> Iterator[Begun | Piece | Completion]:
        """Pieces of text as they come, and each text when it has ended.

        prompts: texts, or ids, to which BOS is put in front where it is missing. An empty one begins a document.
        batch_size: sequences that decode together. ConfigError: a prompt fills the context or is none. RunError: the
        model gives no numbers.
        """
        if isinstance(prompts, str):
            raise ConfigError(f"prompts = {prompts!r}: give several, as [{prompts!r}]")
        if samples < 1 or batch_size < 1:
            raise ConfigError(f"samples = {samples}, batch_size = {batch_size}: each must be at least 1")
        waiting = deque(self._sequences(prompts, sampling, samples))
        slots = min(batch_size, len(waiting))
        longest = max((len(one.prompt_ids) + min(sampling.max_tokens, one.most) for one in waiting), default=1)
        state = self.model.new_state(slots, min(longest, FIRST_CAPACITY))
        active: list[_Sequence] = []
        seen = (torch.zeros(slots, self.model.config.vocab_size, dtype=torch.bool, device=self.model.where)
                if sampling.repetition_penalty != 1 else None)
        while waiting or active:
            if active:
                rows = list(range(len(active)))
                tokens = self._on_device([one.ids[-1] for one in active])
                extended = self.model.step(tokens, rows, state, self._noise(active, [1] * len(active), sampling))
                for one, closed in zip(active, _boundaries(extended, len(active)), strict=True):
                    _note(one, [closed] if closed is not None else [])
                yield from self._next(extended.hidden, active, sampling, seen)
                yield from self._leave(active, state, sampling, seen)
            while waiting and len(active) < slots:
                come = self._take(waiting, slots - len(active))
                first = len(active)
                active += come
                hidden = self._prefill(come, first, state, sampling)
                yield from (Begun(one.prompt, one.sample, one.prompt_ids, list(one.boundaries)) for one in come)
                if seen is not None:
                    for slot, one in enumerate(come, first):
                        seen[slot] = False
                        seen[slot, self._on_device(one.prompt_ids)] = True
                yield from self._next(hidden, come, sampling, None if seen is None else seen[first:])
                yield from self._leave(active, state, sampling, seen)

    def _leave(self, active: list[_Sequence], state: DecodingState, sampling: Sampling, seen: Tensor | None
               ) -> Iterator[Piece | Completion]:
        """Texts that have ended make room; the last sequence moves into the gap."""
        for slot in reversed(range(len(active))):
            if finish := self._finish(active[slot], sampling):
                yield from self._closed(active[slot], finish)
                last = active.pop()
                if slot < len(active):
                    active[slot] = last
                    state.copy([len(active)], [slot])
                    if seen is not None:
                        seen[slot] = seen[len(active)]

    def _sequences(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling, samples: int
                   ) -> Iterator[_Sequence]:
        times: Counter[tuple[int, ...]] = Counter()
        stops = [utf8(one, "stop") for one in sampling.stop]
        for number, prompt in enumerate(prompts):
            ids = self.encode(prompt, number)
            for sample in range(samples):
                occurrence = times[tuple(ids)]
                times[tuple(ids)] += 1
                yield _Sequence(number, sample, ids, TextStream(stops), key_of(sampling.seed, ids, occurrence, "token"),
                                key_of(sampling.seed, ids, occurrence, "boundary"), self.context - len(ids))

    def encode(self, prompt: str | Sequence[int], number: int = 0) -> list[int]:
        """BOS, then the prompt's ids. ConfigError: no UTF-8, ids that the model does not know, or it fills the
        context."""
        name, bos = f"prompt {number + 1}", self.tokenizer.bos_id
        if isinstance(prompt, str):
            utf8(prompt, name)
            ids = self.tokenizer.encode_documents([prompt])[0][:-1].tolist()
        else:
            ids = [int(one) for one in prompt]
            ids = ids if ids[:1] == [bos] else [bos, *ids]
            if wrong := [one for one in ids if not 0 <= one < self.model.config.vocab_size]:
                raise ConfigError(f"{name}: id {wrong[0]} is none of the model's {self.model.config.vocab_size:,}")
        if len(ids) >= self.context:
            raise ConfigError(f"{name} has {len(ids):,} tokens, and the context is {self.context:,}: shorten it, or "
                              "widen --context beyond what the model was trained on")
        return ids

    @staticmethod
    def _take(waiting: deque[_Sequence], most: int) -> list[_Sequence]:
        """The next sequences, as many as may go through the model at once."""
        come = [waiting.popleft()]
        while waiting and len(come) < most and (
                sum(len(one.prompt_ids) for one in come) + len(waiting[0].prompt_ids) <= PREFILL_TOKENS):
            come.append(waiting.popleft())
        return come

    def _prefill(self, come: list[_Sequence], first: int, state: DecodingState, sampling: Sampling) -> Tensor:
        """(len(come), D): hidden states after the prompts, in slots from `first` on; equal prompts run once."""
        shared = sampling.boundaries == "thresholded"
        leaders: dict[tuple[int, ...], int] = {}
        of = [leaders.setdefault((*one.prompt_ids, -1 if shared else -2 - row), row) for row, one in enumerate(come)]
        rows = list(leaders.values())
        counts = [len(come[row].prompt_ids) for row in rows]
        tokens = self._on_device([token for row in rows for token in come[row].prompt_ids])
        extended = self.model.prefill(tokens, counts, [first + row for row in rows], state,
                                      self._noise([come[row] for row in rows], counts, sampling))
        followers = [row for row, leader in enumerate(of) if leader != row]
        if followers:
            state.copy([first + of[row] for row in followers], [first + row for row in followers])
        flags = None if extended.segmentation is None else extended.segmentation.boundaries.cpu().split(counts)
        ends = torch.tensor(counts, device="cpu").cumsum(0) - 1
        where = {row: number for number, row in enumerate(rows)}
        for row, one in enumerate(come):
            _note(one, [] if flags is None else flags[where[of[row]]].tolist())
        return extended.hidden[self._on_device([int(ends[where[of[row]]]) for row in range(len(come))])]

    def _noise(self, sequences: list[_Sequence], counts: list[int], sampling: Sampling) -> Tensor | None:
        """For the next tokens of each sequence; None where boundaries are thresholded."""
        if sampling.boundaries == "thresholded" or self.model.config.kind == "dense":
            return None
        keys = [one.boundary_key for one, count in zip(sequences, counts, strict=True) for _ in range(count)]
        places = [place for one, count in zip(sequences, counts, strict=True)
                  for place in range(len(one.boundaries), len(one.boundaries) + count)]
        return uniform_at(self._on_device(keys), self._on_device(places))

    def _next(self, hidden: Tensor, sequences: list[_Sequence], sampling: Sampling, seen: Tensor | None
              ) -> Iterator[Piece]:
        """A token for each sequence, from the (n, D) hidden states of its last one."""
        logits = self.model.logits(hidden).masked_fill(self._banned, float("-inf"))
        drawn = uniform_at(self._on_device([one.key for one in sequences]),
                           self._on_device([len(one.ids) for one in sequences]))
        seen = None if seen is None else seen[: len(sequences)]
        chosen = choose(logits, sampling, drawn, seen)
        if seen is not None:
            seen[torch.arange(len(sequences), device=chosen.device), chosen] = True
        lost = logits.isnan().any(-1)
        for one, token, no_number in zip(sequences, chosen.tolist(), lost.tolist(), strict=True):
            if no_number:
                raise RunError(f"prompt {one.prompt + 1}: the model's logits are not numbers; was the run that trained "
                               "it well? dlcm evaluate says")
            one.ids.append(token)
            if token != self.tokenizer.eos_id:
                spans = one.stream.add(self.tokenizer.pieces([token])[0], one.concepts)
                yield from (Piece(one.prompt, one.sample, text, concept) for text, concept in spans)

    def _finish(self, one: _Sequence, sampling: Sampling) -> Finish | None:
        if one.ids[-1] == self.tokenizer.eos_id:
            return "eos"
        if one.stream.stopped:
            return "stop"
        if len(one.ids) >= sampling.max_tokens:
            return "length"
        return "context" if len(one.ids) >= one.most else None

    @staticmethod
    def _closed(one: _Sequence, finish: Finish) -> Iterator[Piece | Completion]:
        if finish != "stop":
            yield from (Piece(one.prompt, one.sample, text, concept) for text, concept in one.stream.close())
        yield Completion(one.prompt, one.sample, one.prompt_ids, one.ids, one.stream.text,
                         len(one.stream.content), finish, one.boundaries)

    def _on_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device="cpu").to(self.model.where)


def _boundaries(extended: Extended, rows: int) -> list[bool | None]:
    return [None] * rows if extended.segmentation is None else extended.segmentation.boundaries.tolist()


def _note(one: _Sequence, closed: list[bool]) -> None:
    """What the model has found of the tokens that it has just read."""
    one.boundaries += closed
    one.concepts += sum(closed)
