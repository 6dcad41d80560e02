"""Gradients of the whole step's loss, whatever the split; statistics that count what they should."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from dlcm_lightning.batch import COUNTS, Batch, StepCounts
from dlcm_lightning.config import BoundaryConfig, Config, Threshold
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.model.boundary import LearnedBoundary
from dlcm_lightning.model.dlcm import DLCM
from dlcm_lightning.training.datamodule import TrainLoader
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.metrics.sums import MetricSums, counts_of
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.rate_loss import rate_loss, rate_loss_surrogate, rate_slope
from dlcm_lightning.training.stopwatch import Stopwatch
from dlcm_lightning.training.validation import validate
from tests import reference as oracle
from tests.synthetic import VOCABULARY

Gradients = dict[str, torch.Tensor]
TOKEN_BYTES = torch.arange(VOCABULARY) % 7
"""Not the tokenizer's, so that a count of bytes that ignores the table cannot come out right."""


def module_for(config: Config) -> PretrainModule:
    module = PretrainModule(config, torch.float64, "sdpa", TOKEN_BYTES)
    module.configure_model()
    module.model.load_state_dict(oracle.random_state(config.model, seed=2))
    return module


def with_boundary(config: Config, **fields: object) -> Config:
    return replace(config, model=replace(config.model, boundary=BoundaryConfig(**fields)))  # type: ignore[arg-type]


def step_gradients(config: Config, micro_batch_size: int, previous_rate: float | None = None) -> Gradients:
    """Gradients of one optimizer step, its rows split into micro-batches, as Lightning would accumulate them."""
    config = replace(config, data=replace(config.data, micro_batch_size=micro_batch_size))
    module = module_for(config)
    if previous_rate is not None:
        module.previous_counts.copy_(torch.tensor([round(previous_rate * 1000), 1000]))
    reader = Reader(config.data, config.seed, config.model.vocab_size)
    for number in range(config.micro_batches):
        loss = module.training_step(reader.step_batches(0)[number], number)
        (loss / config.micro_batches).backward()
    return {name: parameter.grad.clone() for name, parameter in module.model.named_parameters()
            if parameter.grad is not None}


def oracle_gradients(config: Config, previous_rate: float | None = None) -> Gradients:
    """The same from the loops, over all documents of the step at once."""
    whole = replace(config.data, micro_batch_size=config.data.global_batch_size)
    batch = Reader(whole, config.seed, config.model.vocab_size).step_batches(0)[0]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in oracle.random_state(config.model, 2).items()}
    lengths = batch.documents.lengths().tolist()
    pieces = [tensor.split(lengths) for tensor in (batch.tokens, batch.noise, batch.targets)]
    outputs = [oracle.forward(leaves, config.model, tokens, noise)
               for tokens, noise in zip(pieces[0], pieces[1], strict=True)]
    oracle.losses(outputs, list(pieces[2]), config.model, previous_rate).total.backward()
    buffers = ("boundary.rate_bias", "boundary.threshold", "boundary.prior_mean")
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None and name not in buffers}


def assert_equal(mine: Gradients, theirs: Gradients) -> None:
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_one_micro_batch_uses_the_rate_of_its_own_step(run_config: Config) -> None:
    config = with_boundary(run_config, rate_weight=2.0)
    assert_equal(step_gradients(config, 4), oracle_gradients(config))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_every_split_into_micro_batches_gives_the_same_gradients(run_config: Config, rows: int) -> None:
    """3 rows a micro-batch: the second holds one row and two padding rows, which must count in nothing."""
    config = with_boundary(run_config, rate_weight=2.0, previous_rate=True)
    assert_equal(step_gradients(config, rows, previous_rate=0.4), oracle_gradients(config, previous_rate=0.4))


def test_the_first_step_of_an_accumulating_run_has_no_rate_gradient(run_config: Config) -> None:
    config = with_boundary(run_config, rate_weight=2.0)
    gradients = step_gradients(config, 2)
    assert gradients["boundary.query.weight"].abs().max() == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_the_loss_per_document_is_the_ablation_of_table_4(run_config: Config, rows: int) -> None:
    config = with_boundary(run_config, rate_weight=2.0, rate_scope="document")
    assert_equal(step_gradients(config, rows), oracle_gradients(config))


def test_the_rate_loss_is_zero_at_the_target_a_saddle_and_can_be_negative() -> None:
    def at(f: float, g: float) -> float:
        return rate_loss(torch.tensor(f, dtype=torch.float64), torch.tensor(g, dtype=torch.float64), 4.0).item()

    assert at(0.25, 0.25) == pytest.approx(0, abs=1e-12)
    assert at(0.3, 0.3) > 0
    assert at(0.3, 0.2) < 0
    f, g = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rate_loss(f, g, 4.0).backward()
    torch.testing.assert_close(g.grad, rate_slope(f, 4.0))


