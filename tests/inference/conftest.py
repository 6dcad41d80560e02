"""A model with drawn weights and the tokenizer of the synthetic corpus: it writes nonsense, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dlcm_lightning.config import BoundaryConfig, ModelConfig
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.inference import Generator
from dlcm_lightning.model.dlcm import build_model
from tests.conftest import MODEL

CONTEXT = 200


@pytest.fixture(scope="session")
def make_generator(tokenizer: Tokenizer) -> Callable[..., Generator]:
    """By the form of its boundary, or dense; loud enough that texts differ."""

    def make(form: str = "both", dtype: torch.dtype = torch.float32, context: int = CONTEXT) -> Generator:
        config: ModelConfig = replace(MODEL, boundary=BoundaryConfig(form=form)) if form != "dense" else replace(
            MODEL, kind="dense", decoder_layers=2)
        model = build_model(config, dtype, "sdpa", seed=5)
        with torch.no_grad():
            model.unembedding.weight.mul_(20)
            model.embedding.weight.mul_(20)
        return Generator(model, tokenizer, context)

    return make
