"""Memory is counted from shapes; autograd is asked what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import BoundaryConfig, Config, ConfigError, ModelConfig
from dlcm_lightning.model import dlcm, layers, mup
from dlcm_lightning.model.dlcm import assemble
from dlcm_lightning.ops.attention import _torch_varlen_parameters
from dlcm_lightning.ops.rope import Rotation
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.scaling.estimate import Hardware, estimate
from dlcm_lightning.scaling.memory import FP32, checkpoint_bytes, parameters, rank_memory, saved, state_bytes
from tests import varlen_cpu

TOLERANCE = 0.03
"""Of what autograd holds. Offsets, lengths and flags are not counted, and matter less the wider a model is."""
MODEL = ModelConfig(
    vocab_size=1000, d_token=128, d_concept=256, encoder_layers=2, backbone_layers=3, decoder_layers=1, heads_token=4,
    kv_heads_token=2, heads_concept=8, kv_heads_concept=4, head_dim=32, ffn_token=384, ffn_concept=512,
    boundary=BoundaryConfig(form="both"))
CONFIGS = Path(__file__).parents[2] / "configs"


def held(model_config: ModelConfig, recompute: str, tokens: int) -> tuple[int, int]:
    """Bytes that stand between a forward and its backward, beside the parameters; and the number of concepts. A block
    that is run again is called with its angles, which are held for that and which autograd is not told of."""
    varlen_cpu.register()
    model = assemble(model_config, torch.bfloat16, "varlen", recompute)
    mup.initialise(model, model_config, 0)
    known = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # or an address would be used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    dice = torch.Generator().manual_seed(0)
    ids, targets = (torch.randint(0, model_config.vocab_size, (tokens,), generator=dice) for _ in range(2))
    noise = torch.rand(tokens, generator=dice)
    real = layers.rotation

    def rotation(*arguments: Any) -> Rotation:
        angles = real(*arguments)
        note(angles.cos)
        note(angles.sin)
        return angles

    with pytest.MonkeyPatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        patch.setattr(layers, "rotation", rotation)
        output = model(ids, Segments.from_lengths([tokens], ids.device), noise, targets)
    if output.segmentation is not None and output.segmentation.features is not None:
        note(output.segmentation.features)  # the running mean needs them after the step
    return sum(storages.values()), len(output.concepts) if output.concepts is not None else 0


@pytest.mark.skipif("enable_gqa" not in _torch_varlen_parameters, reason="older releases need keys repeated")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", [
    MODEL, replace(MODEL, kind="dense", decoder_layers=4), replace(MODEL, boundary=BoundaryConfig(form="paper")),
    replace(MODEL, boundary=BoundaryConfig(form="fixed", target_ratio=2)),
], ids=["both", "dense", "paper", "fixed"])
def test_what_a_backward_needs_is_what_autograd_holds(
    model: ModelConfig, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dlcm, "CPU_CONCEPT_MULTIPLE", 1)  # as on a GPU
    for tokens in (512, 1536):
        found, concepts = held(model, recompute, tokens)
        counted = saved(model, recompute, kept=2 * FP32).total(tokens, concepts)
        assert counted == pytest.approx(found, rel=TOLERANCE), (tokens, concepts)


@pytest.fixture(scope="module")
def run() -> Config:
    return load_config(CONFIGS / "run/dlcm_2b_1t.yaml")


def test_parameters_are_those_of_the_model(run: Config) -> None:
    for kind in (run.model, load_config(CONFIGS / "run/dense_1b_1t.yaml").model):
        with torch.device("meta"):
            model = assemble(kind, torch.bfloat16, "reference")
        assert sum(one.numel() for one in model.parameters()) == parameters(kind)


def test_state_is_spread_as_the_strategies_spread_it() -> None:
    assert state_bytes("ddp", 64, 1) == state_bytes("ddp", 1, 4) == 16
    assert state_bytes("ddp", 64, 2) == 20, "sums of the micro-batches before the last, beside the buckets"
    assert state_bytes("fsdp2", 64, 1) == state_bytes("fsdp2", 64, 4) - 4 == 0.25
    assert [state_bytes(stage, 1, 1) for stage in ("zero1", "zero2", "zero3")] == [20, 20, 20]
    assert state_bytes("zero3", 4, 1) < state_bytes("zero2", 4, 1) < state_bytes("zero1", 4, 1)


def test_more_concepts_and_more_rows_cost_more_and_recomputing_costs_less(run: Config) -> None:
    train = replace(run.train, devices=8, nodes=2)
    one = rank_memory(run, train, 1, 0.25, 1)
    assert rank_memory(run, train, 1, 1.0, 1).activations > 1.3 * one.activations
    assert rank_memory(run, train, 2, 0.25, 1).activations > 1.5 * one.activations
    ways = [replace(train, recompute=way) for way in ("none", "selective", "full")]
    totals = [rank_memory(run, way, 1, 0.25, 1).total for way in ways]
    assert totals == sorted(totals, reverse=True)
    assert checkpoint_bytes(run) == 12 * parameters(run.model)


HARDWARE = Hardware(16, 8, 80e9, 989e12, 0.4)


def test_an_estimate_says_how_long_and_where_it_fits(run: Config) -> None:
    lines = list(estimate(run, HARDWARE, 8192, "configs/run/dlcm_2b_1t.yaml", ["seed=1"]))
    text = "\n".join(lines)
    assert "2,339,936,384" in text and "238,419 of 4,194,304 tokens" in text
    flops = 8.128e9 * 238_419 * 4_194_304
    hours = flops / (128 * 989e12 * 0.4) / 3600
    assert f"{hours:.1f} hours" in text
    assert sum("<- this configuration" in line for line in lines) == 1
    assert lines[-1].endswith("--nodes=16 --gpus-per-node=8 slurm/dlcm_1t.sh configs/run/dlcm_2b_1t.yaml seed=1")


def test_more_ranks_than_rows_are_refused(run: Config) -> None:
    with pytest.raises(ConfigError, match="fewer than 1024 ranks"):
        list(estimate(run, replace(HARDWARE, nodes=128), 8192, "x", []))
