"""Shapes of a wanted size keep what they have to keep, meet what was asked, and are the nearest to the wish."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import pytest

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import BoundaryConfig, ConfigError, ModelConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling import shapes
from dlcm_lightning.scaling.shapes import dense_of_flops, dense_of_size, depth, model_of_size

RUNS = ("dlcm_2b_1t", "ladder_274m", "quickstart", "smoke", "upcycle_smollm2")
LIKES = {name: load_config(name).model for name in RUNS}
SIZES = [10 ** (5 + step / 4) for step in range(25)]
SHARES = (0.3, 0.5, 0.7)
SHAPES = {"d_token", "d_concept", "encoder_layers", "backbone_layers", "decoder_layers", "heads_token",
          "kv_heads_token", "heads_concept", "kv_heads_concept", "ffn_token", "ffn_concept"}


def found(parameters: float, share: float, like: ModelConfig) -> ModelConfig | None:
    try:
        return model_of_size(parameters, share, like)
    except ConfigError:
        return None


def ratios(model: ModelConfig) -> tuple[Fraction, ...]:
    pairs = [(model.ffn_token, model.d_token), (model.heads_token, model.d_token),
             (model.kv_heads_token, model.heads_token), (model.ffn_concept, model.d_concept),
             (model.heads_concept, model.d_concept), (model.kv_heads_concept, model.heads_concept)]
    return tuple(Fraction(*pair) for pair in pairs)


def others(model: ModelConfig) -> dict[str, object]:
    return {name: value for name, value in vars(model).items() if name not in SHAPES}


def off(model: ModelConfig, parameters: float, share: float) -> tuple[float, float]:
    weights = matrix_parameters(model)
    return abs(weights.non_embedding / parameters - 1), abs(weights.backbone_share - share)


def stretch(model: ModelConfig, like: ModelConfig) -> float:
    """Factor between their E / D."""
    return math.exp(abs(math.log(model.d_concept / model.d_token / (like.d_concept / like.d_token))))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("share", SHARES)
def test_size_and_share_are_met_and_nothing_but_shapes_changes(run: str, share: float) -> None:
    like = LIKES[run]
    least = 1e8 if run == "upcycle_smollm2" else 1e7  # its widths go in steps of 192
    for parameters in SIZES:
        model = found(parameters, share, like)
        if model is None:
            assert parameters < least / 2
            continue
        off_size, off_share = off(model, parameters, share)
        assert off_size <= 0.10 and off_share <= 0.05
        assert ratios(model) == ratios(like) and others(model) == others(like)
        assert min(model.encoder_layers, model.backbone_layers, model.decoder_layers) >= 1
        if parameters >= least:
            assert off_size <= 0.03 and off_share <= 0.02


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("share", SHARES)
def test_large_models_keep_to_the_wish(run: str, share: float) -> None:
    like = LIKES[run]
    wanted_share = like.encoder_layers / (like.encoder_layers + like.decoder_layers)
    for parameters in SIZES:
        if parameters < 1e8:
            continue
        model = model_of_size(parameters, share, like)
        layers = model.encoder_layers + model.backbone_layers + model.decoder_layers
        assert stretch(model, like) < 1.5
        assert max(layers / depth(model.d_token, like), depth(model.d_token, like) / layers) < 1.4
        tokens = model.encoder_layers + model.decoder_layers
        assert abs(model.encoder_layers - wanted_share * tokens) <= 0.5 + 1e-9


@pytest.mark.parametrize("run", RUNS)
def test_size_of_the_known_model_gives_it_back(run: str) -> None:
    weights = matrix_parameters(LIKES[run])
    assert model_of_size(weights.non_embedding, weights.backbone_share, LIKES[run]) == LIKES[run]


def test_depth_is_the_least_squares_of_the_shipped_ladder() -> None:
    ladder = [load_config(f"ladder_{size}").model for size in ("87m", "274m", "468m", "833m")]
    ladder.append(LIKES["dlcm_2b_1t"])
    width = [math.log(model.d_token) for model in ladder]
    layers = [math.log(model.encoder_layers + model.backbone_layers + model.decoder_layers) for model in ladder]
    mean = sum(width) / 5
    slope = sum((x - mean) * y for x, y in zip(width, layers, strict=True)) / sum((x - mean) ** 2 for x in width)
    assert pytest.approx(slope, abs=0.005) == shapes.GROWTH
    for model, y in zip(ladder, layers, strict=True):
        assert depth(model.d_token, LIKES["dlcm_2b_1t"]) == pytest.approx(math.exp(y), rel=0.12)


def neighbours(like: ModelConfig, parameters: float) -> Iterator[ModelConfig]:
    """Every small shape with the ratios of `like`, by counting up; none of the search's shortcuts."""
    token, concept = (math.gcd(*numbers) for numbers in (
        (like.d_token, like.heads_token, like.kv_heads_token, like.ffn_token),
        (like.d_concept, like.heads_concept, like.kv_heads_concept, like.ffn_concept)))
    for i in range(1, 8):
        for j in range(1, 16):
            for layers in range(2, 60):
                for backbone in range(1, 60):
                    encoder = min(layers - 1, max(1, round(
                        layers * like.encoder_layers / (like.encoder_layers + like.decoder_layers))))
                    model = replace(
                        like, encoder_layers=encoder, backbone_layers=backbone, decoder_layers=layers - encoder,
                        **{name: getattr(like, name) // token * i
                           for name in ("d_token", "heads_token", "kv_heads_token", "ffn_token")},
                        **{name: getattr(like, name) // concept * j
                           for name in ("d_concept", "heads_concept", "kv_heads_concept", "ffn_concept")})
                    size = matrix_parameters(model).non_embedding
                    if size > 1.1 * parameters:
                        break
                    if size >= 0.9 * parameters:
                        yield model


