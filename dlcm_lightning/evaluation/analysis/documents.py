"""Validation documents, cut into the concepts that the model makes of them, token by token.

A *cell* is the fewest tokens that make whole characters: most are one token, and a character that is spelled in several
tokens is one cell of several. So no character is cut. Bytes that make no character, as where a row ends inside one,
become U+FFFD. A cell belongs to the concept that pools its last token. Texts are foreign: they are kept as they are in
the JSON, and whoever shows them has to escape them.
"""

from __future__ import annotations

import codecs
import itertools
from typing import Any

import numpy as np

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens

SHOWN = 240
"""Tokens of each document at most."""
LEAST = 32
"""Tokens that a document should have in its row to be chosen."""
DIGITS = 4


def documents(tokens: Tokens, answer: Answer, tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """count documents of each domain, in turn of each of its sources, spread evenly over those that begin there."""
    found = {}
    for domain in tokens.present:
        found[tokens.names[domain]] = [
            {"cells": cells_of(tokens, answer, tokenizer, begin, end), "tokens": min(end - begin, SHOWN),
             "shortened": end - begin > SHOWN}
            for begin, end in _chosen(tokens, tokenizer, domain, count)]
    return {"domains": found}


def _chosen(tokens: Tokens, tokenizer: Tokenizer, domain: int, count: int) -> list[tuple[int, int]]:
    """Where pieces begin and end. Short and cut ones are taken only where a source has no others."""
    by_source: dict[int, list[tuple[int, int]]] = {}
    for begin, end in itertools.pairwise(tokens.starts.tolist()):
        if tokens.domains[begin] == domain:
            by_source.setdefault(int(tokens.sources[begin]), []).append((begin, end))
    groups = []
    for pieces in by_source.values():
        whole = [(begin, end) for begin, end in pieces
                 if tokens.ids[begin] == tokenizer.bos_id and end - begin >= LEAST]
        groups.append(whole or pieces)
    each = -(-count // len(groups))  # of a source, at most
    spread = [[group[number * len(group) // taken] for number in range(taken)]
              for group in groups for taken in [min(each, len(group))]]
    in_turn = [one for round_ in itertools.zip_longest(*spread) for one in round_ if one is not None]
    return sorted(in_turn[:count])


def cells_of(tokens: Tokens, answer: Answer, tokenizer: Tokenizer, begin: int, end: int, shown: int = SHOWN
             ) -> list[dict[str, Any]]:
    """Of the first tokens of the piece [begin, end), up to the last whole character of those shown. Each token has its
    p, how many tokens its concept pools (None after the last boundary, where nobody pools), and its own loss in nats
    (None for the first, which nothing predicts)."""
    concepts, lengths = concepts_of(answer, begin, end)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    cells: list[dict[str, Any]] = []
    text, inside = "", list[dict[str, Any]]()
    for place, piece in enumerate(tokenizer.pieces(tokens.ids[begin:min(end, begin + shown)])):
        at = begin + place
        predicted = place > 0 and tokens.targets[at - 1] >= 0
        text += decoder.decode(piece, final=at == end - 1)
        inside.append({
            "p": None if answer.probabilities is None else round(float(answer.probabilities[at]), DIGITS),
            "boundary": None if answer.boundaries is None else bool(answer.boundaries[at]),
            "length": lengths[place], "loss": round(float(answer.nll[at - 1]), DIGITS) if predicted else None})
        if not decoder.getstate()[0]:
            cells.append({"text": text, "concept": concepts[place], "tokens": inside})
            text, inside = "", []
    return cells


def concepts_of(answer: Answer, begin: int, end: int) -> tuple[list[int | None], list[int | None]]:
    """Of each token in [begin, end): the number of the concept that pools it, and that concept's length; None where no
    boundary follows."""
    if answer.boundaries is None:
        return [None] * (end - begin), [None] * (end - begin)
    boundaries = answer.boundaries[begin:end]
    owner = np.cumsum(boundaries) - boundaries
    sizes = np.bincount(owner).tolist()
    closed = int(boundaries.sum())
    numbers = [one if one < closed else None for one in owner.tolist()]
    return list(numbers), [None if one is None else sizes[one] for one in numbers]
