"""Activation checkpointing: the same gradients, bit for bit, out of less that is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.model.dlcm import assemble
from tests import reference as oracle
from tests.model.conftest import LENGTHS, SMALL, small, tokens_and_noise

MODES = ("none", "selective", "full")


def run(config: ModelConfig, mode: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of the language-model loss, and the bytes that the forward kept for the backward."""
    model = assemble(config, dtype, "sdpa", mode)
    model.load_state_dict(oracle.random_state(config, seed=3), strict=config.kind == "dlcm")
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, documents, noise, tokens).nll_sum
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", ["both", "fixed"])
def test_gradients_do_not_depend_on_what_is_recomputed(form: str, dtype: torch.dtype) -> None:
    config = replace(small(form, target_ratio=4.0), encoder_layers=3, decoder_layers=3, backbone_layers=3)
    found = {mode: run(config, mode, dtype) for mode in MODES}
    expected, most = found["none"]
    assert len(expected) > 20
    for mode in MODES[1:]:
        for name, gradient in found[mode][0].items():
            assert torch.equal(gradient, expected[name]), (mode, name)
        assert found[mode][0].keys() == expected.keys()
    assert found["full"][1] < found["selective"][1] < most
    assert found["full"][1] < 0.75 * most


def test_the_dense_baseline_recomputes_too() -> None:
    config = replace(SMALL, kind="dense", decoder_layers=4)
    states = []
    for mode in MODES:
        model = assemble(config, torch.float64, "sdpa", mode)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        tokens, _, documents = tokens_and_noise(LENGTHS)
        model(tokens, documents, None, tokens).nll_sum.backward()
        states.append([parameter.grad for parameter in model.parameters()])
    for other in states[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(states[0], other, strict=True))
