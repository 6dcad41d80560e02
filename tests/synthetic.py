"""Synthetic text in two scripts for the tests of the data side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dlcm_lightning.data.manifest import Manifest
from dlcm_lightning.data.preprocessing.writer import ShardWriter, finish_split

VOCABULARY = 360
ENGLISH = "the cat sat on a mat while rain fell over seven hills and nobody spoke"
CHINESE = "天地玄黄 宇宙洪荒 日月盈昃 辰宿列张 寒来暑往 秋收冬藏"
WORDS = {"english": ENGLISH.split(), "chinese": CHINESE.split()}


def make_texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """Distinct texts of 3 to 60 words."""
    random = np.random.default_rng([seed, len(kind)])
    return [f"{number} " + " ".join(random.choice(WORDS[kind], size=random.integers(3, 60)))
            for number in range(count)]


def write_split(folder: Path, documents: Iterable[tuple[np.ndarray, int]], *, split: str = "train", source: str = "x",
                domain: str = "d", tokenizer: str = "f", vocab_size: int = VOCABULARY) -> Manifest:
    """A source and split of given ids, each with the bytes of its text, without a tokenizer."""
    writer = ShardWriter(folder, vocab_size=vocab_size)
    for ids, text_bytes in documents:
        writer.write(ids, hashlib.md5(ids.tobytes()).digest(), text_bytes)
    return finish_split(folder, writer.close(), source=source, domain=domain, split=split, tokenizer=tokenizer,
                        vocab_size=vocab_size)