@pytest.mark.parametrize(("run", "parameters", "share"), [
    ("smoke", 3e5, 0.5), ("smoke", 3e5, 0.7), ("smoke", 1e6, 0.7), ("quickstart", 1e6, 0.3), ("quickstart", 5e6, 0.7),
    ("dlcm_2b_1t", 3e6, 0.7), ("dlcm_2b_1t", 1e7, 0.5), ("upcycle_smollm2", 3e6, 0.5)])
def test_small_shapes_are_those_of_a_count_of_all(run: str, parameters: float, share: float) -> None:
    """What is returned cannot be bettered, and what is refused does not exist, within a factor of 3 of the wish."""
    like = LIKES[run]

    def rank(model: ModelConfig) -> tuple[float, float]:
        off_size, off_share = off(model, parameters, share)
        layers = model.encoder_layers + model.backbone_layers + model.decoder_layers
        token_share = like.encoder_layers / (like.encoder_layers + like.decoder_layers)
        factor = layers / max(3.0, depth(model.d_token, like))
        if max(stretch(model, like), factor, 1 / factor) > 3 + 1e-9:
            return math.inf, math.inf
        strain = (math.log(stretch(model, like)) ** 2 + math.log(factor) ** 2) / math.log(1.5) ** 2 + (
            model.encoder_layers / (model.encoder_layers + model.decoder_layers) - token_share) ** 2
        close = off_size <= 0.03 and off_share <= 0.02
        return (0.0, strain) if close else (1.0, max(off_size / 0.10, off_share / 0.05))

    best = min(map(rank, neighbours(like, parameters)), default=(math.inf, math.inf))
    model = found(parameters, share, like)
    if best > (1.0, 1.0):
        assert model is None
    else:
        assert model is not None and rank(model) == pytest.approx(best, abs=1e-9)


def test_same_question_same_shape() -> None:
    for parameters in SIZES[8:]:
        models = {repr(found(parameters, 0.6, LIKES["dlcm_2b_1t"])) for _ in range(3)}
        assert len(models) == 1


