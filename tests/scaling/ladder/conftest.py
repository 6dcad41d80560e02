"""Studies of runs that train in a second or two, on the synthetic corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.config import DataConfig
from dlcm_lightning.scaling.ladder.study import Study
from dlcm_lightning.scaling.ladder.study_file import study_of

BASE = """
name: tiny
model: {{vocab_size: 360, d_token: 32, d_concept: 64, encoder_layers: 1, backbone_layers: 2, decoder_layers: 1,
  heads_token: 4, kv_heads_token: 2, heads_concept: 8, kv_heads_concept: 4, head_dim: 8, ffn_token: 64,
  ffn_concept: 128}}
data: {{corpus: shards, root: {root}, sequence_length: 64, global_batch_size: 4, micro_batch_size: 4, block_rows: 20,
  validation_rows: 6, sources: [{{name: a, domain: en, weight: 0.7}}, {{name: b, domain: zh, weight: 0.3}}]}}
optim: {{total_tokens: 10000, warmup_tokens: 512, lr_other: 3.0e-3}}
train: {{precision: fp32, log_every_steps: 3}}
"""
TOKENS_PER_STEP = 256
MakeStudy = Callable[..., Study]


@pytest.fixture(scope="session")
def base_file(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32,000 parameters outside the embeddings, 256 tokens a step."""
    file = tmp_path_factory.mktemp("base") / "tiny.yaml"
    file.write_text(BASE.format(root=config.root))
    return file


@pytest.fixture(scope="session")
def make_study(base_file: Path) -> MakeStudy:
    """A study of that base in a folder."""

    def make(output_dir: Path, **fields: Any) -> Study:
        return study_of({"name": "t", "base": str(base_file), "output_dir": str(output_dir), "tokens": 4096,
                         **fields}, "here")

    return make
