"""The oracle's own tests: before anything is measured against `reference.py`, it must be right by itself.

Three kinds: hand-computed cases small enough for paper; properties that any correct DLCM has (no token sees a later
one, the language-model loss never reaches the boundary, replicas are log-count weights); and comparisons of its
loops with what torch ships. Float64 throughout.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlcm_lightning.config import BoundaryConfig, ModelConfig, MupConfig
from tests.reference import (
    COSINE_EPSILON,
    GATE_EPSILON,
    IGNORE_INDEX,
    ReferenceOutput,
    State,
    attend,
    boundary_probabilities,
    centre,
    cosine,
    cross_attention_by_counts,
    cross_attention_by_replicas,
    cross_entropy,
    decide,
    dense_forward,
    forward,
    losses,
    next_tokens,
    pool,
    random_state,
    rate_loss,
    rms_norm,
    rotate,
    segment,
    self_attention,
    sharpen,
    shift_odds,
    smooth,
    state_shapes,
    swiglu,
)

FORMS = ("paper", "centred", "biased", "both", "rule", "fixed")
LEARNED = ("paper", "centred", "biased", "both")


def tiny(form: str = "both", **boundary: object) -> ModelConfig:
    """A model whose axes all differ, so that no transposition goes unnoticed (s_token = 2)."""
    return ModelConfig(
        vocab_size=40, d_token=16, d_concept=20, encoder_layers=1, backbone_layers=1, decoder_layers=1, heads_token=6,
        kv_heads_token=3, heads_concept=4, kv_heads_concept=2, head_dim=4, ffn_token=12, ffn_concept=14,
        boundary=BoundaryConfig(form=form, **{"target_ratio": 3.0, **boundary}), mup=MupConfig(d_base=8))  # type: ignore[arg-type]


def document(length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens without repetition and their noise, (length,) each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(40, generator=generator)[:length], torch.rand(length, generator=generator)


def trained(config: ModelConfig, seed: int = 0) -> State:
    """A random state whose weights, and only they, ask for a gradient."""
    buffers = ("boundary.rate_bias", "boundary.threshold", "boundary.prior_mean")
    return {name: tensor.requires_grad_(name not in buffers) for name, tensor in random_state(config, seed).items()}


def at(*boundaries: int, length: int) -> Tensor:
    """Noise that forces the boundaries: below every probability there, above all of them elsewhere."""
    return torch.tensor([-1.0 if t in boundaries else 2.0 for t in range(length)])


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- no token sees a later one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "thresholded"])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_depends_on_later_tokens(form: str, sampled: bool) -> None:
    """Other tokens after t, and no tokens after t, leave boundaries and logits up to t as they were, for every t."""
    config, length = tiny(form), 12
    state = random_state(config, seed=1)
    tokens, noise = document(length)
    noise_or_none = noise if sampled else None
    with torch.no_grad():
        whole = forward(state, config, tokens, noise_or_none)
        assert 2 <= len(whole.closing) < length, "the case must have pooled concepts of several tokens"
        changes = 0
        for t in range(length):
            changed = tokens.clone()
            changed[t + 1 :] = (tokens[t + 1 :] + 1 + t) % 40
            for others in (changed, tokens[: t + 1]):
                seen = forward(state, config, others, None if not sampled else noise[: len(others)])
                assert torch.equal(seen.boundaries[: t + 1], whole.boundaries[: t + 1])
                torch.testing.assert_close(seen.p[: t + 1], whole.p[: t + 1], rtol=0, atol=1e-12)
                torch.testing.assert_close(seen.logits[: t + 1], whole.logits[: t + 1], rtol=0, atol=1e-12)
                changes += len(seen.closing) != len(whole.closing)
    assert changes, "the number of concepts must change somewhere, or the test is too easy"


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_reaches_later_tokens(form: str) -> None:
    """Training mode: logits and p of token t have exactly no gradient in the embedding of any later token."""
    config, length = tiny(form), 10
    state = trained(config)
    tokens, noise = document(length)
    output = forward(state, config, tokens, noise)
    for t in range(length):
        # The sum over the vocabulary would do, but a weighted one cannot cancel.
        probe = (output.logits[t] * torch.arange(40.0)).sum() + output.p[t]
        (gradient,) = torch.autograd.grad(probe, [state["embedding.weight"]], retain_graph=True)
        assert gradient[tokens[: t + 1]].abs().sum() > 0
        assert gradient[tokens[t + 1 :]].abs().sum() == 0


def test_dense_is_causal_and_has_few_names() -> None:
    config = dataclasses.replace(tiny(), kind="dense")
    state = random_state(config)
    assert {name.split(".")[0] for name in state} == {"embedding", "decoder", "unembedding"}
    tokens, _ = document(9)
    whole = dense_forward(state, config, tokens)
    assert whole.shape == (9, 40)
    for t in range(9):
        torch.testing.assert_close(dense_forward(state, config, tokens[: t + 1]), whole[: t + 1], rtol=0, atol=1e-12)


# --- boundary ----------------------------------------------------------------------------------------------------


def test_cosine_floor_is_under_the_product() -> None:
    assert cosine(vector(3, 4), vector(4, 3)).item() == pytest.approx(24 / 25)
    assert cosine(vector(0, 0), vector(1, 0)).item() == 0
    small = vector(1e-5, 0)  # the product of the norms, 1e-10, is below the floor; each norm is above it
    assert cosine(small, small).item() == pytest.approx(1e-10 / COSINE_EPSILON)


def test_paper_probabilities_by_hand() -> None:
    """Identity W_q, W_k: right angle 1/2, opposite 1, same direction 0. And q comes from t - 1, k from t."""
    config = dataclasses.replace(tiny("paper"), d_token=2)
    eye = torch.eye(2, dtype=torch.float64)
    hidden = torch.stack([vector(1, 0), vector(0, 2), vector(0, -1), vector(0, -5)])
    p = boundary_probabilities({"boundary.query.weight": eye, "boundary.key.weight": eye}, config, hidden)
    assert p.tolist() == [1, 0.5, 1, 0]
    assert decide(p, None, config.boundary).tolist() == [True, True, True, False]  # one half is a boundary

    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)  # (1, 0) -> (0, 1)
    p = boundary_probabilities({"boundary.query.weight": quarter_turn, "boundary.key.weight": eye}, config, hidden)
    assert p.tolist() == [1, 0, 0.5, 0.5]  # queries (0,1), (-2,0), (1,0) against keys (0,2), (0,-1), (0,-5)


def test_centred_features_by_hand() -> None:
    """n0 = 2, prior 3: means (2*3 + 0)/3 = 2, (6 + 0 + 10)/4 = 4, (16 + 4)/5 = 4."""
    hidden = torch.tensor([[0.0], [10.0], [4.0]], dtype=torch.float64, requires_grad=True)
    features = centre(hidden, vector(3), prior_tokens=2)
    assert features.flatten().tolist() == [-2, 6, 0]
    (gradient,) = torch.autograd.grad(features.sum(), [hidden])
    assert gradient.flatten().tolist() == [1, 1, 1]  # none through the mean


def test_bias_by_hand() -> None:
    """Odds of 1/4 are 1 : 3; delta = log 3 makes them even. 0 and 1 do not move."""
    delta = vector(math.log(3)).squeeze()
    shifted = [shift_odds(vector(p).squeeze(), delta).item() for p in (0.0, 0.25, 1.0)]
    assert shifted == [0.0, pytest.approx(0.5), 1.0]
    p = vector(0.3).squeeze()
    assert shift_odds(p, vector(-0.7).squeeze()).item() == pytest.approx(torch.sigmoid(torch.logit(p) - 0.7).item())


def test_bias_replaces_p_everywhere() -> None:
    """Decision, G and smoothing gate all follow p'; the sampled decision sharpens p'."""
    tokens, noise = document(14)
    biased, paper = tiny("biased"), tiny("paper")
    state = random_state(biased)
    for frozen in (None, noise):
        output = forward(state, biased, tokens, frozen)
        raw = forward(state, paper, tokens, frozen).p
        torch.testing.assert_close(output.p, torch.sigmoid(torch.logit(raw) + state["boundary.rate_bias"]))
        assert output.p[0] == 1
        assert torch.equal(output.boundaries, decide(output.p, frozen, biased.boundary))
        assert losses([output], [next_tokens(tokens)], biased).mean_p == output.p.mean()
        torch.testing.assert_close(output.smoothed, smooth(output.backbone, [output.p[t] for t in output.closing]))


def test_rule_and_fixed_by_hand() -> None:
    hidden = torch.stack([vector(1, 0), vector(1, 0.1), vector(0, 1), vector(0.1, 1), vector(1, 1)])
    rule = tiny("rule", rule_threshold=0.8)
    p = boundary_probabilities({}, rule, hidden)
    assert p.tolist() == [1, 0, 1, 0, 1]  # the last cosine is 0.774
    fixed = tiny("fixed", target_ratio=3.0)
    assert boundary_probabilities({}, fixed, torch.zeros(7, 2)).tolist() == [1, 0, 0, 1, 0, 0, 1]
    for noise in (None, torch.zeros(5), torch.full((5,), 0.999999)):  # noise has no say where p is 0 or 1
        assert decide(p, noise, rule.boundary).tolist() == [True, False, True, False, True]


def test_sharpening_by_hand() -> None:
    assert sharpen(vector(0.5).squeeze(), 1).item() == 0.5
    assert sharpen(vector(0.64).squeeze(), 2).item() == pytest.approx(0.8)
    assert sharpen(vector(0.36).squeeze(), 2).item() == pytest.approx(0.2)
    assert [sharpen(vector(p).squeeze(), 6).item() for p in (0.0, 1.0)] == [0, 1]


def test_sampling_compares_noise_with_sharpened_p() -> None:
    boundary = tiny("paper", sharpening=2.0).boundary
    p = vector(1, 0.64, 0.64, 0.36, 0.36)
    noise = vector(0.99, 0.79, 0.81, 0.19, 0.21)
    assert decide(p, noise, boundary).tolist() == [True, True, False, True, False]
    assert decide(vector(0.1, 0.1), vector(0.9, 0.9), boundary).tolist() == [True, False]  # the first is always one


@pytest.mark.parametrize("form", LEARNED)
def test_random_state_spreads_p(form: str) -> None:
    """What other tests rely on: decisions of both kinds, p over most of its range."""
    config = tiny(form)
    with torch.no_grad():
        p = torch.cat([forward(random_state(config, seed), config, document(20, seed)[0]).p[1:] for seed in range(4)])
    assert p.min() < 0.25 and p.max() > 0.75
    assert 0.15 < (p >= 0.5).double().mean() < 0.85


# --- concepts ----------------------------------------------------------------------------------------------------


def test_figure_1() -> None:
    """<s> The cat sat on the mat: C1 = <s>, C2 = The cat, C3 = sat on; "the mat" is never pooled."""
    config, words = tiny("paper"), ["<s>", "The", "cat", "sat", "on", "the", "mat"]
    state = random_state(config)
    tokens = torch.arange(len(words))
    output = forward(state, config, tokens, at(0, 2, 4, length=7))
    assert output.boundaries.tolist() == [True, False, True, False, True, False, False]
    assert output.closing == [0, 2, 4]
    assert output.newest == [0, 0, 1, 1, 2, 2, 2]
    assert output.newest[words.index("cat")] == 1  # "cat" sees C2, the concept it closes, and predicts "sat"
    up, h = state["pool.up.weight"], output.hidden
    by_hand = torch.stack([up @ h[0], up @ ((h[1] + h[2]) / 2), up @ ((h[3] + h[4]) / 2)])
    torch.testing.assert_close(output.concepts, by_hand)


def test_pool_by_hand() -> None:
    hidden = torch.tensor([[1.0], [2.0], [6.0], [5.0], [100.0]], dtype=torch.float64)
    assert segment(torch.tensor([True, False, True, True, False])) == ([0, 2, 3], [0, 0, 1, 2, 2])
    assert pool(hidden, [0, 2, 3], vector(1, 10)[:, None]).tolist() == [[1, 10], [4, 40], [5, 50]]


def test_smoothing_of_three_concepts_by_hand() -> None:
    """1; 1/2 * 2 + 1/2 * 1 = 1.5; 1/4 * 4 + 3/4 * 1.5 = 2.125. The first gate has no effect."""
    z = vector(1, 2, 4)[:, None]
    for first in (1.0, 0.3):
        assert smooth(z, list(vector(first, 0.5, 0.25))).flatten().tolist() == [1, 1.5, 2.125]
    clamped = smooth(vector(0, 1, 0)[:, None], list(vector(1, 1, 0))).flatten()
    torch.testing.assert_close(clamped, vector(0, 1 - GATE_EPSILON, (1 - GATE_EPSILON) ** 2))


def test_gate_is_the_closing_tokens_own_p() -> None:
    config = tiny("both")
    state = random_state(config)
    tokens, noise = document(12)
    output = forward(state, config, tokens, noise)
    gates = output.p[output.boundaries].clamp(GATE_EPSILON, 1 - GATE_EPSILON)
    expected = output.backbone[0]
    for m in range(1, len(output.closing)):
        expected = gates[m] * output.backbone[m] + (1 - gates[m]) * expected
    assert len(output.closing) >= 3
    torch.testing.assert_close(output.smoothed[-1], expected)


# --- cross-attention ---------------------------------------------------------------------------------------------


def test_replicas_are_log_count_weights() -> None:
    config = tiny("paper")
    state = random_state(config)
    for seed in range(3):
        tokens, noise = document(16, seed)
        output = forward(state, config, tokens, noise)
        by_counts = cross_attention_by_counts(state, config, output.hidden, output.smoothed, output.newest)
        torch.testing.assert_close(by_counts, output.cross, rtol=0, atol=1e-12)


def test_replication_is_not_equation_14() -> None:
    """Without the counts the answer is another one, except at once where every concept has one replica."""
    config = tiny("paper")
    state = random_state(config)
    tokens, _ = document(6)
    output = forward(state, config, tokens, at(0, 1, 4, length=6))
    weights = [1, 3, 2]  # replicas at the last token: positions 0; 1 2 3; 4 5
    assert [output.newest.count(m) for m in range(3)] == weights
    query, keys = vector(0.3, -0.4), torch.tensor([[1.0, 2.0], [0.5, 0.1], [-1.0, 1.0]], dtype=torch.float64)
    values = torch.eye(3, dtype=torch.float64)
    scores = [count * math.exp((keys[m] @ query).item() / math.sqrt(2)) for m, count in enumerate(weights)]
    expected = vector(*[score / sum(scores) for score in scores])
    torch.testing.assert_close(attend(query, keys, values, vector(*weights).log()), expected)
    unweighted = attend(query, keys, values)
    assert (unweighted - expected).abs().max() > 0.05
    # One replica each: both readings agree.
    newest = [0, 1, 2]
    by_replicas = cross_attention_by_replicas(state, config, output.hidden[:3], output.smoothed, newest)
    by_counts = cross_attention_by_counts(state, config, output.hidden[:3], output.smoothed, newest)
    torch.testing.assert_close(by_replicas, by_counts, rtol=0, atol=1e-12)


# --- LLaMA-like blocks against torch -----------------------------------------------------------------------------


def test_rms_norm() -> None:
    x, gain = torch.randn(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, gain, 1e-5), F.rms_norm(x, (5,), gain, 1e-5))
    assert rms_norm(vector(3, 4), vector(1, 2), 0.0).tolist() == pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])


def test_rotate_by_hand_and_relative() -> None:
    """hd = 4: components 0 and 2 turn by 1 per position, components 1 and 3 by base^(-1/2)."""
    x = torch.tensor([[1.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    turned = rotate(x, 3, base=100.0)[0].tolist()
    slow = 3 * 100.0**-0.5
    assert turned == pytest.approx([math.cos(3), -2 * math.sin(slow), math.sin(3), 2 * math.cos(slow)])
    assert torch.equal(rotate(x, 0, base=100.0), x)
    y = torch.randn(1, 4, dtype=torch.float64)
    products = [(rotate(x, i, 100.0) * rotate(y, j, 100.0)).sum().item() for i, j in ((5, 2), (9, 6))]
    assert products[0] == pytest.approx(products[1])


def test_self_attention_against_torch() -> None:
    config, n, heads, kv_heads = tiny(), 7, 6, 3
    state = random_state(config)
    x = torch.randn(n, 16, dtype=torch.float64)
    qkv = (x @ state["encoder.layers.0.attention.qkv.weight"].T).reshape(n, heads + 2 * kv_heads, 4)
    rotated = torch.stack([rotate(qkv[i], i, config.rope_base) for i in range(n)])
    queries, keys = rotated[:, :heads], rotated[:, heads : heads + kv_heads]
    mixed = F.scaled_dot_product_attention(queries.transpose(0, 1), keys.transpose(0, 1),
                                           qkv[:, heads + kv_heads :].transpose(0, 1), is_causal=True, enable_gqa=True)
    expected = mixed.transpose(0, 1).reshape(n, heads * 4) @ state["encoder.layers.0.attention.out.weight"].T
    actual = self_attention(x, state, "encoder.layers.0.attention", heads, kv_heads, config)
    torch.testing.assert_close(actual, expected)


def test_swiglu_by_hand() -> None:
    """Gate row 1 and up row 3 on x = 2: silu(2) * 6, down 0.5."""
    state = {"ffn.gate_up.weight": vector(1, 3)[:, None], "ffn.down.weight": vector(0.5)[:, None]}
    assert swiglu(vector(2)[None], state, "ffn").item() == pytest.approx(2 / (1 + math.exp(-2)) * 6 * 0.5)


def test_silent_cross_attention_leaves_a_dense_model() -> None:
    """y = Decoder(cross + H): with W_O = 0 only H is left, so encoder and decoder layers are one dense stack."""
    config = tiny()
    state, (tokens, noise) = random_state(config), document(8)
    state["cross_attention.out.weight"].zero_()
    dense = {name.replace("decoder.layers.0", "decoder.layers.1").replace("encoder", "decoder"): tensor
             for name, tensor in state.items()}
    one_stack = dataclasses.replace(config, kind="dense", decoder_layers=2)
    assert set(state_shapes(one_stack)) <= set(dense)
    torch.testing.assert_close(forward(state, config, tokens, noise).logits, dense_forward(dense, one_stack, tokens))


def test_silent_layers_leave_the_embedding() -> None:
    """Both halves of a layer are residual: with W_O = W_down = 0 final norm, unembedding and 1/s_token are left."""
    config = dataclasses.replace(tiny(), kind="dense", decoder_layers=2)
    state, (tokens, _) = random_state(config), document(8)
    for name, tensor in state.items():
        if name.endswith(("attention.out.weight", "ffn.down.weight")):
            tensor.zero_()
    normed = F.rms_norm(state["embedding.weight"][tokens], (16,), state["decoder.norm.weight"], config.norm_epsilon)
    torch.testing.assert_close(dense_forward(state, config, tokens), normed @ state["unembedding.weight"].T / 2)


def test_logits_carry_one_over_s_token() -> None:
    config = tiny("paper")
    doubled = dataclasses.replace(config, mup=MupConfig(d_base=16))
    state, (tokens, _) = random_state(config), document(5)
    assert (config.s_token, doubled.s_token) == (2, 1)
    torch.testing.assert_close(2 * forward(state, config, tokens).logits, forward(state, doubled, tokens).logits)


def test_types() -> None:
    """The oracle computes in the state's own type; one seed is one model in every type."""
    config, (tokens, noise) = tiny(), document(8)
    double, single = (forward(random_state(config, 0, dtype), config, tokens, noise)
                      for dtype in (torch.float64, torch.float32))
    assert (double.logits.dtype, single.logits.dtype, single.p.dtype) == (torch.float64, torch.float32, torch.float32)
    assert torch.equal(double.boundaries, single.boundaries)
    torch.testing.assert_close(single.logits.double(), double.logits, rtol=1e-4, atol=1e-4)


