"""Tiny dense models as others write them, with a tokenizer of ours beside them, and configurations that they fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.config import BoundaryConfig, Config, DataConfig, ModelConfig, MupConfig, OptimConfig, TrainConfig
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import VOCABULARY

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 4, 32, 4, 2, 8, 48
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
         "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 512,
         "rms_norm_eps": 1e-5}
MODEL = ModelConfig(
    vocab_size=VOCABULARY, d_token=WIDTH, d_concept=WIDTH, encoder_layers=2, backbone_layers=2, decoder_layers=2,
    heads_token=HEADS, kv_heads_token=KV_HEADS, heads_concept=HEADS, kv_heads_concept=KV_HEADS, head_dim=HEAD_DIM,
    ffn_token=FFN, ffn_concept=FFN, rope_base=5000.0, norm_epsilon=1e-5, boundary=BoundaryConfig(form="both"),
    mup=MupConfig(d_base=WIDTH))
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Folder:
    """A folder that transformers wrote, and its tokenizer; fields of its configuration may be given."""
    transformers = pytest.importorskip("transformers")

    def make(kind: str = "Llama", seed: int = 0, dtype: torch.dtype = torch.float32, **given: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        settings = {**SHAPE, "rope_theta": 5000.0, **given}
        if "rope_parameters" in given:
            del settings["rope_theta"]
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
        with torch.no_grad():
            for parameter in model.parameters():  # norms too, or an exchange of theirs would not be seen
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(hub: Folder) -> Path:
    return hub()


def change(folder: Path, out: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in config.json; None removes one."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    about = {**json.loads((out / "config.json").read_text()), **fields}
    (out / "config.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return out


@pytest.fixture
def target(config: DataConfig, tmp_path: Path) -> Config:
    """A run whose model the tiny ones fit: 3 steps of 4 rows of 64 tokens."""
    data = replace(config, global_batch_size=4, micro_batch_size=4)
    return Config(
        name="begun", seed=3, model=MODEL, data=data,
        optim=OptimConfig(total_tokens=3 * data.tokens_per_step, warmup_tokens=2 * data.tokens_per_step),
        train=TrainConfig(output_dir=str(tmp_path / "runs"), precision="fp32", devices=1, nodes=1, log_every_steps=1,
                          validate_every_steps=100, checkpoint_every_steps=100))


def with_model(config: Config, **fields: Any) -> Config:
    return replace(config, model=replace(config.model, **fields))
