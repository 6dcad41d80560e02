"""The fast model equals the paper written as loops: forward, gradients, packed and alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from dlcm_lightning.batch import IGNORE_INDEX
from dlcm_lightning.model.dlcm import build_model
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.rate_loss import rate_loss
from tests import reference as oracle
from tests.model.conftest import LENGTHS, SMALL, loaded, small, tokens_and_noise

TOLERANCE = 1e-10
"""float64; what remains is the order of sums."""
CPU_BACKENDS = ("sdpa", "reference")


def split(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.split(LENGTHS))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_packed_documents_equal_the_loops_over_each_of_them(form: str, sampled: bool, backend: str) -> None:
    config = small(form)
    state = oracle.random_state(config, seed=3)
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    model = loaded(config, state, backend)
    output = model(tokens, documents, noise if sampled else None)
    logits = model.logits(output.hidden)
    begin = 0
    for piece, piece_noise in zip(split(tokens), split(noise), strict=True):
        end = begin + len(piece)
        expected = oracle.forward(state, config, piece, piece_noise if sampled else None)
        torch.testing.assert_close(
            output.segmentation.probabilities[begin:end], expected.p, rtol=0, atol=TOLERANCE
        )
        assert torch.equal(output.segmentation.boundaries[begin:end], expected.boundaries)
        torch.testing.assert_close(logits[begin:end], expected.logits, rtol=0, atol=TOLERANCE)
        begin = end
    assert len(output.concepts) > len(LENGTHS) or form == "rule"


@pytest.mark.parametrize("kind", ["dlcm", "dense"])
def test_residual_branches_shrink_with_depth_where_the_exponent_says_so(kind: Literal["dlcm", "dense"]) -> None:
    mup = replace(SMALL.mup, depth_exponent=0.5, base_layers=3)  # 4 layers on the tokens' stream, 2 on the concepts'
    config = replace(SMALL, kind=kind, mup=mup)
    state = oracle.random_state(config, seed=3)
    tokens, _, documents = tokens_and_noise([40])
    model = build_model(config, torch.float64, "sdpa", seed=0)
    model.load_state_dict(state)
    logits = model.logits(model(tokens, documents).hidden)
    expected = oracle.forward(state, config, tokens).logits if kind == "dlcm" else oracle.dense_forward(
        state, config, tokens)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    unscaled = build_model(replace(config, mup=SMALL.mup), torch.float64, "sdpa", seed=0)
    unscaled.load_state_dict(state)
    assert not torch.allclose(unscaled.logits(unscaled(tokens, documents).hidden), expected, rtol=0, atol=1e-3)


def test_gradients_of_the_whole_loss_equal_those_of_the_loops(form: str) -> None:
    config = small(form)
    state = oracle.random_state(config, seed=4)
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    targets = torch.cat([oracle.next_tokens(piece) for piece in split(tokens)])
    targets = torch.where(targets < 0, IGNORE_INDEX, targets)

    model = loaded(config, state)
    output = model(tokens, documents, noise, targets)
    loss = output.nll_sum / (targets >= 0).sum()
    if config.boundary.learned:
        f, g = output.segmentation.boundaries.double().mean(), output.segmentation.probabilities.mean()
        loss = loss + config.boundary.rate_weight * rate_loss(f, g, config.boundary.target_ratio)
    loss.backward()

    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    outputs = [oracle.forward(leaves, config, piece, piece_noise)
               for piece, piece_noise in zip(split(tokens), split(noise), strict=True)]
    expected = oracle.losses(outputs, split(targets), config)
    expected_loss = expected.total if config.boundary.learned else expected.cross_entropy
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=TOLERANCE)
    expected_loss.backward()
    for name, parameter in model.named_parameters():
        grad = leaves[name].grad
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_packing_equals_running_the_documents_apart(form: str, sampled: bool) -> None:
    config = small(form)
    model = loaded(config, oracle.random_state(config, seed=5))
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    together = model(tokens, documents, noise if sampled else None)
    begin = 0
    for piece, piece_noise in zip(split(tokens), split(noise), strict=True):
        alone = model(piece, Segments.from_lengths([len(piece)]), piece_noise if sampled else None)
        end = begin + len(piece)
        assert torch.equal(together.segmentation.boundaries[begin:end], alone.segmentation.boundaries)
        torch.testing.assert_close(together.hidden[begin:end], alone.hidden, rtol=0, atol=TOLERANCE)
        begin = end


def test_the_dense_baseline_equals_its_loops() -> None:
    config = replace(SMALL, kind="dense")
    state = {name: tensor for name, tensor in oracle.random_state(SMALL, seed=6).items()
             if name.split(".")[0] in ("embedding", "decoder", "unembedding")}
    model = build_model(config, torch.float64, "sdpa", seed=0)
    model.load_state_dict(state)
    tokens, _, documents = tokens_and_noise(LENGTHS)
    logits = model.logits(model(tokens, documents).hidden)
    for piece, got in zip(split(tokens), split(logits), strict=True):
        torch.testing.assert_close(got, oracle.dense_forward(state, config, piece), rtol=0, atol=TOLERANCE)


def test_the_language_model_loss_gives_the_boundary_no_gradient(form: str) -> None:
    config = small(form)
    model = loaded(config, oracle.random_state(config, seed=7))
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    model(tokens, documents, noise, tokens).nll_sum.backward()
    for name, parameter in model.boundary.named_parameters():
        assert parameter.grad is None, name
    assert model.encoder.layers[0].ffn.down.weight.grad.abs().sum() > 0


def test_the_rate_loss_reaches_boundary_and_encoder_alone() -> None:
    config = small("both")
    model = loaded(config, oracle.random_state(config, seed=8))
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    model(tokens, documents, noise).segmentation.probabilities.sum().backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"embedding", "encoder", "boundary"}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (build_model(small(), torch.float32, "sdpa", seed=seed) for seed in (1, 1, 2))
    for (name, a), (_, b), (_, c) in zip(*(m.named_parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == ("norm" in name or name.startswith("boundary")), name


def test_rounding_up_the_number_of_concepts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("both")
    model = loaded(config, oracle.random_state(config, seed=9))
    tokens, noise, documents = tokens_and_noise(LENGTHS)
    padded = model(tokens, documents, noise).hidden
    monkeypatch.setattr("dlcm_lightning.model.dlcm.CPU_CONCEPT_MULTIPLE", 1)
    torch.testing.assert_close(padded, model(tokens, documents, noise).hidden, rtol=0, atol=TOLERANCE)
