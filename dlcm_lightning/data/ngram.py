"""Floors: what counting alone reaches in bits per byte on the validation rows of a run.

Two models, scored per domain on exactly the targets the network is scored on: every in-document target, EOS included,
of the validation rows. They are fitted on the training split, of that domain alone (a stricter floor: counting knows
the domain, the network has to find it out) or of all domains together, as often as their tokens stand there. Bits
per byte = -sum log2 p / bytes of these targets, so the figures stand beside the network's whatever the tokenizer.

- unigram: p(c) = (n(c) + 1) / (N + V).
- trigram: absolute discounting, interpolated down to bigram and unigram:
      p(c | h) = max(n(hc) - d, 0) / n(h) + d * k(h) / n(h) * p(c | shorter h),
  k(h) kinds of successors of h, d = n1 / (n1 + 2 n2) per order (Ney). It sums to one for every history, and an
  unseen history passes all weight on.

Histories stay within a document; before its first token stands a sign of its own. N-grams are packed into int64
and counted by sorting: nine million tokens take some seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.source import Source


@dataclass(frozen=True)
class NgramBaseline:
    """Bits per byte on one domain's validation rows."""

    domain: str
    unigram: float
    trigram: float
    targets: int
    target_bytes: int


@dataclass(frozen=True)
class Histories:
    """All targets of a stretch of text with the two tokens before each; (n,) int64 each."""

    older: np.ndarray
    """The token before `last`, or V where `last` begins the document."""
    last: np.ndarray
    target: np.ndarray


FITTED_TOKENS = 2**25
"""At most so many tokens of a source are counted, from its beginning: baselines of a large corpus are no less useful,
and counting sorts in memory."""


def ngram_baselines(reader: Reader, fitted_on: Literal["domain", "mixture"] = "domain") -> list[NgramBaseline]:
    """One per domain that has a source in use, in the order of `Reader.domains`."""
    vocabulary = len(reader.token_bytes)
    domains = [domain for domain in reader.domains if reader.training_stream(domain)]

    def fitted(chosen: list[str]) -> Histories:
        return _joined([_histories(stream, min(stream.tokens, FITTED_TOKENS), vocabulary)
                        for domain in chosen for stream in reader.training_stream(domain)])

    everything = fitted(domains) if fitted_on == "mixture" else None
    found = []
    for domain in domains:
        validation = _joined([_histories(stream, rows * reader.config.sequence_length + 1, vocabulary)
                              for stream, rows in reader.validation_stream(domain) if rows])
        training = fitted([domain]) if everything is None else everything
        unigram, trigram = log2_probabilities(training, validation, vocabulary)
        size = int(reader.token_bytes[validation.target].sum())
        found.append(NgramBaseline(domain, float(-unigram.sum() / size), float(-trigram.sum() / size),
                           len(validation.target), size))
    return found


def log2_probabilities(training: Histories, scored: Histories, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """log2 p of every scored target under the unigram and under the trigram fitted on `training`; (n,) float64."""
    base = vocabulary + 1
    counts = np.bincount(training.target, minlength=vocabulary)
    unigram = ((counts + 1) / (counts.sum() + vocabulary))[scored.target]
    bigram = _interpolated(training.last * base + training.target, scored.last * base + scored.target, base, unigram)
    history, query = training.older * base + training.last, scored.older * base + scored.last
    trigram = _interpolated(history * base + training.target, query * base + scored.target, base, bigram)
    return np.log2(unigram), np.log2(trigram)


def _interpolated(training: np.ndarray, scored: np.ndarray, base: int, lower: np.ndarray) -> np.ndarray:
    """p of scored n-grams (history * base + token) given those of training and the lower order's p of each."""
    grams, counts = np.unique(training, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    histories, first = np.unique(grams // base, return_index=True)
    totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
    place, known = _find(histories, scored // base)
    total = np.where(known, totals[place], 1)
    gram, met = _find(grams, scored)
    own = np.where(met, counts[gram] - discount, 0.0) / total
    passed_on = np.where(known, discount * kinds[place] / total, 1.0)
    mixed: np.ndarray = own + passed_on * lower
    return mixed


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of each value in a sorted array (any where it is missing), and whether it is there."""
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return place, ordered[place] == values


def _histories(stream: Source, count: int, vocabulary: int) -> Histories:
    """The targets among the first `count` tokens of a source."""
    tokens, starts = stream.read(0, count)
    begins = np.zeros(count, dtype=bool)
    begins[starts] = True
    older = np.concatenate([[vocabulary], tokens[:-1]])
    older[begins] = vocabulary
    within = ~begins[1:]
    return Histories(older[:-1][within], tokens[:-1][within], tokens[1:][within])


def _joined(parts: list[Histories]) -> Histories:
    return Histories(*(np.concatenate([getattr(part, name) for part in parts])
                       for name in ("older", "last", "target")))
