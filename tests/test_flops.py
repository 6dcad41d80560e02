"""Counts of parameters and FLOPs against figures worked out by hand from the shapes of Table 3."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import BoundaryConfig, ModelConfig
from dlcm_lightning.flops import (
    forward_flops,
    forward_flops_per_token,
    matrix_parameters,
    norm_parameters,
    training_flops_per_token,
)

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
LADDER = {"dlcm_87m": 87e6, "dlcm_274m": 274e6, "dlcm_468m": 468e6, "dlcm_833m": 833e6}
CONTEXT = 8192


def shipped(name: str) -> ModelConfig:
    stand_in = ["name=counting", "data.sources=[{name: none, domain: none, weight: 1}]", "data.tokenizer=bpe"]
    return load_config(CONFIGS / "model" / f"{name}.yaml", stand_in).model


@pytest.fixture(scope="module")
def dlcm() -> ModelConfig:
    return shipped("dlcm_2b")


@pytest.fixture(scope="module")
def dense() -> ModelConfig:
    return shipped("dense_1b")


def test_dlcm_2b_counts_the_matrix_parameters_of_table_3(dlcm: ModelConfig) -> None:
    weights = matrix_parameters(dlcm)
    assert weights.encoder + weights.decoder == 566_231_040
    assert weights.backbone == 1_358_954_496
    assert weights.body == 1_925_185_536
    assert weights.embedding + weights.unembedding == 395_719_680
    assert weights.up_projection == 4_718_592
    assert weights.boundary == 4_718_592
    assert weights.cross_attention == 9_437_184
    assert weights.non_embedding == 1_944_059_904
    assert weights.total == 2_339_779_584


def test_dense_1b_counts_the_matrix_parameters_of_table_3(dense: ModelConfig) -> None:
    weights = matrix_parameters(dense)
    assert weights.body == weights.non_embedding == weights.decoder == 905_969_664
    assert weights.total == 1_301_689_344


def test_shares_of_the_backbone_are_those_of_the_specification(dlcm: ModelConfig) -> None:
    weights = matrix_parameters(dlcm)
    assert round(weights.backbone_share, 3) == 0.706
    assert round(weights.backbone / weights.total, 3) == 0.581


def test_bodies_of_dlcm_2b_and_dense_1b_cost_the_same_per_token(dlcm: ModelConfig, dense: ModelConfig) -> None:
    assert forward_flops(dlcm, CONTEXT, 1 / 4).body == 2 * (566_231_040 + 1_358_954_496 / 4) == 2 * 905_969_664
    assert forward_flops(dense, CONTEXT).body == 2 * 905_969_664


def test_bridges_and_boundary_cost_11_796_480_weights_per_token(dlcm: ModelConfig) -> None:
    """W_q, W_k, W_Q, W_O at token rate; W_up, W_K, W_V at concept rate: only that split gives the printed figure."""
    weights = matrix_parameters(dlcm)
    token_rate = weights.boundary + weights.cross_query_output
    concept_rate = weights.up_projection + weights.cross_key_value
    assert token_rate + concept_rate // 4 == 11_796_480
    assert forward_flops(dlcm, CONTEXT, 1 / 4).connections == 2 * 11_796_480


def test_dlcm_2b_needs_nine_tenths_of_the_flops_of_dense_1b_at_8k(dlcm: ModelConfig, dense: ModelConfig) -> None:
    ratio = forward_flops_per_token(dlcm, CONTEXT, 1 / 4) / forward_flops_per_token(dense, CONTEXT)
    assert round(ratio, 2) == 0.90


def test_attention_maps_count_each_visible_pair_once() -> None:
    """Against a count of pairs, over two documents whose token-weighted mean length stands for both."""
    config = replace(shipped("debug"), encoder_layers=1, backbone_layers=2, decoder_layers=3)
    lengths, ratio = [40, 8], 4
    tokens = sum(lengths)
    per_pair_token = 4 * config.heads_token * config.head_dim
    per_pair_concept = 4 * config.heads_concept * config.head_dim
    flops = 0
    for length in lengths:
        flops += (1 + 1 + 3) * per_pair_token * sum(range(1, length + 1))
        flops += 2 * per_pair_concept * sum(range(1, length // ratio + 1))
    mean_length = sum(length**2 for length in lengths) / tokens
    assert forward_flops(config, mean_length, 1 / ratio).attention_maps == pytest.approx(flops / tokens, rel=1e-12)


def test_realised_concepts_replace_the_target(dlcm: ModelConfig) -> None:
    target = forward_flops_per_token(dlcm, CONTEXT)
    assert target == forward_flops_per_token(dlcm, CONTEXT, 1 / 4)
    more = forward_flops_per_token(dlcm, CONTEXT, 1 / 2)
    per_concept = 1_358_954_496 + 4_718_592 + 4_718_592
    assert more - target > 2 * per_concept / 4  # the rest is the backbone's attention map
    assert forward_flops(dlcm, CONTEXT, 1.0).body == 2 * 1_925_185_536


def test_dense_model_does_not_read_the_concepts(dense: ModelConfig) -> None:
    assert forward_flops_per_token(dense, CONTEXT, 0.1) == forward_flops_per_token(dense, CONTEXT)


def test_training_costs_three_forward_passes(dlcm: ModelConfig) -> None:
    assert training_flops_per_token(dlcm, 512, 0.3) == 3 * forward_flops_per_token(dlcm, 512, 0.3)


def test_one_trillion_tokens_take_about_8e21_flops(dlcm: ModelConfig) -> None:
    assert f"{1e12 * training_flops_per_token(dlcm, CONTEXT):.0e}" == "8e+21"


def test_forms_without_parameters_have_no_boundary_matrices(dlcm: ModelConfig) -> None:
    learned = matrix_parameters(dlcm)
    fixed = matrix_parameters(replace(dlcm, boundary=BoundaryConfig(form="fixed")))
    assert fixed.boundary == 0
    assert learned.total - fixed.total == 4_718_592


def test_norm_gains_are_counted_apart(dlcm: ModelConfig, dense: ModelConfig) -> None:
    assert norm_parameters(dense) == 65 * 1536
    assert norm_parameters(dlcm) == (2 * 10 + 2 * 6 + 1) * 1536 + (2 * 16 + 1) * 3072 + 1536 + 3072 + 2 * 64


@pytest.mark.parametrize(("document_tokens", "concepts", "named"), [
    (CONTEXT, 4.0, "concepts_per_token = 4.0"),
    (CONTEXT, 0.0, "concepts_per_token = 0.0"),
    (0, 0.25, "document_tokens = 0"),
])
def test_impossible_arguments_are_named(
    dlcm: ModelConfig, document_tokens: float, concepts: float, named: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        forward_flops_per_token(dlcm, document_tokens, concepts)


@pytest.mark.parametrize("name", LADDER)
def test_ladder_has_the_sizes_of_its_names_and_the_proportions_of_dlcm_2b(name: str, dlcm: ModelConfig) -> None:
    config = shipped(name)
    weights = matrix_parameters(config)
    assert weights.non_embedding == pytest.approx(LADDER[name], rel=0.03)
    assert 0.65 < weights.backbone_share < 0.75
    assert config.d_token % 128 == 0
    assert config.head_dim == dlcm.head_dim
    assert config.d_concept == 2 * config.d_token
    assert config.ffn_token == 4 * config.d_token
    assert config.ffn_concept == 2 * config.d_concept
    assert config.heads_token * config.head_dim == config.d_token
    assert config.heads_concept * config.head_dim == config.d_concept
    assert config.heads_token == 2 * config.kv_heads_token
    assert config.heads_concept == 2 * config.kv_heads_concept


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_header_of_a_model_states_its_counts(file: Path) -> None:
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    config = shipped(file.stem)
    weights = matrix_parameters(config)
    assert f"{weights.non_embedding:,} non-embedding" in header
    assert f"{weights.total:,} in all" in header
    stated = re.search(r"documents of (\d+) tokens: (\S+)\.\n", header)
    assert stated is not None
    assert stated[2] == f"{training_flops_per_token(config, int(stated[1])):.3e}"