def test_every_parameter_matters() -> None:
    """Each number of the state moves the sampled forward pass: no name is read by nobody."""
    for form in FORMS:
        config = tiny(form)
        state = {name: tensor.requires_grad_() for name, tensor in random_state(config).items()}
        tokens, noise = document(10)
        output = forward(state, config, tokens, noise)
        probe = (output.logits * torch.arange(40.0)).sum() + output.p.sum()
        gradients = torch.autograd.grad(probe, list(state.values()), allow_unused=True)
        for name, gradient in zip(state, gradients, strict=True):
            if name in ("boundary.prior_mean", "boundary.threshold"):  # the detached mean; a decision
                assert gradient is None
            else:
                assert gradient is not None and gradient.abs().sum() > 0, (form, name)
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == state_shapes(config)


# --- losses ------------------------------------------------------------------------------------------------------


def fake(p: list[float], b: list[bool]) -> ReferenceOutput:
    """An output of which only p and the boundaries count. One logit row of zeros per token over two words."""
    none = torch.empty(0)
    return ReferenceOutput(hidden=none, p=vector(*p).requires_grad_(), boundaries=torch.tensor(b), closing=[],
                           newest=[], concepts=none, backbone=none, smoothed=none, cross=none,
                           logits=torch.zeros(len(p), 2, dtype=torch.float64))


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_rate_loss_has_a_saddle_on_target(ratio: float) -> None:
    rate = vector(1 / ratio).squeeze().requires_grad_()
    other = rate.detach().clone().requires_grad_()
    assert rate_loss(rate, other, ratio).item() == pytest.approx(0, abs=1e-15)
    gradients = torch.autograd.grad(rate_loss(rate, other, ratio), [rate, other])
    assert [gradient.item() for gradient in gradients] == pytest.approx([0, 0], abs=1e-15)
    for step in (0.1, -0.1):  # uphill along the diagonal, downhill across it: R^2 / (R - 1) times +-step^2
        curvature = ratio**2 / (ratio - 1) * step**2
        assert rate_loss(rate + step, other + step, ratio).item() == pytest.approx(curvature)
        assert rate_loss(rate + step, other - step, ratio).item() == pytest.approx(-curvature)


