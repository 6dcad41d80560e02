"""What the law chooses is what a search of everything finds; what it may not choose is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from dlcm_lightning.config import BoundaryConfig, ConfigError, ModelConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.law.formula import ConceptLaw, Range
from dlcm_lightning.scaling.plan.choice import Choice, by_convention, by_law, predicted
from dlcm_lightning.scaling.shapes import model_of_size
from tests.scaling.law.ladders import printed
from tests.scaling.plan.laws import COARSE_IS_DEAR, PLANTED, SEEN, fitted, like

LIKE = like().model
DOCUMENT = 4096.0
FLAT = 2e-4
"""By which losses may differ around the optimum: shapes of a few per cent in N lie between two of the search."""
MOST_SHAPES = 400
"""A shape takes milliseconds."""


@pytest.fixture(scope="module")
def shapes() -> list[ModelConfig]:
    """Every size that the law allows, 3.5 % apart, by every P."""
    sizes = [87e6 / 4 * 1.035**step for step in range(147)]
    return [model_of_size(size, 0.3 + 0.05 * part, LIKE) for size in sizes for part in range(9)]


def allowed(N: float, D: float, P: float, factor: float = 4.0) -> bool:
    values = {"N": N, "D": D, "token_parameters": N * (1 - P), "concept_parameters": N * P}
    return all(SEEN[name].low / factor <= value <= SEEN[name].high * factor for name, value in values.items())


def brute(shapes: list[ModelConfig], law: ConceptLaw, flops: float, ratios: list[float]
          ) -> tuple[float, float, float, float]:
    """(loss, N, P, R) of the best of all, by the paper's formula and nothing of the search's."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for model in shapes:
        weights = matrix_parameters(model)
        N, P = weights.non_embedding, weights.backbone_share
        for R in ratios:
            D = flops / training_flops_per_token(model, DOCUMENT, 1 / R)
            if allowed(N, D, P):
                best = min(best, (printed(law, N, D, R, P), N, P, R))
    return best


def asked(flops: float, law: ConceptLaw = PLANTED, *, extrapolation: float | None = None, size: float | None = None,
          share: float | None = None, ratio: float | None = None) -> Choice:
    return by_law(flops, LIKE, fitted(law), DOCUMENT, extrapolation=extrapolation, size=size, share=share, ratio=ratio)


def loss_of(choice: Choice, law: ConceptLaw) -> float:
    weights = matrix_parameters(choice.model)
    return printed(law, weights.non_embedding, choice.tokens, choice.model.boundary.target_ratio,
                   weights.backbone_share)


@pytest.mark.parametrize("law", [PLANTED, COARSE_IS_DEAR], ids=["R is inside", "P is inside"])
@pytest.mark.parametrize("flops", [5e18, 2e19, 1e20, 3e20])
def test_choice_is_the_best_of_brute_force(shapes: list[ModelConfig], law: ConceptLaw, flops: float) -> None:
    best, N, P, R = brute(shapes, law, flops, [2 + 0.25 * part for part in range(25)])
    choice = asked(flops, law)
    weights = matrix_parameters(choice.model)
    assert loss_of(choice, law) <= best * (1 + FLAT)
    assert weights.non_embedding == pytest.approx(N, rel=0.25)
    assert weights.backbone_share == pytest.approx(P, abs=0.08)
    assert choice.model.boundary.target_ratio == pytest.approx(R, abs=0.5)
    assert choice.tried < MOST_SHAPES


def test_optima_of_the_tests_lie_inside_where_they_say_so() -> None:
    assert 2.5 < asked(1e20).model.boundary.target_ratio < 7.5
    assert 0.33 < matrix_parameters(asked(1e20, COARSE_IS_DEAR).model).backbone_share < 0.67