def one_batch(config: Config) -> Batch:
    return Reader(config.data, config.seed, config.model.vocab_size).step_batches(0)[0]


def test_a_tally_counts_by_domain_and_leaves_fillers_out(run_config: Config) -> None:
    config = replace(run_config, data=replace(run_config.data, global_batch_size=5, micro_batch_size=3))
    module = module_for(config)
    batch = Reader(config.data, config.seed, config.model.vocab_size).step_batches(0)[1]
    assert batch.samples.tolist() == [3, 4, -1]
    sums, output = module.measure(batch, batch.noise)
    real = batch.counted()
    assert sums.total("tokens") == 2 * 64
    assert counts_of(batch.step, module.device)[COUNTS.index("tokens")] == 5 * 64
    assert sums.total("targets") == (batch.targets >= 0).sum() < batch.step.targets
    assert sums.scalar("concepts") == len(output.concepts)
    states = output.segmentation.features[real]
    torch.testing.assert_close(sums.features, states.sum(0))
    assert sums.total("bytes") == sum(int(TOKEN_BYTES[target]) for target in batch.targets if target >= 0)
    assert sums.total("sampled") == output.segmentation.boundaries[real].sum()
    starts = torch.zeros(len(real), dtype=torch.bool).index_fill_(0, batch.documents.cu_seqlens[:-1].long(), True)
    inside = output.segmentation.probabilities[real & ~starts].double()
    torch.testing.assert_close(sums.spread, inside.std(correction=0))
    assert sums.total("half") == (output.segmentation.probabilities[real] >= 0.5).sum()
    threshold = torch.sigmoid(dict(module.model.named_buffers())["boundary.threshold"])
    assert sums.total("calibrated") == (output.segmentation.probabilities[real] >= threshold).sum()
    for number in range(len(config.data.domains)):
        rows = (batch.domains == number) & (batch.samples >= 0)
        assert sums.domains[number, 0] == 64 * rows.sum()
    metrics = metrics_of(sums, config.data.domains, config.model.boundary)
    assert metrics["R_sampled"] == pytest.approx(1 / metrics["F"])
    doubled = metrics_of(sums + sums, config.data.domains, config.model.boundary)
    assert doubled["bits_per_byte"] == pytest.approx(metrics["bits_per_byte"])


@pytest.mark.parametrize("scope", ["global", "document"])
def test_the_rate_loss_that_is_logged_is_the_one_that_is_optimised(run_config: Config, scope: str) -> None:
    """By loops over the documents that count, and by the gradient on every probability."""
    boundary = replace(run_config.model.boundary, rate_scope=scope, rate_weight=1.0)  # type: ignore[arg-type]
    config = replace(run_config, model=replace(run_config.model, boundary=boundary),
                     data=replace(run_config.data, global_batch_size=5, micro_batch_size=3))
    module = module_for(config)
    batch = Reader(config.data, config.seed, config.model.vocab_size).step_batches(0)[1]  # two rows and a padding row
    sums, output = module.measure(batch, batch.noise)
    p, b = output.segmentation.probabilities.detach(), output.segmentation.boundaries.double()
    starts = batch.documents.cu_seqlens.tolist()
    pieces = [(begin, end) for begin, end in itertools.pairwise(starts) if batch.counted()[begin]]
    if scope == "global":
        pieces = [(0, 128)]
    each = [rate_loss(b[begin:end].mean(), p[begin:end].mean(), 4.0).item() for begin, end in pieces]
    logged = metrics_of(sums, config.data.domains, boundary)["rate_loss"]
    assert logged == pytest.approx(sum(each) / len(each), rel=1e-12)
    assert metrics_of(sums + sums, config.data.domains, boundary)["rate_loss"] == pytest.approx(logged, rel=1e-12)

    counts = torch.tensor([1.0, 128.0, len(pieces)], dtype=torch.float64)
    free = p.clone().requires_grad_()
    surrogate = rate_loss_surrogate(replace(output, segmentation=replace(output.segmentation, probabilities=free)),
                                    batch,
                                counts, boundary, sums.rate)
    surrogate.backward()
    also = p.clone().requires_grad_()
    (sum(rate_loss(b[begin:end].mean(), also[begin:end].mean(), 4.0) for begin, end in pieces) / len(pieces)).backward()
    torch.testing.assert_close(free.grad, also.grad)


