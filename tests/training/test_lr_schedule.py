"""The learning rate as a function of consumed tokens."""

from __future__ import annotations

import pytest

from dlcm_lightning.config import OptimConfig
from dlcm_lightning.training.lr_schedule import learning_rate_factor

WSD = OptimConfig(total_tokens=1000, warmup_tokens=100, decay_fraction=0.2, final_fraction=0.1)
COSINE = OptimConfig(total_tokens=1000, warmup_tokens=100, schedule="cosine", final_fraction=0.1)


@pytest.mark.parametrize(("tokens", "factor"), [(1, 0.01), (50, 0.5), (100, 1), (500, 1), (800, 1), (900, 0.55),
                                                 (1000, 0.1), (1100, 0.1)])
def test_warmup_stable_decay(tokens: int, factor: float) -> None:
    assert learning_rate_factor(tokens, WSD) == pytest.approx(factor)


@pytest.mark.parametrize(("tokens", "factor"), [(50, 0.5), (100, 1), (550, 0.55), (1000, 0.1), (1100, 0.1)])
def test_cosine(tokens: int, factor: float) -> None:
    assert learning_rate_factor(tokens, COSINE) == pytest.approx(factor)


def test_no_decay_stays_at_the_peak() -> None:
    assert learning_rate_factor(1000, OptimConfig(total_tokens=1000, warmup_tokens=0, decay_fraction=0.0)) == 1
