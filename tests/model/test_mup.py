"""The muP table: each role's line at two widths, what initialisation and optimizer make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dlcm_lightning.config import BoundaryConfig, ModelConfig, OptimConfig
from dlcm_lightning.model.boundary import FixedBoundary
from dlcm_lightning.model.dlcm import build_model
from dlcm_lightning.model.mup import Role, Rule, branch_scale, hyperparameters_of, role_parameters
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training import optimizer as optim_module
from dlcm_lightning.training.optimizer import build_optimizer
from tests.model.conftest import SMALL

WIDE = replace(SMALL, d_token=512, d_concept=1024, head_dim=64, heads_token=8, kv_heads_token=4, heads_concept=16,
               kv_heads_concept=8, ffn_token=1024, ffn_concept=2048)  # s_token = 2, s_concept = 4
OPTIM = OptimConfig(lr_token=1e-2, lr_concept=2e-2, lr_other=3e-3, lr_boundary=4e-3, weight_decay=0.1, epsilon=1e-8)


@pytest.mark.parametrize(("role", "deviation", "learning_rate", "decay", "epsilon"), [
    (Role.TOKEN, (1 / 256 / 2) ** 0.5, 1e-2 / 2, 0.2, 1e-8 / 2),
    (Role.CONCEPT, (1 / 256 / 4) ** 0.5, 2e-2 / 4, 0.4, 1e-8 / 4),
    (Role.TOKEN_TO_CONCEPT, (1 / 256 / 2) ** 0.5, 1e-2 / 2, 0.2, 1e-8 / 2),
    (Role.CONCEPT_TO_TOKEN, (1 / 256 / 4 * 0.5) ** 0.5, 2e-2 / 4, 0.4, 1e-8 / 4),
    (Role.BOUNDARY, None, 4e-3 / 2, 0.0, 1e-8 / 2),
    (Role.EMBEDDING, 0.02, 3e-3, 0.1, 1e-8 / 2),
    (Role.UNEMBEDDING, 0.02, 3e-3, 0.1, 1e-8 / 2),
    (Role.NORM_TOKEN, None, 3e-3, 0.0, 1e-8 / 2),
    (Role.NORM_CONCEPT, None, 3e-3, 0.0, 1e-8 / 4),
])
def test_each_role_has_its_line(
    role: Role, deviation: float | None, learning_rate: float, decay: float, epsilon: float
) -> None:
    line = hyperparameters_of(role, WIDE, OPTIM)
    assert line.deviation == (deviation if deviation is None else pytest.approx(deviation))
    assert line.learning_rate == pytest.approx(learning_rate)
    assert line.weight_decay == pytest.approx(decay)
    assert line.epsilon == pytest.approx(epsilon)


DEEP = replace(WIDE, encoder_layers=4, backbone_layers=32, decoder_layers=4, mup=replace(
    WIDE.mup, depth_exponent=0.5, base_layers=2))  # m_token = 4, m_concept = 16


@pytest.mark.parametrize(("role", "scale", "rate", "decay", "epsilon"), [
    (Role.TOKEN, 1 / 2, 1 / 2, 2, 1 / 2),
    (Role.CONCEPT, 1 / 4, 1 / 4, 4, 1 / 4),
    (Role.NORM_TOKEN, 1 / 2, 1 / 2, 1, 1 / 2),
    (Role.NORM_CONCEPT, 1 / 4, 1 / 4, 1, 1 / 4),
    *((role, 1, 1, 1, 1) for role in (Role.TOKEN_TO_CONCEPT, Role.CONCEPT_TO_TOKEN, Role.BOUNDARY, Role.EMBEDDING,
                                      Role.UNEMBEDDING)),
])
def test_depth_enters_where_an_exponent_is_given_and_only_in_blocks(
    role: Role, scale: float, rate: float, decay: float, epsilon: float
) -> None:
    without, deep = hyperparameters_of(role, WIDE, OPTIM), hyperparameters_of(role, DEEP, OPTIM)
    assert branch_scale(role, DEEP) == pytest.approx(scale)
    assert deep.learning_rate == pytest.approx(rate * without.learning_rate)
    assert deep.weight_decay == pytest.approx(decay * without.weight_decay)
    assert deep.epsilon == pytest.approx(epsilon * without.epsilon)
    assert deep.deviation == without.deviation
    unasked = replace(DEEP, mup=replace(DEEP.mup, depth_exponent=0.0))
    assert hyperparameters_of(role, unasked, OPTIM) == without and branch_scale(role, unasked) == 1


def test_with_the_exponent_of_one_rates_and_decays_do_not_depend_on_depth() -> None:
    deep = replace(DEEP, mup=replace(DEEP.mup, depth_exponent=1.0))
    for role in (Role.TOKEN, Role.CONCEPT, Role.NORM_TOKEN, Role.NORM_CONCEPT):
        lines = hyperparameters_of(role, WIDE, OPTIM), hyperparameters_of(role, deep, OPTIM)
        assert lines[0].learning_rate == lines[1].learning_rate and lines[0].weight_decay == lines[1].weight_decay


def test_decay_times_rate_does_not_depend_on_width() -> None:
    for role in (Role.TOKEN, Role.CONCEPT, Role.TOKEN_TO_CONCEPT, Role.CONCEPT_TO_TOKEN):
        products = {round(hyperparameters_of(role, size, OPTIM).learning_rate * hyperparameters_of(role, size,
                                                                                                   OPTIM).weight_decay,
                          12)
                    for size in (SMALL, WIDE)}
        assert len(products) == 1


def test_initialisation_draws_what_the_table_says() -> None:
    model = build_model(WIDE, torch.float32, "sdpa", seed=0)
    for name, owner in role_parameters(model):
        deviation = hyperparameters_of(owner.role, WIDE, OPTIM).deviation
        if deviation is not None:
            assert owner.weight.std().item() == pytest.approx(deviation, rel=0.03), name
            assert abs(owner.weight.mean().item()) < 0.05 * deviation, name
        elif owner.role is Role.BOUNDARY:
            assert torch.equal(owner.weight, torch.eye(WIDE.d_token)), name
        else:
            assert torch.equal(owner.weight, torch.ones_like(owner.weight)), name


def test_every_parameter_is_in_exactly_one_group_with_its_roles_settings() -> None:
    model = build_model(WIDE, torch.float32, "sdpa", seed=0)
    optimizer = build_optimizer(model, WIDE, OPTIM)
    seen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(seen) == len({id(parameter) for parameter in seen}) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        line = hyperparameters_of(Role(group["name"]), WIDE, OPTIM)
        assert (group["lr"], group["weight_decay"], group["eps"]) == (
            line.learning_rate, line.weight_decay, line.epsilon)


def test_logits_are_scaled_by_one_over_s_token() -> None:
    model = build_model(WIDE, torch.float64, "sdpa", seed=0)
    hidden = torch.randn(3, WIDE.d_token, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.unembedding.weight.t() / 2)


def test_a_parameter_without_a_role_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight has no role"):
        list(role_parameters(nn.Sequential(nn.Linear(2, 2, bias=False))))


def coordinate_moves(axis: str, widths: tuple[int, ...]) -> list[float]:
    """How far the axis' own stack moves its output in a few AdamW steps, per unit of that output, at each width.

    The output of encoder or backbone is taken before any final norm, which would hide its size: what its last block has
    got, and what it adds.
    """
    moves = []
    for width in widths:
        d, e = (width, 128) if axis == "token" else (64, width)
        config = replace(
            SMALL, d_token=d, d_concept=e, head_dim=16, heads_token=d // 16, kv_heads_token=d // 16,
            heads_concept=e // 16, kv_heads_concept=e // 16, ffn_token=2 * d, ffn_concept=2 * e,
            mup=replace(SMALL.mup, d_base=widths[0]),
        )
        model = build_model(config, torch.float32, "sdpa", seed=0)
        layer = (model.encoder if axis == "token" else model.backbone).layers[-1]
        seen: list[torch.Tensor] = []
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(sum(output).detach()))
        optimizer = build_optimizer(model, config, replace(OPTIM, lr_token=2e-3, lr_concept=2e-3, lr_other=1e-6,
                                                           weight_decay=0.0))
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, SMALL.vocab_size, (256,), generator=generator)
        documents = Segments.from_lengths([128, 128])
        model.boundary = FixedBoundary(BoundaryConfig(form="fixed", target_ratio=2.0))
        for _ in range(5):
            logits = model.logits(model(tokens, documents).hidden)
            nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        model(tokens, documents)
        moves.append(((seen[-1] - seen[0]).square().mean() / seen[0].square().mean()).sqrt().item())
    return moves


AXES = [("token", (32, 64, 128, 256)), ("concept", (64, 128, 256, 512))]
BOUND = 1.3
"""Of the largest move over the smallest. Exactly 1 only in the limit of width."""


@pytest.mark.parametrize(("axis", "widths"), AXES)
def test_coordinates_move_by_as_much_at_every_width(axis: str, widths: tuple[int, ...]) -> None:
    moves = coordinate_moves(axis, widths)
    assert max(moves) / min(moves) < BOUND, moves


@pytest.mark.parametrize(("axis", "widths"), AXES)
def test_the_coordinate_check_fails_where_rates_do_not_fall_with_width(
    axis: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = optim_module.hyperparameters_of

    def mutant(role: Role, model: ModelConfig, optim: OptimConfig) -> Rule:
        line = honest(role, model, optim)
        s = model.s_concept if role is Role.CONCEPT else model.s_token
        return replace(line, learning_rate=line.learning_rate * s) if role in (Role.TOKEN, Role.CONCEPT) else line

    monkeypatch.setattr(optim_module, "hyperparameters_of", mutant)
    moves = coordinate_moves(axis, widths)
    assert max(moves) / min(moves) > BOUND, moves
