"""What `dlcm plan` prints: the model, its run, time and memory, and the dense models beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.flops import matrix_parameters
from dlcm_lightning.scaling.estimate import duration, memory_lines, model_lines, time_lines
from dlcm_lightning.scaling.law.formula import Prediction
from dlcm_lightning.scaling.memory import parameters
from dlcm_lightning.scaling.plan.partners import Partner
from dlcm_lightning.scaling.plan.plan import Plan
from dlcm_lightning.scaling.plan.schedule import real_rates

MARGIN, WIDTH = 13, 118


def report(plan: Plan) -> Iterator[str]:
    """Lines."""
    yield from _shape(plan)
    yield from model_lines(plan.config, plan.document_tokens)
    yield from _tokens(plan)
    yield from _rates(plan)
    yield from _loss(plan)
    yield ""
    yield from time_lines(plan.config, plan.hardware, plan.document_tokens)
    yield ""
    yield from memory_lines(plan.config, plan.hardware)
    yield ""
    yield from _partners(plan)
    yield ""
    for note in plan.notes:
        yield from _wrapped("note", note)


def _shape(plan: Plan) -> Iterator[str]:
    model, share = plan.model, matrix_parameters(plan.model).backbone_share
    layers = f"{model.encoder_layers} + {model.backbone_layers} + {model.decoder_layers} layers"
    heads = (f"{model.heads_token} and {model.heads_concept} heads of {model.head_dim}, {model.kv_heads_token} and "
             f"{model.kv_heads_concept} of keys")
    yield (f"model        D = {model.d_token}, E = {model.d_concept}; {layers}; {heads}; P = {share:.3f}, "
           f"R = {model.boundary.target_ratio:g}")


def _tokens(plan: Plan) -> Iterator[str]:
    data, optim = plan.config.data, plan.config.optim
    per_parameter = plan.tokens / matrix_parameters(plan.model).non_embedding
    yield (f"tokens       {plan.tokens:,}, {per_parameter:.3g} a parameter outside the embeddings: {plan.flops:.3e} "
           "FLOPs")
    yield (f"batch        {data.global_batch_size:,} rows of {data.sequence_length:,} tokens; warm-up of "
           f"{optim.warmup_tokens // data.tokens_per_step:,} steps, {optim.schedule}")


def _rates(plan: Plan) -> Iterator[str]:
    rates = real_rates(plan.model, plan.config.optim)
    said = ", ".join(f"{name} {base:.3g} -> {real:.3g}" for name, (base, real) in rates.items())
    yield from _wrapped("rates", f"base -> real at these widths: {said}")


def _loss(plan: Plan) -> Iterator[str]:
    if plan.prediction is None:
        yield "loss         not predicted: no law was given"
        return
    yield from _wrapped("loss", f"{interval(plan.prediction)} nats a token while the learning rate is held, "
                                f"{outside(plan.prediction)}")
    if plan.decay_gain is not None:
        yield f"             {plan.prediction.loss - plan.decay_gain:.4f} after its decay, by Eq. 23"


def interval(prediction: Prediction) -> str:
    """The loss and its 95 % interval, where there is one."""
    if prediction.low == prediction.high:
        return f"{prediction.loss:.4f} (no interval: the fit had no bootstrap)"
    return f"{prediction.loss:.4f} (95 %: {prediction.low:.4f} to {prediction.high:.4f})"


def outside(prediction: Prediction) -> str:
    """How far the law had to reach."""
    return ("within what the law has seen" if prediction.factor <= 1 else
            f"{prediction.factor:.3g} times outside of what the law has seen")


def _partners(plan: Plan) -> Iterator[str]:
    head = f"{'D':>7}{'layers':>8}{'N':>17}{'all':>17}{'FLOPs a token':>15}{'tokens':>20}{'time':>15}  predicted loss"
    yield f"dense models beside it, at its FLOPs\n{'equal':<15}{head}"
    seconds = plan.flops / (plan.hardware.ranks * plan.hardware.peak_flops * plan.hardware.mfu)
    layers = plan.model.encoder_layers + plan.model.backbone_layers + plan.model.decoder_layers
    loss = interval(plan.prediction) if plan.prediction else "-"
    yield _row("(the DLCM)", plan.model, layers, plan.flops_per_token, plan.tokens, seconds, loss)
    for partner in plan.partners:
        yield from _partner(partner, seconds)


def _partner(partner: Partner, seconds: float) -> Iterator[str]:
    if partner.model is None:
        yield from _wrapped(partner.equal, partner.missing, 15)
        return
    loss = interval(partner.prediction) if partner.prediction else "-"
    yield _row(partner.equal, partner.model, partner.model.decoder_layers, partner.flops_per_token, partner.tokens,
               seconds, loss)
    if partner.missing:
        yield from _wrapped("", partner.missing, 15)


def _row(name: str, model: ModelConfig, layers: int, cost: float, tokens: float, seconds: float, loss: str) -> str:
    return (f"{name:<15}{model.d_token:>7}{layers:>8}{matrix_parameters(model).non_embedding:>17,}"
            f"{parameters(model):>17,}{cost:>15.3e}{tokens:>20,.0f}{duration(seconds):>15}  {loss}")


def _wrapped(name: str, text: str, margin: int = MARGIN) -> Iterator[str]:
    for line, part in enumerate(textwrap.wrap(text, WIDTH - margin)):
        yield f"{'' if line else name:<{margin}}{part}"