@pytest.mark.parametrize("given", [{"ratio": 3.0}, {"share": 0.5}, {"size": 5e8}, {"ratio": 6.0, "share": 0.4}])
def test_what_is_given_is_kept_and_the_rest_is_the_best(shapes: list[ModelConfig], given: dict[str, Any]) -> None:
    choice = asked(3e19, **given)
    weights = matrix_parameters(choice.model)
    some = [model for model in shapes
            if "share" not in given or abs(matrix_parameters(model).backbone_share - given["share"]) <= 0.02]
    some = [model for model in some
            if "size" not in given or abs(matrix_parameters(model).non_embedding / given["size"] - 1) <= 0.03]
    ratios = [given["ratio"]] if "ratio" in given else [2 + 0.25 * part for part in range(25)]
    assert loss_of(choice, PLANTED) <= brute(some, PLANTED, 3e19, ratios)[0] * (1 + FLAT)
    assert choice.model.boundary.target_ratio == given.get("ratio", choice.model.boundary.target_ratio)
    assert weights.backbone_share == pytest.approx(given.get("share", weights.backbone_share), abs=0.02)
    assert weights.non_embedding == pytest.approx(given.get("size", weights.non_embedding), rel=0.03)


def test_more_flops_are_a_larger_model_more_tokens_and_less_loss() -> None:
    choices = [asked(flops) for flops in (2e18, 6e18, 2e19, 6e19, 2e20)]
    sizes = [matrix_parameters(choice.model).non_embedding for choice in choices]
    assert sizes == sorted(sizes) and sizes[-1] > 3 * sizes[0]
    assert [choice.tokens for choice in choices] == sorted(choice.tokens for choice in choices)
    losses = [loss_of(choice, PLANTED) for choice in choices]
    assert losses == sorted(losses, reverse=True) and losses[0] > 1.1 * losses[-1]


def test_flops_are_spent_head_and_attention_included() -> None:
    choice = asked(1e20)
    assert choice.tokens * training_flops_per_token(choice.model, DOCUMENT) == pytest.approx(1e20, rel=1e-9)


def test_same_question_same_choice() -> None:
    assert asked(1e20) == asked(1e20)


def test_nothing_beyond_the_extrapolation_is_chosen() -> None:
    for factor in (1.0, 2.0, 4.0):
        for flops in (5e18, 4e19):
            choice = asked(flops, extrapolation=factor)
            weights = matrix_parameters(choice.model)
            assert allowed(weights.non_embedding, choice.tokens, weights.backbone_share, factor * 1.0001)
    edge = asked(4e19, extrapolation=1.0)
    assert any("1 times outside of what the law has seen is an edge here" in note for note in edge.notes)
    assert not any("edge" in note for note in asked(2e19).notes)
    # Both N and D are at their ends; P and R are what is left to spend the FLOPs on.
    assert any("is an edge here" in note for note in asked(1.1e21).notes)


@pytest.mark.parametrize("flops", [1e15, 1e23])
def test_budgets_beyond_the_law_are_refused_with_the_factor_that_would_do(flops: float) -> None:
    with pytest.raises(ConfigError, match=r"lies .* times outside .*--extrapolation") as refused:
        asked(flops)
    factor = float(str(refused.value).rpartition(" ")[2])
    assert factor > 4
    assert asked(flops, extrapolation=factor).tokens > 0
    with pytest.raises(ConfigError, match="--extrapolation"):
        asked(flops, extrapolation=0.8 * factor)


def test_an_end_of_what_was_seen_is_called_a_bound() -> None:
    assert any(note.startswith("P = 0.7 is the largest that was searched") for note in asked(1e20).notes)
    assert any(note.startswith("R = 2 is the least that was searched") for note in asked(1e20, COARSE_IS_DEAR).notes)
    coarse = asked(1e20, replace(PLANTED, gamma=-0.1))
    assert coarse.model.boundary.target_ratio == 8 and any(
        note.startswith("R = 8 is the largest that was searched (2 to 8)") for note in coarse.notes)
    assert not any(note.startswith("R") for note in asked(1e20).notes)
    assert not any(note.startswith("P") for note in asked(1e20, share=0.7).notes)


def test_fixed_boundaries_get_whole_numbers() -> None:
    whole = replace(LIKE, boundary=BoundaryConfig(form="fixed"))
    choice = by_law(1e20, whole, fitted(), DOCUMENT, extrapolation=None)
    assert choice.model.boundary.target_ratio in (5.0, 6.0)


