"""Whether boundaries fall on words, sentences, lines and signs, more than chance would have them.

Over tokens of text that could be a boundary or not (first tokens of pieces and control tokens are left out): b_t the
thresholded decision, a_t whether the token holds the last byte of a unit (convention `last`) or the first byte of the
next one (convention `next`, see `text_units`).

    precision = |b and a| / |b|,   recall = |b and a| / |a|,   F1 = 2 |b and a| / (|b| + |a|)

Chance puts each piece's k boundaries on any k of its n tokens, all choices alike. Of its a aligned tokens it then hits
k a / n on average: *exactly*, no drawing is needed. Random precision is the sum of that over pieces by the number of
boundaries; enrichment = precision / random precision. A sentence end is rare, so that its precision is low even where
every sentence ends a concept; recall and enrichment tell.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens
from dlcm_lightning.evaluation.analysis.text_units import KINDS, units_of
from dlcm_lightning.progress import progress_bar

Convention = Literal["last", "next"]
CONVENTIONS: tuple[Convention, ...] = ("last", "next")
LEAST_DRAWN = 50
"""Units below which a number is in the table only."""


def holding(ends: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """(n,) bool: whether each token of a piece holds one of these bytes. ends (n,): bytes up to and with each."""
    held = np.zeros(len(ends), dtype=bool)
    held[np.searchsorted(ends, np.asarray(places, dtype=np.int64), side="right")] = True
    return held


def alignment(tokens: Tokens, answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    """By domain, kind of unit and convention."""
    assert answer.boundaries is not None
    tallies = {(domain, kind, convention): np.zeros(5) for domain in [-1, *tokens.present] for kind in KINDS
               for convention in CONVENTIONS}
    spans = list(itertools.pairwise(tokens.starts.tolist()))
    for begin, end in progress_bar(spans, desc="units of text", unit="piece"):
        pieces = tokenizer.pieces(tokens.ids[begin:end])
        sizes = np.array([len(one) for one in pieces])
        free = sizes > 0
        free[0] = False
        decided = answer.boundaries[begin:end] & free
        ended = int(tokens.ids[end - 1]) == tokenizer.eos_id
        for kind, units in units_of(b"".join(pieces), ended).items():
            for convention, places in zip(CONVENTIONS, (units.last, units.next), strict=True):
                aligned = holding(np.cumsum(sizes), places) & free
                tally = tally_of(decided[free], aligned[free])
                for domain in (-1, int(tokens.domains[begin])):
                    tallies[domain, kind, convention] += tally
    names = {-1: "all"} | {domain: tokens.names[domain] for domain in tokens.present}
    return {"least_drawn": LEAST_DRAWN, "domains": {name: {
        kind: _strongest({convention: measures(*tallies[domain, kind, convention]) for convention in CONVENTIONS})
        for kind in KINDS} for domain, name in names.items()}}


def tally_of(decided: np.ndarray, aligned: np.ndarray) -> np.ndarray:
    """(5,) of one piece: tokens, boundaries, aligned tokens, aligned boundaries, and how many of these chance would
    give. decided, aligned (n,) bool."""
    tokens, boundaries, units = len(decided), int(decided.sum()), int(aligned.sum())
    chance = boundaries * units / tokens if tokens else 0.0
    return np.array([tokens, boundaries, units, int((decided & aligned).sum()), chance])


def measures(tokens: float, boundaries: float, aligned: float, hits: float, chance: float) -> dict[str, Any]:
    """None where there is nothing to divide by."""
    precision = hits / boundaries if boundaries else None
    random_precision = chance / boundaries if boundaries else None
    return {"tokens": int(tokens), "boundaries": int(boundaries), "units": int(aligned), "hits": int(hits),
            "precision": precision, "recall": hits / aligned if aligned else None,
            "f1": 2 * hits / (boundaries + aligned) if boundaries + aligned else None,
            "random_precision": random_precision,
            "enrichment": precision / random_precision if precision is not None and random_precision else None}


def _strongest(by_convention: dict[Convention, dict[str, Any]]) -> dict[str, Any]:
    """Both, and the one of the higher enrichment; the first where they are equal or none has one."""
    stronger = max(CONVENTIONS, key=lambda one: by_convention[one]["enrichment"] or 0.0)
    return {"last": by_convention["last"], "next": by_convention["next"], "stronger": stronger}
