"""Log-likelihoods of continuations of contexts, many at once.

A choice of four answers to a question is four continuations of one context. The context goes through the model once,
packed with others (`LanguageModel.prefill`); its state is copied, and only the continuations follow
(`LanguageModel.extend`). Where every continuation is a single token, or there is only one, a plain packed forward does.

Boundaries are a property of the text: thresholded ones follow from the tokens before, drawn ones from noise that is a
function of (context, position). So a score does not depend on what else is in the batch but for rounding, nor on the
continuation's length.

Axes: N tokens of a batch, D token width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dlcm_lightning.inference.sampling import key_of
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.noise import uniform_at
from dlcm_lightning.ops.segments import Segments

BATCH_TOKENS = 8192
"""Of a batch, unless one context with its continuations is longer."""
STATE_TOKENS = 4
"""The caches of a batch hold at most so many times its tokens: each continuation has one of the longest's length."""
ROWS_AT_ONCE = 1024
"""Of logits."""


@dataclass(frozen=True)
class Request:
    """What is asked of the model."""

    context: tuple[int, ...]
    """Ids, at least one."""
    continuation: tuple[int, ...]
    """Ids, at least one."""


@dataclass(frozen=True)
class Score:
    """What it says."""

    logprob: float
    """Nats: of the continuation after the context, summed over its tokens."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""


@dataclass(frozen=True)
class _Piece:
    """Continuations of one context."""

    numbers: list[int]
    tokens: int
    """That go through the model."""
    longest: int
    """Of context and a continuation."""


class Scorer:
    """A model that is asked."""

    def __init__(self, model: LanguageModel, boundaries: Boundaries = "thresholded", *,
                 batch_tokens: int = BATCH_TOKENS, seed: int = 0) -> None:
        """seed: of boundaries that are drawn. ConfigError: boundaries that the model does not have."""
        model.cut_by(boundaries)
        self.model, self.batch_tokens, self.seed = model.eval(), batch_tokens, seed
        self.drawn = boundaries == "sampled"

    def plan(self, requests: Sequence[Request]) -> list[list[int]]:
        """Batches of requests by their numbers, the longest first; continuations of one context stay together as far as
        there is room. A function of the requests alone, so that every rank plans the same."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.context, []).append(number)
        pieces = [piece for context, numbers in groups.items() for piece in self._pieces(context, numbers, requests)]
        batches: list[list[int]] = []
        tokens = longest = 0
        for piece in sorted(pieces, key=lambda one: -one.tokens):
            longest = max(longest, piece.longest)
            count = len(batches[-1]) + len(piece.numbers) if batches else 0
            if not batches or tokens + piece.tokens > self.batch_tokens or (
                    count * longest > STATE_TOKENS * self.batch_tokens):
                batches.append([])
                tokens, longest = 0, piece.longest
            batches[-1] += piece.numbers
            tokens += piece.tokens
        return batches

    def _pieces(self, context: tuple[int, ...], numbers: list[int], requests: Sequence[Request]) -> Iterator[_Piece]:
        """Of the continuations of one context, as many at a time as there is room for; at least one."""
        taken: list[int] = []
        tokens = longest = len(context)
        for number in numbers:
            more = len(requests[number].continuation) - 1
            furthest = max(longest, len(context) + more)
            if taken and (tokens + more > self.batch_tokens
                          or (len(taken) + 1) * furthest > STATE_TOKENS * self.batch_tokens):
                yield _Piece(taken, tokens, longest)
                taken, tokens, furthest = [], len(context), len(context) + more
            taken.append(number)
            tokens, longest = tokens + more, furthest
        yield _Piece(taken, tokens, longest)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """In the order of the requests, in batches of `plan`."""
        found: list[Score | None] = [None] * len(requests)
        for batch in self.plan(requests):
            for number, score in zip(batch, self.score_batch([requests[one] for one in batch]), strict=True):
                found[number] = score
        return [score for score in found if score is not None]

    @torch.inference_mode()
    def score_batch(self, requests: Sequence[Request]) -> list[Score]:
        """Of one batch: two passes at most, of what shares its context and of what does not."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.context, []).append(number)
        shared = {context: numbers for context, numbers in groups.items()
                  if len(numbers) > 1 and any(len(requests[one].continuation) > 1 for one in numbers)}
        plain = [number for context, numbers in groups.items() if context not in shared for number in numbers]
        found: dict[int, Score] = {}
        if plain:
            found |= zip(plain, self._plain([requests[number] for number in plain]), strict=True)
        if shared:
            numbers = [number for group in shared.values() for number in group]
            found |= zip(numbers, self._shared([[requests[one] for one in group] for group in shared.values()]),
                         strict=True)
        return [found[number] for number in range(len(requests))]

    def _plain(self, requests: list[Request]) -> list[Score]:
        """By a packed forward over each context and all of its continuation but the last token. Equal texts run
        once."""
        read = [((*one.context, *one.continuation[:-1]), one.context if self.drawn else ()) for one in requests]
        starts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # drawn boundaries are a matter of the context
        length = 0
        for one in read:
            if one not in starts:
                starts[one] = length
                length += len(one[0])
        documents = Segments.from_lengths([len(text) for text, _ in starts], self.model.where)
        noise = self._noise([(context, 0, len(text)) for text, context in starts])
        hidden = self.model(self._ids(token for text, _ in starts for token in text), documents, noise).hidden
        rows = [starts[text] + len(one.context) - 1 + place for text, one in zip(read, requests, strict=True)
                for place in range(len(one.continuation))]
        return self._scores(hidden[self._ids(rows)], requests)

    def _shared(self, groups: list[list[Request]]) -> list[Score]:
        """By the states of contexts that several continuations go on."""
        requests = [request for group in groups for request in group]
        contexts = [group[0].context for group in groups]
        longest = max(len(one.context) + len(one.continuation) - 1 for one in requests)
        state = self.model.new_state(len(requests), longest)
        firsts = list(accumulate((len(group) for group in groups[:-1]), initial=0))
        counts = [len(context) for context in contexts]
        prefilled = self.model.prefill(self._ids(token for context in contexts for token in context), counts, firsts,
                                       state, self._noise([(context, 0, len(context)) for context in contexts]))
        copies = [(first, slot) for first, group in zip(firsts, groups, strict=True)
                  for slot in range(first + 1, first + len(group))]
        state.copy([source for source, _ in copies], [target for _, target in copies])
        longer = [slot for slot, one in enumerate(requests) if len(one.continuation) > 1]
        pieces = [requests[slot].continuation[:-1] for slot in longer]
        noise = self._noise([(requests[slot].context, len(requests[slot].context), len(piece))
                             for slot, piece in zip(longer, pieces, strict=True)])
        extended = self.model.extend(self._ids(token for piece in pieces for token in piece),
                                     [len(piece) for piece in pieces], longer, state, noise)
        hidden = torch.cat([prefilled.hidden, extended.hidden])
        ends = list(accumulate(counts))
        begins = dict(zip(longer, accumulate((len(piece) for piece in pieces[:-1]), initial=ends[-1]), strict=True))
        rows: list[int] = []
        for number, (first, group) in enumerate(zip(firsts, groups, strict=True)):
            for slot in range(first, first + len(group)):
                rows.append(ends[number] - 1)
                rows += range(begins.get(slot, 0), begins.get(slot, 0) + len(requests[slot].continuation) - 1)
        return self._scores(hidden[self._ids(rows)], requests)

    def _scores(self, hidden: Tensor, requests: list[Request]) -> list[Score]:
        """hidden (tokens of all continuations, D): what predicts each of them."""
        targets = self._ids(token for one in requests for token in one.continuation)
        logprobs, greedy = [], []
        for rows, wanted in zip(hidden.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
            logits = self.model.logits(rows)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logprobs.append(logits.log_softmax(-1).gather(1, wanted[:, None]).squeeze(1))
            greedy.append(logits.argmax(-1) == wanted)
        lengths = [len(one.continuation) for one in requests]
        return [Score(float(values.sum()), bool(flags.all())) for values, flags in
                zip(torch.cat(logprobs).cpu().double().split(lengths), torch.cat(greedy).cpu().split(lengths),
                    strict=True)]

    def _noise(self, pieces: list[tuple[tuple[int, ...], int, int]]) -> Tensor | None:
        """For pieces (context, place of the first token in its text, tokens); None where boundaries are not drawn."""
        if not self.drawn or self.model.config.kind == "dense":
            return None
        keys = [key_of(self.seed, context, 0, "boundary") for context, _, _ in pieces]
        return uniform_at(
            self._ids(key for key, (_, _, count) in zip(keys, pieces, strict=True) for _ in range(count)),
            self._ids(place for _, first, count in pieces for place in range(first, first + count)))

    def _ids(self, numbers: Iterator[int] | list[int] | range) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device="cpu").to(self.model.where)
