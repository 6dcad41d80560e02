"""A model small enough for loops and large enough that every stage matters; documents of awkward lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlcm_lightning.config import BoundaryConfig, ModelConfig
from dlcm_lightning.model.dlcm import DLCM, build_model
from dlcm_lightning.ops.segments import Segments

SMALL = ModelConfig(
    vocab_size=61, d_token=32, d_concept=48, encoder_layers=2, backbone_layers=2, decoder_layers=2, heads_token=4,
    kv_heads_token=2, heads_concept=6, kv_heads_concept=3, head_dim=8, ffn_token=40, ffn_concept=56,
)
LENGTHS = [37, 1, 70, 2, 18]
"""Of the documents of a packed batch: one of a single token, one longer than a bucket of the attention."""
FORMS = ("paper", "centred", "biased", "both", "rule", "fixed")


def small(form: str = "both", **boundary: object) -> ModelConfig:
    return replace(SMALL, boundary=BoundaryConfig(form=form, **boundary))  # type: ignore[arg-type]


def loaded(config: ModelConfig, state: dict[str, torch.Tensor], backend: str = "sdpa") -> DLCM:
    """The fast model with the reference's weights, in float64."""
    model = build_model(config, torch.float64, backend, seed=0)
    assert isinstance(model, DLCM)
    model.load_state_dict(state)
    return model


def tokens_and_noise(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Segments]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab_size, (sum(lengths),), generator=generator)
    noise = torch.rand(sum(lengths), generator=generator)
    return tokens, noise, Segments.from_lengths(lengths)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["sampled", "thresholded"])
def sampled(request: pytest.FixtureRequest) -> bool:
    return request.param