def test_descent_moves_p_towards_the_target() -> None:
    """dL/dG = R/(R-1) (RF - 1): p falls where there are too many boundaries and rises where there are too few."""
    for sampled in (0.1, 0.25, 0.6):
        mean_p = vector(0.4).squeeze().requires_grad_()
        (slope,) = torch.autograd.grad(rate_loss(vector(sampled).squeeze(), mean_p, 4.0), [mean_p])
        assert slope.item() == pytest.approx(4 / 3 * (4 * sampled - 1))
        assert (slope.item() > 1e-12) == (sampled > 0.25) and (slope.item() < -1e-12) == (sampled < 0.25)


def test_global_and_document_rates_by_hand() -> None:
    """R = 2: L = 2 (F G + (1-F)(1-G)) - 1. Documents of 1 and 3 tokens: globally F = 1/2, G = 5/8, so L = 0;
    apart (F, G) = (1, 1) gives 1 and (1/3, 1/2) gives 0."""
    outputs = [fake([1.0], [True]), fake([1.0, 0.25, 0.25], [True, False, False])]
    targets = [torch.tensor([0]), torch.tensor([1, IGNORE_INDEX, IGNORE_INDEX])]
    parser = losses(outputs, targets, tiny("paper", target_ratio=2.0, rate_weight=0.5))
    assert (parser.mean_b.item(), parser.mean_p.item(), parser.rate.item()) == (0.5, 0.625, 0)
    assert parser.cross_entropy.item() == pytest.approx(math.log(2))
    normal = losses(outputs, targets, tiny("paper", target_ratio=2.0, rate_weight=0.5, rate_scope="document"))
    assert normal.rate.item() == pytest.approx((1 + 0) / 2)
    assert normal.total.item() == pytest.approx(math.log(2) + 0.5 * 0.5)


