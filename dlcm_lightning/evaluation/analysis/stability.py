"""How much of the segmentation is still moving: decisions of kept checkpoints against the newest, on the same tokens.

First tokens of pieces are boundaries by definition and left out. Agreement is the share of tokens with equal decisions;
two segmentations of rates r and s that know nothing of each other agree on 1 - r - s + 2 r s of the tokens, which is
given beside it. F1 takes the newest checkpoint's boundaries as the truth; by chance it would be 2 r s / (r + s).
"""

from __future__ import annotations

from typing import Any

import numpy as np


def agreement(first: np.ndarray, older: np.ndarray, newest: np.ndarray) -> dict[str, Any]:
    """first, older, newest (T,) bool: first tokens of pieces, and two segmentations of the same tokens."""
    mine, reference = older[~first], newest[~first]
    tokens = len(mine)
    both, rate, base = int((mine & reference).sum()), float(mine.mean()), float(reference.mean())
    said = int(mine.sum()) + int(reference.sum())
    return {"tokens": tokens, "boundaries": int(mine.sum()), "agreement": float((mine == reference).mean()),
            "chance_agreement": 1 - rate - base + 2 * rate * base,
            "f1": 2 * both / said if said else None,
            "chance_f1": 2 * rate * base / (rate + base) if said else None,
            "tokens_per_concept": len(first) / (int(mine.sum()) + int(first.sum()))}
