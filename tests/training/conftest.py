"""A run of seconds: the debug model on the synthetic corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.config import BoundaryConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from tests.synthetic import VOCABULARY

MODEL = ModelConfig(
    vocab_size=VOCABULARY, d_token=32, d_concept=64, encoder_layers=1, backbone_layers=1, decoder_layers=1,
    heads_token=2, kv_heads_token=1, heads_concept=4, kv_heads_concept=2, head_dim=16, ffn_token=64, ffn_concept=64,
    boundary=BoundaryConfig(form="both"),
)
STEPS = 12


@pytest.fixture
def run_config(config: DataConfig, tmp_path: Path) -> Config:
    """12 steps of 4 rows of 64 tokens, fp32, a checkpoint every third step."""
    data = replace(config, rows_per_step=4, micro_batch_rows=4)
    tokens = data.tokens_per_step * STEPS
    return Config(
        name="test", seed=3, model=MODEL, data=data,
        optim=OptimConfig(total_tokens=tokens, warmup_tokens=2 * data.tokens_per_step),
        train=TrainConfig(runs=str(tmp_path / "runs"), precision="fp32", log_every_steps=2, validate_every_steps=5,
                          checkpoint_every_steps=3),
    )