@pytest.mark.parametrize("form", ["rule", "fixed"])
def test_forms_without_a_rate_loss_log_none(run_config: Config, form: str) -> None:
    boundary = replace(run_config.model.boundary, form=form)  # type: ignore[arg-type]
    config = replace(run_config, model=replace(run_config.model, boundary=boundary))
    sums, _ = module_for(config).measure(one_batch(config), one_batch(config).noise)
    found = metrics_of(sums, config.data.domains, boundary)
    assert "rate_loss" not in found and found["R_sampled"] > 1


def test_a_step_without_a_token_leaves_the_boundary_as_it_is(run_config: Config) -> None:
    module = module_for(run_config)
    module.training_step(one_batch(run_config), 0)
    module.after_step()
    state = [module.previous_counts, *module.model.boundary.buffers()]
    before = [buffer.clone() for buffer in state]
    module.step_sums = replace(
        MetricSums.nothing(len(run_config.data.domains), module.device), features=torch.zeros(run_config.model.d_token))
    module.after_step()
    assert all(torch.equal(buffer, old) for buffer, old in zip(state, before, strict=True))


def test_a_dense_model_has_a_tally_without_concepts(run_config: Config) -> None:
    config = replace(run_config, model=replace(run_config.model, kind="dense"))
    module = PretrainModule(config, torch.float64, "sdpa", TOKEN_BYTES)
    module.configure_model()
    batch = one_batch(config)
    loss = module.training_step(batch, 0)
    loss.backward()
    sums, output = module.measure(batch, None)
    assert output.segmentation is None and sums.total("tokens") == 256
    assert "R_sampled" not in metrics_of(sums, config.data.domains, None)


def test_the_rate_bias_moves_the_rate_towards_its_target(run_config: Config) -> None:
    """Nothing is trained; the bias alone brings F to 1/R from either side."""
    for delta in (-2.0, 2.0):
        module = module_for(run_config)
        assert isinstance(module.model, DLCM)
        boundary = module.model.boundary
        assert isinstance(boundary, LearnedBoundary)
        boundary.rate_bias.fill_(delta)
        batch = one_batch(run_config)
        before = module.measure(batch, batch.noise)[0].rate.item()
        for _ in range(60):
            rate = module.measure(batch, batch.noise)[0].rate
            boundary.after_step(rate, torch.tensor(0.25), torch.tensor(0.1), boundary.prior_mean)
        after = module.measure(batch, batch.noise)[0].rate.item()
        assert abs(after - 0.25) < 0.02 < abs(before - 0.25)


def test_the_threshold_brings_the_thresholded_rate_to_its_target(run_config: Config) -> None:
    """Nothing is trained; the threshold alone brings its rate to 1/R from either side, and moves by the counts of steps
    that are done."""
    for odds in (-1.0, 1.0):
        module = module_for(run_config)
        assert isinstance(module.model, DLCM)
        boundary = module.model.boundary
        assert isinstance(boundary, LearnedBoundary)
        boundary.threshold.fill_(odds)
        batch = one_batch(run_config)

        def share() -> torch.Tensor:
            return module.model(batch.tokens, batch.documents).segmentation.boundaries.double().mean()  # noqa: B023

        before = share()
        for _ in range(200):
            expected = boundary.threshold + 0.1 * torch.log(4 * share()).clamp(-1, 1)
            boundary.after_step(torch.tensor(0.25), share(), torch.tensor(0.1), boundary.prior_mean)
            torch.testing.assert_close(boundary.threshold, expected)
        assert abs(share() - 0.25) < 0.02 < abs(before - 0.25)


@pytest.mark.parametrize("spread", [0.3, 0.03, 0.003, 0.0003])
def test_the_threshold_settles_however_narrow_p_is(run_config: Config, spread: float) -> None:
    """Tokens whose p is drawn once, around 0.3; the threshold starts at one half, far above all of them."""
    boundary = LearnedBoundary(4, replace(run_config.model.boundary, target_ratio=8.0))
    generator = torch.Generator().manual_seed(0)
    p = (0.3 + spread * torch.randn(4096, generator=generator)).clamp(0, 1)
    spread_of_p = p.double().std()
    p[::512] = 1  # documents begin
    seen = []
    for _ in range(6000):
        above = (p >= boundary.threshold.sigmoid()).double().mean()
        seen.append(above.item())
        boundary.after_step(torch.tensor(0.125), above, spread_of_p, boundary.prior_mean)
    assert all(abs(one - 0.125) < 0.02 for one in seen[-50:]), seen[-50:]