def test_gradient_on_p() -> None:
    """Every token gets lambda R/(R-1) (RF - 1) / T, T counting all tokens of the batch; F may be the last step's."""
    outputs = [fake([1.0, 0.3], [True, True]), fake([1.0, 0.2, 0.6], [True, False, True])]
    targets = [torch.tensor([0, IGNORE_INDEX]), torch.tensor([1, 0, IGNORE_INDEX])]
    config = tiny("paper", target_ratio=4.0, rate_weight=0.03)
    for previous, rate in ((None, 4 / 5), (0.1, 0.1), (0.25, 0.25)):
        total = losses(outputs, targets, config, previous_rate=previous).total
        expected = 0.03 * 4 / 3 * (4 * rate - 1) / 5
        for gradient in torch.autograd.grad(total, [output.p for output in outputs]):
            assert gradient.tolist() == pytest.approx([expected] * len(gradient), abs=1e-15)


def test_cross_entropy_against_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(n, 40, generator=generator, dtype=torch.float64) for n in (3, 1, 6)]
    targets = [next_tokens(torch.randint(40, (n,), generator=generator)) for n in (3, 1, 6)]
    assert targets[1].tolist() == [IGNORE_INDEX]
    expected = F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("form", LEARNED)
def test_who_gets_which_gradient(form: str) -> None:
    """The language-model loss reaches everything but W_q, W_k; the rate loss reaches W_q, W_k and what feeds them."""
    config = tiny(form, target_ratio=3.5)  # F = 1/R, where the rate loss has no gradient, cannot happen with 18 tokens
    state = trained(config)
    documents = [document(9, seed) for seed in range(2)]
    outputs = [forward(state, config, tokens, noise) for tokens, noise in documents]
    loss = losses(outputs, [next_tokens(tokens) for tokens, _ in documents], config)
    weights = {name: tensor for name, tensor in state.items() if tensor.requires_grad}

    def reached(scalar: Tensor) -> set[str]:
        gradients = torch.autograd.grad(scalar, list(weights.values()), retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(weights, gradients, strict=True)
                if gradient is not None and gradient.abs().sum() > 0}

    boundary = {"boundary.query.weight", "boundary.key.weight"}
    assert reached(loss.cross_entropy) == set(weights) - boundary
    feeding = {name for name in weights if name.startswith(("embedding.", "encoder."))}
    assert reached(loss.rate) == boundary | feeding
    torch.testing.assert_close(loss.total, loss.cross_entropy + 0.03 * loss.rate)


@pytest.mark.parametrize("form", ["rule", "fixed"])
def test_rate_loss_of_forms_without_parameters_is_a_constant(form: str) -> None:
    config = tiny(form)
    tokens, noise = document(9)
    loss = losses([forward(trained(config), config, tokens, noise)], [next_tokens(tokens)], config)
    assert not loss.rate.requires_grad
    assert loss.mean_p == loss.mean_b
