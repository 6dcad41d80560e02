"""A small synthetic corpus: four kinds of text, a BPE trained on them, shards of several blocks. No network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data.building.build import tokenize_documents
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe
from tests.synthetic import VOCABULARY, make_texts


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(make_texts("english", 200) + make_texts("chinese", 200), VOCABULARY)


@pytest.fixture(scope="session")
def build_corpus(tokenizer: Tokenizer) -> Callable[[Path], DataConfig]:
    """Writes tokenizer and the sources `a` (english, domain en) and `b` (chinese, domain zh) under a folder."""

    def build(root: Path) -> DataConfig:
        tokenizer.save(root)
        for name, kind, domain, count in (("a", "english", "en", 300), ("b", "chinese", "zh", 150)):
            tokenize_documents(make_texts(kind, count, seed=1), tokenizer, root / name, source=name, domain=domain,
                               validation_share=0.2, shard_bytes=8000, block_tokens=500)
        return DataConfig(corpus="shards", root=str(root), row_tokens=64, rows_per_step=8, micro_batch_rows=2,
                          block_rows=20, validation_rows=6,
                          sources=[SourceConfig("a", "en", 0.7), SourceConfig("b", "zh", 0.3)])

    return build


@pytest.fixture(scope="session")
def config(build_corpus: Callable[[Path], DataConfig], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """One corpus for all tests that only read."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def reader(config: DataConfig) -> Reader:
    return Reader(config, seed=7, vocab_size=VOCABULARY)
