"""Text that stands in for a run's own where its shards are not at hand: Python's own library, under the names of its
sources. For what tries a configuration out, not for what trains a model of use.
"""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

from dlcm_lightning.config import DataConfig
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import train_bpe
from dlcm_lightning.errors import DataError

VOCABULARY = 512
FILES = 40
CHARACTERS = 20_000
"""Of each."""


def rows_at_hand(data: DataConfig, seed: int, vocab_size: int, folder: Path) -> tuple[DataConfig, int]:
    """The same data, and vocabulary, where a run of so many ids could read it; else those of text that is written below
    a folder."""
    try:
        Reader(data, seed, vocab_size, verify_all=False, log=_nothing)
    except DataError:
        return of_library(data, folder), VOCABULARY
    return data, vocab_size


def of_library(data: DataConfig, folder: Path) -> DataConfig:
    """Shards of Python's own library under the names of the run's sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    texts = [file.read_text(errors="replace")[:CHARACTERS] for file in files]
    tokenizer = train_bpe(texts, VOCABULARY)
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save(folder)
    for source in data.sources:
        tokenize_documents(texts, tokenizer, folder / source.name, source=source.name, domain=source.domain,
                           validation_share=0.2, shard_bytes=2**20)
    return replace(data, corpus="shards", root=str(folder))


def _nothing(message: str) -> None:
    del message
