"""Loss by position in the concept (the paper's Fig. 7).

The position k of a *predicted* token is its place, from 0, among the tokens that its concept pools. As the boundary
token closes its concept, that is also how many tokens the *predicting* token lies after the newest boundary: at k = 0
the predicting token has just closed a concept, which the decoder sees for the first time; at k = 5 nothing newer than
five tokens has reached the backbone.

    k(t) = t - max{i <= t: b_i}          for the prediction of token t + 1 at token t

Concepts are those of the model that is looked at, thresholded, also where another model is compared with it: both are
asked for the very same tokens. Differences are in nats, own loss minus the other's: below 0 the own model is better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlcm_lightning.evaluation.analysis.clustered import mean
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens

LAST = 16
"""From here on positions are taken together, as in the paper's figure."""


def positions_in_concept(boundaries: np.ndarray) -> np.ndarray:
    """(T,) int64: k. boundaries (T,) bool, true at the first token of every piece."""
    places = np.arange(len(boundaries))
    return places - np.maximum.accumulate(np.where(boundaries, places, 0))


def loss_by_position(tokens: Tokens, answer: Answer, other: Answer | None) -> dict[str, Any]:
    """Mean loss at each position with its error, and the difference to the other model."""
    assert answer.boundaries is not None
    positions = np.minimum(positions_in_concept(answer.boundaries), LAST)
    found = []
    for position in range(LAST + 1):
        chosen = (positions == position) & tokens.predicted
        if not chosen.any():
            continue
        clusters = tokens.documents[chosen]
        own = mean(answer.nll[chosen], clusters)
        line: dict[str, Any] = {"position": position, "tokens": own.count, "documents": own.clusters,
                                "loss": own.value, "error": own.error}
        if other is not None:
            difference = mean(answer.nll[chosen] - other.nll[chosen], clusters)
            line |= {"other_loss": mean(other.nll[chosen], clusters).value, "difference": difference.value,
                     "difference_error": difference.error}
        found.append(line)
    return {"last": LAST, "positions": found}