def test_a_step_moves_the_threshold_by_its_own_counts_and_the_next_one_sees_it(run_config: Config) -> None:
    module = module_for(run_config)
    assert isinstance(module.model, DLCM)
    boundary = module.model.boundary
    assert isinstance(boundary, LearnedBoundary)
    before = boundary.threshold.clone()
    module.training_step(one_batch(run_config), 0)
    assert torch.equal(boundary.threshold, before), "the current batch must not enter"
    sums = module.step_sums
    assert sums is not None
    above = sums.total("calibrated") / sums.total("tokens")
    assert sums.total("calibrated") != sums.total("half")
    module.after_step()
    torch.testing.assert_close(boundary.threshold, before + 0.1 * torch.log(4 * above).to(before.dtype))


def test_the_threshold_has_no_part_in_training(run_config: Config) -> None:
    """Drawn boundaries, loss and gradients are the same wherever it stands, and whatever it is used for."""
    seen = []
    for odds, rule in ((0.0, "half"), (1.5, "half"), (1.5, "calibrated")):
        boundary = replace(run_config.model.boundary, threshold=rule)
        module = module_for(replace(run_config, model=replace(run_config.model, boundary=boundary)))
        dict(module.model.named_buffers())["boundary.threshold"].fill_(odds)
        loss = module.training_step(one_batch(run_config), 0)
        loss.backward()
        seen.append([loss.detach(), *(one.grad for one in module.model.parameters())])
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


def test_the_prior_mean_follows_the_mean_hidden_state_of_past_steps(run_config: Config) -> None:
    module = module_for(run_config)
    assert isinstance(module.model, DLCM)
    boundary = module.model.boundary
    assert isinstance(boundary, LearnedBoundary)
    prior = boundary.prior_mean.clone()
    module.training_step(one_batch(run_config), 0)
    assert torch.equal(boundary.prior_mean, prior), "the current batch must not enter"
    sums = module.step_sums
    assert sums is not None
    module.after_step()
    expected = 0.9 * prior + 0.1 * sums.features / 256
    torch.testing.assert_close(boundary.prior_mean, expected)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_ranks_speak_once_an_optimizer_step(run_config: Config, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """In its last micro-batch, whatever their number; and once more at the beginning of an attempt."""
    config = replace(run_config, data=replace(run_config.data, micro_batch_size=rows))
    module, spoken = module_for(config), []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        spoken.append(len(tensor))
        return tensor.clone()

    monkeypatch.setattr("dlcm_lightning.training.metrics.sums.all_reduce_sum", counted)
    monkeypatch.setattr("dlcm_lightning.training.module.all_reduce_sum", counted)
    reader = Reader(config.data, config.seed, config.model.vocab_size)
    loader = TrainLoader(reader, config, lambda: 0, False, Stopwatch())
    batches = iter(loader)
    for step in range(3):
        for number in range(config.micro_batches):
            assert len(spoken) == step + (step > 0 or number > 0)
            module.training_step(next(batches), step * config.micro_batches + number)
        module.after_step()
        assert len(spoken) == step + 2
    assert spoken[0] == len(COUNTS) and max(spoken) < 200 + config.model.d_token, "a small vector"


def test_every_micro_batch_names_the_counts_of_the_step_behind_it(run_config: Config) -> None:
    config = replace(run_config, data=replace(run_config.data, micro_batch_size=2))
    reader = Reader(config.data, config.seed, config.model.vocab_size)
    seen = list(TrainLoader(reader, config, lambda: 3, False, Stopwatch()))
    assert len(seen) == 2 * (config.total_steps - 3)
    for number, batch in enumerate(seen):
        later = seen[number // 2 * 2 + 2].step if number < len(seen) - 2 else StepCounts()
        assert batch.following == later and batch.step.tokens == 256


@pytest.mark.parametrize("rule", ["calibrated", "half"])
def test_validation_cuts_concepts_as_inference_does(run_config: Config, rule: Threshold) -> None:
    """The concepts that the backbone saw are those of thresholding; drawing finds others in the same rows."""
    boundary = replace(run_config.model.boundary, threshold=rule)
    module = module_for(replace(run_config, model=replace(run_config.model, boundary=boundary)))
    reader = Reader(run_config.data, run_config.seed, run_config.model.vocab_size)
    batches = [reader.step_batches(number)[0] for number in range(3)]
    sums = validate(module, batches)
    assert sums.scalar("concepts") == sums.total(rule) != sums.total("sampled")
    assert sums.total("calibrated") != sums.total("half")
    numbers = metrics_of(sums, run_config.data.domains, boundary)
    assert numbers["R_thresholded"] == numbers["R_half" if rule == "half" else "R_thresholded"]
    assert numbers["R_thresholded"] == (sums.total("tokens") / sums.scalar("concepts")).item()
    expected = [module.model(batch.tokens, batch.documents, None, batch.targets).nll_sum for batch in batches]
    torch.testing.assert_close(sums.total("nll"), torch.stack(expected).sum().detach())
