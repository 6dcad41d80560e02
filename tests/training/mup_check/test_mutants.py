"""The check passes an honest model, and catches every rule of the table that is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dlcm_lightning.config import ModelConfig, OptimConfig
from dlcm_lightning.model import dlcm, mup
from dlcm_lightning.model.mup import Role, Rule
from dlcm_lightning.training import optimizer as optim_module
from dlcm_lightning.training.mup_check.sizes import Axis
from tests.training.mup_check.conftest import MODEL, wrong

DEEP = replace(MODEL, mup=replace(MODEL.mup, depth_exponent=0.5, base_layers=4))
NAMES: dict[Role, Axis] = {
    Role.TOKEN: "token", Role.CONCEPT: "concept", Role.TOKEN_TO_CONCEPT: "token", Role.CONCEPT_TO_TOKEN: "concept",
    Role.BOUNDARY: "token", Role.EMBEDDING: "token", Role.UNEMBEDDING: "token", Role.NORM_TOKEN: "token",
    Role.NORM_CONCEPT: "concept",
}
"""Along which axis each role has a rule."""


def found(axis: Axis, model: ModelConfig = MODEL, train: bool = True) -> set[tuple[str, str]]:
    return {(line.role, line.quantity) for line in wrong(axis, model, train)}


@pytest.mark.parametrize("axis", ["token", "concept"])
def test_the_model_as_it_is_passes(axis: Axis) -> None:
    assert found(axis) == set()


def test_a_dense_model_passes() -> None:
    assert found("token", replace(MODEL, kind="dense")) == set()


def rule_mutant(role: Role, change: Callable[[Rule, float], Rule]) -> Callable[[Role, ModelConfig, OptimConfig], Rule]:
    honest = mup.hyperparameters_of

    def mutant(one: Role, model: ModelConfig, optim: OptimConfig) -> Rule:
        s = model.s_concept if NAMES[one] == "concept" else model.s_token
        line = honest(one, model, optim)
        return change(line, s) if one is role else line

    return mutant


@pytest.mark.parametrize("role", [Role.TOKEN, Role.CONCEPT, Role.TOKEN_TO_CONCEPT, Role.CONCEPT_TO_TOKEN,
                                  Role.BOUNDARY, Role.EMBEDDING, Role.UNEMBEDDING, Role.NORM_TOKEN,
                                  Role.NORM_CONCEPT])
def test_a_rate_that_does_not_follow_its_rule_is_seen_in_the_optimizer_and_in_what_it_moves(
    role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its 1 / s, or with an s that the rule has not."""
    monkeypatch.setattr(optim_module, "hyperparameters_of", rule_mutant(
        role, lambda line, s: replace(line, learning_rate=line.learning_rate * s)))
    assert {(role.value, "own"), (role.value, "learning_rate")} <= found(NAMES[role])


def test_rates_that_follow_the_square_root_of_the_width_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_module, "hyperparameters_of", rule_mutant(
        Role.TOKEN, lambda line, s: replace(line, learning_rate=line.learning_rate * s**0.5)))
    assert {("token", "own"), ("token", "learning_rate")} <= found("token")


@pytest.mark.parametrize("quantity", ["learning_rate", "weight_decay", "epsilon"])
@pytest.mark.parametrize("role", list(NAMES))
def test_any_power_of_the_width_in_the_optimizer_is_seen(
    role: Role, quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is missing, or one too much; a decay of what should have none."""
    if quantity == "weight_decay" and mup.hyperparameters_of(role, MODEL, OptimConfig()).weight_decay == 0:
        monkeypatch.setattr(optim_module, "hyperparameters_of", rule_mutant(
            role, lambda line, s: replace(line, weight_decay=0.1)))
    else:
        monkeypatch.setattr(optim_module, "hyperparameters_of", rule_mutant(
            role, lambda line, s: replace(line, **{quantity: getattr(line, quantity) * s})))
    assert found(NAMES[role], train=False) == {(role.value, quantity)}


@pytest.mark.parametrize("role", [Role.TOKEN, Role.CONCEPT, Role.TOKEN_TO_CONCEPT, Role.CONCEPT_TO_TOKEN,
                                  Role.EMBEDDING, Role.UNEMBEDDING])
def test_an_initialisation_that_does_not_follow_its_rule_is_seen(
    role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = mup._deviation

    def mutant(one: Role, model: ModelConfig) -> float | None:
        s = model.s_concept if NAMES[one] == "concept" else model.s_token
        value = honest(one, model)
        return value * s**0.5 if one is role and value is not None else value

    monkeypatch.setattr(mup, "_deviation", mutant)
    assert (role.value, "size") in found(NAMES[role])


@pytest.mark.parametrize(("role", "axis"), [(Role.TOKEN_TO_CONCEPT, "token"), (Role.CONCEPT_TO_TOKEN, "concept")])
def test_a_bridge_whose_initialisation_forgets_what_it_leads_to_is_seen(
    role: Role, axis: Axis, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = mup._deviation

    def mutant(one: Role, model: ModelConfig) -> float | None:
        s = model.s_concept if axis == "concept" else model.s_token
        return model.mup.sigma / s**0.5 if one is role else honest(one, model)

    monkeypatch.setattr(mup, "_deviation", mutant)
    assert (role.value, "size") in found(axis)


def test_a_boundary_that_does_not_begin_with_the_identity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = mup._deviation
    monkeypatch.setattr(mup, "_deviation", lambda role, model: 0.1 if role is Role.BOUNDARY else honest(role, model))
    assert ("boundary", "size") in found("token")


def test_logits_that_are_not_scaled_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlcm, "logit_scale", lambda model: 1.0)
    assert {("unembedding", "size"), ("unembedding", "own")} <= found("token")


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_model_as_it_is_passes_at_any_depth(exponent: float) -> None:
    assert found("depth", replace(MODEL, mup=replace(DEEP.mup, depth_exponent=exponent))) == set()


def test_branches_that_do_not_shrink_with_depth_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dlcm, "branch_scale", lambda role, model: 1.0)
    assert {("stream_token", "size"), ("stream_concept", "size")} <= found("depth", DEEP)


@pytest.mark.parametrize("quantity", ["learning_rate", "weight_decay", "epsilon"])
@pytest.mark.parametrize("role", [Role.TOKEN, Role.CONCEPT])
def test_a_power_of_the_depth_that_is_missing_in_the_optimizer_is_seen(
    role: Role, quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = mup.hyperparameters_of

    def mutant(one: Role, model: ModelConfig, optim: OptimConfig) -> Rule:
        line, without = honest(one, model, optim), honest(one, replace(model, mup=replace(model.mup, depth_exponent=0)),
                                                          optim)
        return replace(line, **{quantity: getattr(without, quantity)}) if one is role else line

    monkeypatch.setattr(optim_module, "hyperparameters_of", mutant)
    assert found("depth", DEEP, train=False) == {(role.value, quantity)}
