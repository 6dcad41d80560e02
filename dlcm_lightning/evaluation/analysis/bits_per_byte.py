"""Bits per byte of the validation rows, by domain and by how much of its document the model sees.

    bits per byte = sum of nll / (ln 2 * sum of UTF-8 bytes), both over predicted tokens

The end-of-text token is predicted too and has no bytes, as in `dlcm evaluate`, whose numbers these are. "Seen" counts
the tokens of the piece up to and with the predicting one, begin-of-text included: buckets 1, 2-3, 4-7, ...
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dlcm_lightning.evaluation.analysis.clustered import mean, ratio
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens


def bits_per_byte(tokens: Tokens, answer: Answer, other: Answer | None) -> dict[str, Any]:
    """Of all rows, of each domain, of each bucket. other: of the model that is compared with."""
    everything = np.ones(len(tokens), dtype=bool)
    seen = tokens.positions + 1
    bucket = np.floor(np.log2(seen)).astype(int)
    buckets = [{"from": 2**number, "to": 2 ** (number + 1) - 1,
                **_measured(tokens, answer, other, bucket == number)} for number in range(int(bucket.max()) + 1)]
    return {"all": _measured(tokens, answer, other, everything),
            "domains": {tokens.names[domain]: _measured(tokens, answer, other, tokens.domains == domain)
                        for domain in tokens.present},
            "by_tokens_seen": buckets}


def _measured(tokens: Tokens, answer: Answer, other: Answer | None, chosen: np.ndarray) -> dict[str, Any]:
    """chosen (T,) bool."""
    chosen = chosen & tokens.predicted
    under, clusters = tokens.target_bytes[chosen] * math.log(2), tokens.documents[chosen]
    own = ratio(answer.nll[chosen], under, clusters)
    found: dict[str, Any] = {
        "bits_per_byte": own.value, "error": own.error, "loss": mean(answer.nll[chosen], clusters).value,
        "predicted_tokens": int(chosen.sum()), "bytes": int(tokens.target_bytes[chosen].sum()),
        "documents": own.clusters}
    if other is not None:
        found["other_bits_per_byte"] = ratio(other.nll[chosen], under, clusters).value
        difference = ratio(answer.nll[chosen] - other.nll[chosen], under, clusters)
        found |= {"difference": difference.value, "difference_error": difference.error}
    return found