def test_ladder_of_one_share_and_one_ratio_leaves_size_alone() -> None:
    law = replace(fitted(), seen=SEEN | {"P": Range(0.7, 0.7), "R": Range(3.96, 4.03)})
    choice = by_law(1e20, LIKE, law, DOCUMENT, extrapolation=None)
    assert choice.model.boundary.target_ratio == 4
    assert matrix_parameters(choice.model).backbone_share == pytest.approx(0.7, abs=0.02)


def test_law_without_a_size_that_the_shape_has_is_refused() -> None:
    tiny = {name: Range(1e2, 1e3) for name in ("N", "token_parameters", "concept_parameters")}
    with pytest.raises(ConfigError, match="times outside"):
        by_law(1e20, LIKE, replace(fitted(), seen=SEEN | tiny), DOCUMENT, extrapolation=None)


def test_given_size_without_a_shape_is_refused_as_such() -> None:
    with pytest.raises(ConfigError, match=r"parameters = 2e.04.*no shape in steps of 128"):
        asked(1e20, size=2e4)


def test_prediction_is_the_laws_of_the_shapes_own_numbers() -> None:
    choice = asked(1e20)
    found = predicted(choice.model, choice.tokens, fitted(), None)
    assert found.loss == pytest.approx(loss_of(choice, PLANTED)) and found.low < found.loss < found.high
    assert 1 < found.factor <= 4


def convention(**given: float) -> Choice:
    known: dict[str, Any] = {name: None for name in ("flops", "size", "tokens", "share", "ratio")}
    return by_convention(LIKE, DOCUMENT, **{**known, "tokens_per_parameter": 20.0, **given})


@pytest.mark.parametrize("flops", [1e17, 1e19, 1e21, 1e23, 1e25])
@pytest.mark.parametrize("per_parameter", [5.0, 20.0, 300.0])
def test_without_a_law_flops_are_spent_at_so_many_tokens_a_parameter(flops: float, per_parameter: float) -> None:
    choice = convention(flops=flops, tokens_per_parameter=per_parameter)
    weights = matrix_parameters(choice.model)
    assert choice.tokens * training_flops_per_token(choice.model, DOCUMENT) == pytest.approx(flops, rel=1e-9)
    assert choice.tokens / weights.non_embedding == pytest.approx(per_parameter, rel=0.3 if flops < 1e18 else 0.07)
    assert weights.backbone_share == pytest.approx(matrix_parameters(LIKE).backbone_share, abs=0.05)
    assert choice.model.boundary == LIKE.boundary and not choice.notes


def test_without_a_law_a_size_has_the_tokens_that_are_said() -> None:
    size = float(matrix_parameters(LIKE).non_embedding)
    assert convention(size=size) == Choice(LIKE, 20 * size, (), 1)
    assert convention(size=size, tokens=1e9).tokens == 1e9
    of_budget = convention(size=size, flops=1e20)
    assert of_budget.tokens * training_flops_per_token(LIKE, DOCUMENT) == pytest.approx(1e20)
    coarser = convention(size=size, flops=1e20, ratio=8.0)
    assert coarser.model.boundary.target_ratio == 8 and coarser.tokens > of_budget.tokens


def test_budget_that_is_too_small_gets_the_smallest_shape_and_says_so() -> None:
    choice = convention(flops=1e12)
    assert "tokens a parameter, not 20" in choice.notes[0]
    assert matrix_parameters(choice.model).non_embedding < 3e6
    assert choice.tokens * training_flops_per_token(choice.model, DOCUMENT) == pytest.approx(1e12)


def test_size_without_a_shape_of_the_known_share_gets_the_nearest_share() -> None:
    smoke = like("smoke").model
    known: dict[str, Any] = {"flops": None, "tokens": None, "tokens_per_parameter": 20.0, "ratio": None}
    choice = by_convention(smoke, 128.0, size=3e5, share=None, **known)
    assert matrix_parameters(choice.model).non_embedding == pytest.approx(3e5, rel=0.1)
    with pytest.raises(ConfigError, match="no shape"):
        by_convention(smoke, 128.0, size=3e5, share=0.7, **known)
    with pytest.raises(ConfigError, match="no shape"):
        by_convention(smoke, 128.0, size=1e3, share=None, **known)