@pytest.mark.parametrize("run", RUNS)
def test_few_shapes_are_tried(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some thousand arithmetic steps, whatever the size: a plan asks for hundreds of shapes."""
    tried = 0
    real = shapes._around

    def count(wanted: float, least: int) -> Iterator[int]:
        nonlocal tried
        tried += 1
        return real(wanted, least)

    monkeypatch.setattr(shapes, "_around", count)
    for parameters in SIZES:
        tried = 0
        found(parameters, 0.7, LIKES[run])
        assert tried < 5000


def test_another_boundary_has_the_size_too() -> None:
    """A form without parameters of its own."""
    like = replace(LIKES["ladder_274m"], boundary=BoundaryConfig(form="fixed"))
    assert off(model_of_size(5e8, 0.6, like), 5e8, 0.6)[0] <= 0.03


@pytest.mark.parametrize(("parameters", "share", "words"), [
    (1e5, 0.7, "parameters = 1e.05.*steps of 128.*ask for N = .*which is the nearest.*smaller head_dim than 64"),
    (0.0, 0.7, "parameters = 0.0: give a number above zero"), (math.nan, 0.7, "parameters = nan"),
    (math.inf, 0.7, "parameters = inf"), (1e9, 1.0, "backbone_share = 1.0"), (1e9, math.nan, "backbone_share = nan"),
    (3e7, 0.999, "no shape")])
def test_impossible_sizes_are_refused_with_a_remedy(parameters: float, share: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model_of_size(parameters, share, LIKES["dlcm_2b_1t"])


def test_dense_models_have_no_backbone_share() -> None:
    with pytest.raises(ConfigError, match="has no backbone"):
        model_of_size(1e9, 0.7, load_config("dense_1b_1t").model)


@pytest.mark.parametrize("run", [*RUNS, "dense_1b_1t"])
def test_dense_models_meet_their_size_and_their_flops(run: str) -> None:
    like = load_config(run).model
    for parameters in SIZES:
        if parameters < 1e7:
            continue
        model = dense_of_size(parameters, like)
        weights = matrix_parameters(model)
        assert model.kind == "dense" and ratios(model)[:3] == ratios(like)[:3]
        assert weights.non_embedding == pytest.approx(parameters, rel=0.10 if parameters < 1e8 else 0.03)
        if parameters < 1e8:
            continue
        wanted = 5 * parameters + 6 * like.vocab_size * model.d_token
        partner = dense_of_flops(wanted, like, 4096)
        assert training_flops_per_token(partner, 4096) == pytest.approx(wanted, rel=0.02)
        if parameters > 3e8:
            for one in (model, partner):
                assert one.decoder_layers == pytest.approx(depth(one.d_token, like), rel=0.4)


def test_dense_model_of_the_known_size_is_the_known_model() -> None:
    like = load_config("dense_1b_1t").model
    found_again = dense_of_size(matrix_parameters(like).non_embedding, like)
    assert (found_again.d_token, found_again.decoder_layers) == (like.d_token, like.decoder_layers)
    of_flops = dense_of_flops(training_flops_per_token(like, 8192), like, 8192)
    assert (of_flops.d_token, of_flops.decoder_layers) == (like.d_token, like.decoder_layers)


def test_dense_partner_of_the_papers_model_is_about_its_baseline() -> None:
    """Equal body FLOPs at R = 4 were the paper's choice; attention and head are counted here."""
    model = LIKES["dlcm_2b_1t"]
    partner = dense_of_flops(training_flops_per_token(model, 8192), model, 8192)
    assert matrix_parameters(partner).non_embedding == pytest.approx(905_969_664, rel=0.25)


@pytest.mark.parametrize(("ask", "words"), [
    (lambda like: dense_of_size(1e4, like), "parameters = 1e.04: no dense model.*smaller head_dim"),
    (lambda like: dense_of_size(-1, like), "parameters = -1"),
    (lambda like: dense_of_size(2.5e5, like), "parameters = 2.5e.05: no dense model.*ask for 4.915e.05"),
    (lambda like: dense_of_flops(1e3, like, 8192), "flops_per_token = 1000: no dense model.*vocabulary")])
def test_impossible_dense_models_are_refused(ask: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ask(LIKES["dlcm_2b_1t"])  # type: ignore[operator]
