"""How long concepts are: tokens that each one pools, by domain.

The first token of a piece is always a concept of its own, by definition and not by choice; it is left out of the
lengths. Tokens after the last boundary of a piece are pooled by nobody and have no length. Tokens per concept is what
training logs as R: all tokens over all boundaries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens

LONGEST = 32
"""Lengths above it are counted together."""


def concept_lengths(tokens: Tokens, answer: Answer) -> dict[str, Any]:
    """Of all rows and of each domain."""
    return {"longest": LONGEST, "all": _counted(tokens, answer, np.ones(len(tokens), dtype=bool)),
            "domains": {tokens.names[domain]: _counted(tokens, answer, tokens.domains == domain)
                        for domain in tokens.present}}


def _counted(tokens: Tokens, answer: Answer, chosen: np.ndarray) -> dict[str, Any]:
    """chosen (T,) bool: whole rows."""
    assert answer.boundaries is not None
    boundaries = answer.boundaries[chosen]
    closing = np.flatnonzero(boundaries)
    free = np.diff(closing, prepend=-1)[~tokens.first[chosen][closing]]  # from the boundary before it in its piece
    counts = np.bincount(np.minimum(free, LONGEST + 1), minlength=LONGEST + 2)[1:]
    quantiles = [int(np.quantile(free, share, method="inverted_cdf")) if len(free) else None
                 for share in (0.1, 0.5, 0.9)]
    return {"counts": counts.tolist(), "concepts": len(free), "mean": float(free.mean()) if len(free) else None,
            "tenth": quantiles[0], "median": quantiles[1], "ninetieth": quantiles[2],
            "tokens": int(chosen.sum()), "boundaries": int(boundaries.sum()),
            "tokens_per_concept": float(chosen.sum() / boundaries.sum())}
