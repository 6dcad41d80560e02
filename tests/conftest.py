"""A small synthetic corpus, no network; and a run of seconds, the debug model on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.config import (
    BoundaryConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe
from tests.synthetic import VOCABULARY, make_texts

MODEL = ModelConfig(
    vocab_size=VOCABULARY, d_token=32, d_concept=64, encoder_layers=1, backbone_layers=1, decoder_layers=1,
    heads_token=2, kv_heads_token=1, heads_concept=4, kv_heads_concept=2, head_dim=16, ffn_token=64, ffn_concept=64,
    boundary=BoundaryConfig(form="both"),
)
STEPS = 12


@pytest.fixture(autouse=True)
def where_it_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_where(request, monkeypatch)


def choose_where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean the same on a machine with GPUs; those that need one are marked `gpu`."""
    wants_gpu = request.node.get_closest_marker("gpu") is not None
    if wants_gpu and not torch.cuda.is_available():
        pytest.skip("it needs a GPU")
    monkeypatch.setenv("DLCM_DEVICE", "cuda" if wants_gpu else "cpu")  # of the processes that it starts, too


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
        return DataConfig(corpus="shards", root=str(root), sequence_length=64, global_batch_size=8, micro_batch_size=2,
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


@pytest.fixture
def run_config(config: DataConfig, tmp_path: Path) -> Config:
    """12 steps of 4 rows of 64 tokens, fp32, a checkpoint every third step."""
    data = replace(config, global_batch_size=4, micro_batch_size=4)
    tokens = data.tokens_per_step * STEPS
    return Config(
        name="test", seed=3, model=MODEL, data=data,
        optim=OptimConfig(total_tokens=tokens, warmup_tokens=2 * data.tokens_per_step),
        train=TrainConfig(output_dir=str(tmp_path / "runs"), precision="fp32", devices=1, nodes=1, log_every_steps=2,
                          validate_every_steps=5, checkpoint_every_steps=3),
    )
