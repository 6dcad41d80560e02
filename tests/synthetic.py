"""Synthetic text in two scripts for the tests of the data side."""

from __future__ import annotations

import numpy as np

VOCABULARY = 360
ENGLISH = "the cat sat on a mat while rain fell over seven hills and nobody spoke"
CHINESE = "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张 寒来暑往 秋收冬藏"
WORDS = {"english": ENGLISH.split(), "chinese": CHINESE.split()}


def make_texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """Distinct texts of 3 to 60 words."""
    random = np.random.default_rng([seed, len(kind)])
    return [f"{number} " + " ".join(random.choice(WORDS[kind], size=random.integers(3, 60)))
            for number in range(count)]
