"""The run around a choice: budget, batch, rates, memory, partners; and what is asked in vain."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.compose import config_from, differences
from dlcm_lightning.config import Config, ConfigError, OptimConfig, TrainConfig
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.model.mup import Role, hyperparameters_of
from dlcm_lightning.scaling.plan.measured import measured_mfu
from dlcm_lightning.scaling.plan.partners import partners_of
from dlcm_lightning.scaling.plan.plan import plan
from dlcm_lightning.scaling.plan.report import report
from dlcm_lightning.scaling.plan.request import Request
from dlcm_lightning.scaling.plan.schedule import LEAST_STEPS, real_rates, scheduled
from tests.scaling.law.ladders import printed
from tests.scaling.plan.laws import DENSE, PLANTED, fitted, laws, like, planned

ROOT = Path(__file__).parents[3]
BUDGET = 0.02
"""By which the FLOPs of a run may miss what was asked."""


@pytest.mark.parametrize("flops", [1e17, 1e19, 1e21, 1e23])
def test_flops_of_the_run_are_the_budget(flops: float) -> None:
    found = planned(Request(flops=flops))
    assert found.flops == pytest.approx(flops, rel=BUDGET)
    assert found.flops == found.config.optim.total_tokens * training_flops_per_token(found.model, 8192)


@pytest.mark.parametrize("flops", [1e18, 1e19, 1e20])
def test_flops_of_the_run_are_the_budget_by_the_law_too(flops: float) -> None:
    assert planned(Request(flops=flops), law=laws()).flops == pytest.approx(flops, rel=BUDGET)


def test_gpu_days_are_flops_at_the_stated_share_of_the_peak() -> None:
    by_days = planned(Request(gpus=128, days=3, peak_flops=1e15, mfu=0.5))
    assert by_days.flops == pytest.approx(128 * 3 * 86400 * 1e15 * 0.5, rel=BUDGET)
    assert by_days.hardware.ranks == 128
    by_flops = planned(Request(flops=128 * 3 * 86400 * 1e15 * 0.5, gpus=128, peak_flops=1e15, mfu=0.5))
    assert by_flops == by_days


def test_gpu_days_with_a_size_leave_the_tokens_open() -> None:
    for law in (None, laws(extrapolation=1e4)):
        found = planned(Request(gpus=128, days=3, params=2e9), law=law)
        assert matrix_parameters(found.model).non_embedding == pytest.approx(2e9, rel=0.03)
        assert found.flops == pytest.approx(128 * 3 * 86400 * 989e12 * 0.4, rel=BUDGET)


def test_size_has_its_tokens_as_stated_or_by_convention() -> None:
    found = planned(Request(params=1.944e9))
    size = matrix_parameters(found.model).non_embedding
    assert found.model == like().model
    assert found.tokens == pytest.approx(20 * size, rel=1e-3)
    assert any("convention" in note for note in found.notes)
    assert planned(Request(params=1.944e9, tokens=1e12)).tokens == pytest.approx(1e12, rel=1e-5)
    assert planned(Request(params=1.944e9, tokens_per_parameter=5)).tokens == pytest.approx(5 * size, rel=1e-3)


def test_ratio_and_share_that_are_given_are_the_runs() -> None:
    found = planned(Request(flops=1e21, ratio=8, backbone_share=0.5))
    assert found.model.boundary == replace(like().model.boundary, target_ratio=8)
    assert matrix_parameters(found.model).backbone_share == pytest.approx(0.5, abs=0.02)
    assert not any("that of" in note for note in found.notes)


def test_nothing_is_predicted_without_a_law_and_that_is_said() -> None:
    found = planned(Request(flops=1e21))
    assert found.prediction is None and found.decay_gain is None
    assert all(partner.prediction is None for partner in found.partners)
    text = "\n".join(report(found))
    assert "no law was given" in text and "not predicted" in text and "nats a token" not in text


def test_predictions_are_those_of_the_laws() -> None:
    found = planned(Request(flops=1e20), law=laws())
    assert found.prediction is not None and found.decay_gain is not None
    weights = matrix_parameters(found.model)
    expected = printed(PLANTED, weights.non_embedding, found.tokens, found.model.boundary.target_ratio,
                       weights.backbone_share)
    assert found.prediction.loss == pytest.approx(expected, rel=1e-4)
    assert found.prediction.low < found.prediction.loss < found.prediction.high
    assert found.decay_gain == pytest.approx(
        0.02 * expected**1.4 * found.model.boundary.target_ratio**0.08 * weights.non_embedding**0.02, rel=1e-3)
    text = "\n".join(report(found))
    assert f"{found.prediction.loss:.4f} (95 %: {found.prediction.low:.4f} to {found.prediction.high:.4f})" in text
    assert f"{found.prediction.factor:.3g} times outside of" in " ".join(text.split())
    for partner in found.partners:
        assert partner.model is not None and partner.prediction is not None
        size = matrix_parameters(partner.model).non_embedding
        assert partner.prediction.loss == pytest.approx(DENSE.loss(size, partner.tokens))


@pytest.mark.parametrize("request_", [Request(flops=1e19), Request(flops=1e22), Request(params=5e8, tokens=3e10),
                                      Request(gpus=64, days=1, ratio=8)])
def test_partners_are_equal_in_what_they_say(request_: Request) -> None:
    found = planned(request_)
    of_flops, of_size = found.partners
    assert of_flops.model is not None and of_size.model is not None
    assert training_flops_per_token(of_flops.model, 8192) == pytest.approx(found.flops_per_token, rel=0.02)
    size = matrix_parameters(found.model).non_embedding
    assert matrix_parameters(of_size.model).non_embedding == pytest.approx(size, rel=0.03)
    for partner in found.partners:
        assert partner.model is not None and partner.model.kind == "dense"
        assert partner.model.vocab_size == found.model.vocab_size
        assert partner.tokens * training_flops_per_token(partner.model, 8192) == pytest.approx(found.flops)
    assert matrix_parameters(of_flops.model).non_embedding < size  # a concept computes less often
    assert of_size.tokens < of_flops.tokens


def test_both_partners_are_printed_with_what_there_is_to_say() -> None:
    text = list(report(planned(Request(flops=1e18), law=laws())))
    rows = {line[:15].strip(): line for line in text if line[:15].strip() in ("FLOPs a token", "parameters")
            and "matrices" not in line}
    assert set(rows) == {"FLOPs a token", "parameters"}
    tiny = planned(Request(params=3e5, tokens=6e6), "smoke").model
    for partner in partners_of(tiny, 1e9, 128, laws().dense, None):
        assert partner.prediction is None and "times outside" in partner.missing
    # A width of one unit that cannot be divided: two and a half of its layers are no dense model.
    odd = replace(tiny, heads_token=1, kv_heads_token=1, d_concept=32, heads_concept=1, kv_heads_concept=1,
                  ffn_concept=64)
    without = partners_of(odd, 1e9, 128, None, None)
    assert without[1].model is None and "no dense model" in without[1].missing
    shown = list(report(replace(planned(Request(params=3e5, tokens=6e6), "smoke"), partners=without)))
    assert any(line.startswith("parameters     parameters = 1.413e+05: no dense model") for line in shown)


def test_known_run_keeps_everything_but_shape_and_length() -> None:
    changed = set(differences(like(), planned(Request(flops=1e21)).config))
    assert {name.partition(".")[0] for name in changed} <= {"name", "model", "optim", "train"}
    assert {name for name in changed if name.startswith("optim")} == {"optim.total_tokens", "optim.warmup_tokens"}
    assert not {name for name in changed if name.startswith("model.") and ("vocab" in name or "mup" in name)}


@pytest.mark.parametrize(("run", "tokens"), [
    ("dlcm_2b_1t", 1e8), ("dlcm_2b_1t", 1e10), ("dlcm_2b_1t", 3e12), ("quickstart", 1e4), ("quickstart", 1e8),
    ("smoke", 1e3), ("smoke", 1e7), ("upcycle_smollm2", 1e6), ("boundary_study", 1e6)])
def test_batch_halves_until_there_are_steps_enough(run: str, tokens: float) -> None:
    known = like(run)
    config = scheduled(known, "x", known.model, tokens, None).config
    rows = config.data.global_batch_size
    assert known.data.global_batch_size % rows == 0
    assert rows == 1 or config.total_steps >= 0.99 * LEAST_STEPS
    if rows < known.data.global_batch_size:
        assert tokens / (2 * rows * known.data.sequence_length) < LEAST_STEPS  # halved no further than that
    assert config.optim.total_tokens == config.total_steps * config.data.tokens_per_step
    assert config.optim.total_tokens == pytest.approx(tokens, rel=0.05, abs=config.data.tokens_per_step)
    assert config.data.micro_batch_size <= rows
    assert config.optim.warmup_tokens <= max(0.051 * config.optim.total_tokens, config.data.tokens_per_step)
    train = config.train
    for every in (train.validate_every_steps, train.checkpoint_every_steps):
        assert 1 <= every <= max(1, config.total_steps / 10)
    assert 1 <= train.log_every_steps <= max(1, config.total_steps / 50)
    assert config_from(_plain(config)) == config  # every check of the configuration holds


def _plain(config: Config) -> dict[str, Any]:
    return {one.name: (vars(value) if hasattr(value := getattr(config, one.name), "__dict__") else value)
            for one in fields(config)} | {"model": {**vars(config.model), "boundary": vars(config.model.boundary),
                                                    "mup": vars(config.model.mup)},
                                          "data": {**vars(config.data), "sources": [
                                              vars(source) for source in config.data.sources]}}


def test_batch_keeps_a_row_for_every_gpu() -> None:
    known = like()
    config = scheduled(known, "x", known.model, 1e8, 64).config
    assert config.data.global_batch_size == 64 and config.data.micro_batch_size == 1
    with pytest.raises(ConfigError, match="--gpus 16: more than the 8 rows of a step of smoke"):
        planned(Request(params=1e6, gpus=16), "smoke")


def test_change_of_the_batch_is_said() -> None:
    notes = planned(Request(flops=1e17)).notes
    assert any("rows a step in place of dlcm_2b_1t's 512" in note for note in notes)
    assert not any("rows a step in place" in note for note in planned(Request(flops=1e22)).notes)


def test_longer_run_than_the_known_one_warms_up_and_validates_in_proportion() -> None:
    known = like("smoke")
    config = scheduled(known, "x", known.model, 1e8, None).config
    assert config.optim.warmup_tokens == pytest.approx(0.05 * config.optim.total_tokens, rel=0.01)
    assert config.train.validate_every_steps == 1000 and config.train.log_every_steps == 5


def test_warm_up_leaves_room_for_the_decay() -> None:
    known = like("quickstart")
    optim = replace(known.optim, decay_fraction=1.0, warmup_tokens=0)
    assert scheduled(replace(known, optim=optim), "x", known.model, 1e6, None).config.optim.warmup_tokens == 0


def test_weights_of_another_shape_are_not_begun_with() -> None:
    found = planned(Request(params=2e8, tokens=1e9), "upcycle_smollm2")
    assert found.config.train.init_from == "" and any("init_from" in note for note in found.notes)
    known = like("upcycle_smollm2")
    assert scheduled(known, "x", known.model, 1e6, None).config.train.init_from == known.train.init_from


def test_rates_at_the_width_are_those_of_mup() -> None:
    for run in ("dlcm_2b_1t", "quickstart", "smoke", "upcycle_smollm2"):
        config = planned(Request(params=3e8, tokens=1e9), run).config
        optim = OptimConfig(lr_token=1.1e-3, lr_concept=2.3e-3, lr_boundary=3.7e-3, lr_other=4.1e-4)
        found = real_rates(config.model, optim)
        roles = {"lr_token": (Role.TOKEN, Role.TOKEN_TO_CONCEPT), "lr_concept": (Role.CONCEPT, Role.CONCEPT_TO_TOKEN),
                 "lr_boundary": (Role.BOUNDARY,),
                 "lr_other": (Role.EMBEDDING, Role.UNEMBEDDING, Role.NORM_TOKEN, Role.NORM_CONCEPT)}
        assert {role for some in roles.values() for role in some} == set(Role)
        for name, some in roles.items():
            for role in some:
                rule = hyperparameters_of(role, config.model, optim)
                assert found[name] == (getattr(optim, name), pytest.approx(rule.learning_rate))


@pytest.mark.parametrize("gpus", [7, 96, 128, 200, 512])
def test_no_gpu_computes_padding_rows(gpus: int) -> None:
    for request in (Request(flops=1e22, gpus=gpus), Request(params=3e8, tokens=2e9, gpus=gpus)):
        found = planned(request)
        data = found.config.data
        assert data.global_batch_size % (gpus * data.micro_batch_size) == 0
        known = like().data.global_batch_size
        assert data.global_batch_size == known or any("a step in place of" in note for note in found.notes)
    assert planned(Request(flops=1e22, gpus=96)).config.data.global_batch_size == 576  # 512 would be computed as 576


def test_rates_of_blocks_follow_depth_where_an_exponent_is_given() -> None:
    config = planned(Request(params=3e8, tokens=1e9)).config
    model = replace(config.model, mup=replace(config.model.mup, depth_exponent=0.5, base_layers=4))
    found = real_rates(model, config.optim)
    for name, role in (("lr_token", Role.TOKEN), ("lr_concept", Role.CONCEPT)):
        assert found[name][1] == pytest.approx(hyperparameters_of(role, model, config.optim).learning_rate)
        assert found[name][1] < real_rates(config.model, config.optim)[name][1]


def test_memory_that_does_not_do_is_said_with_what_does() -> None:
    notes = planned(Request(flops=1e21, gpus=8)).notes
    assert any("does not fit into 80 GB; train with train.strategy=fsdp2" in note for note in notes)
    assert not any("does not fit" in note for note in planned(Request(flops=1e19, gpus=8)).notes)
    none = planned(Request(flops=1e21, gpus=8, gpu_bytes=1e9)).notes
    assert any("and no strategy does; take more GPUs" in note for note in none)
    small = planned(Request(flops=1e21, gpus=8, gpu_bytes=42e9)).notes
    assert any("data.micro_batch_size=1" in note for note in small)


def test_documents_shorter_than_rows_are_cheaper() -> None:
    short, long = planned(Request(params=1e9, document_tokens=500)), planned(Request(params=1e9))
    assert short.flops_per_token < long.flops_per_token == training_flops_per_token(long.model, 8192)


@pytest.mark.parametrize(("request_", "with_law", "words"), [
    (Request(), False, "for what budget"), (Request(gpus=8), False, "for what budget"),
    (Request(days=3), False, "--gpus 128"), (Request(flops=1e21, days=3, gpus=8), False, "two budgets"),
    (Request(flops=1e21, params=1e9), False, "--params with --gpus and --days"),
    (Request(params=1e9, tokens=1e9, tokens_per_parameter=2), False, "give one of them"),
    (Request(flops=1e21, tokens=1e9), False, "--tokens 1e[+]09: goes with a size"),
    (Request(params=1e9, gpus=8, days=1, tokens=1e9), False, "tokens follow from the budget"),
    (Request(params=1e9, gpus=8, days=1, tokens_per_parameter=9), True, "--tokens-per-parameter 9: .*leave --days out"),
    (Request(flops=1e20, tokens_per_parameter=9), True, "leave --law out"),
    (Request(flops=1e20, extrapolation=9), False, "--extrapolation 9: .*add --law"),
    (Request(flops=1e21, gpus=12), False, "take 8, or say --gpus-per-node"),
    (Request(params=1e12, gpus=8), True, "times outside"),
    (Request(params=3e7, backbone_share=0.999), False, "no shape")])
def test_contradictions_and_gaps_are_refused_with_the_remedy(request_: Request, with_law: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(request_, law=laws() if with_law else None)


def test_other_kinds_of_run_and_of_law_are_refused() -> None:
    with pytest.raises(ConfigError, match="--like dense_1b_1t: is a dense model"):
        planned(Request(flops=1e21), "dense_1b_1t")
    with pytest.raises(ConfigError, match="holds no law of DLCMs"):
        plan(Request(flops=1e21), like(), replace(laws(), concept=None), "x")
    without = plan(Request(flops=1e20), like(), replace(laws(), dense=None, decay=None), "x")
    assert without.prediction is not None and without.decay_gain is None
    assert all(partner.prediction is None and not partner.missing for partner in without.partners)


def test_law_with_size_and_tokens_predicts_and_says_that_it_did_not_choose() -> None:
    found = planned(Request(params=5e8, tokens=1e10), law=laws())
    assert found.prediction is not None
    assert found.model.boundary.target_ratio == 4 and any("no budget to choose" in note for note in found.notes)
    assert found.prediction == fitted().predict(
        matrix_parameters(found.model).non_embedding, 1e10, 4, matrix_parameters(found.model).backbone_share)


def test_ranks_are_whole_nodes_and_one_node_where_nobody_says() -> None:
    assert (planned(Request(flops=1e21, gpus=3)).hardware.nodes, TrainConfig().nodes) == (1, 0)
    several = planned(Request(flops=1e21, gpus=32, gpus_per_node=4)).hardware
    assert (several.nodes, several.gpus_per_node) == (8, 4)
    assert planned(Request(flops=1e21)).hardware.ranks == 8
    assert planned(Request(params=3e5, tokens=1e5), "smoke").hardware.ranks == 1


def test_measured_share_of_the_peak_is_read_from_a_benchmark_and_from_a_run(tmp_path: Path) -> None:
    card = json.loads((ROOT / "benchmarks/results/h200.json").read_text())
    assert measured_mfu(str(ROOT / "benchmarks/results/h200.json")) == card["step"]["mfu"]
    lines = [{"step": step, "train/loss": 2.0, "mfu": share} for step, share in enumerate((0.01, 0.1, 0.41, 0.4, 0.42))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))
    assert measured_mfu(str(tmp_path)) == 0.41
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mfu": null}\n')
    for place, words in ((tmp_path, "holds no mfu.*--mfu 0.4"), (tmp_path / "none", "cannot be read"),
                         (ROOT / "benchmarks/results/step.json", "holds no mfu")):
        with pytest.raises(ConfigError, match=words):
            measured_mfu(str(place))
