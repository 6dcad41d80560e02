"""`dlcm plan`: from what was asked and a known run to a whole run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from dlcm_lightning.config import Config, ConfigError, ModelConfig, Strategy
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.estimate import Hardware
from dlcm_lightning.scaling.law.formula import FittedLaw, LadderLaws, Prediction
from dlcm_lightning.scaling.memory import rank_memory
from dlcm_lightning.scaling.plan.choice import Choice, by_convention, by_law, predicted
from dlcm_lightning.scaling.plan.partners import Partner, partners_of
from dlcm_lightning.scaling.plan.request import TOKENS_PER_PARAMETER, Request
from dlcm_lightning.scaling.plan.schedule import scheduled
from dlcm_lightning.scaling.shapes import CLOSE_SHARE


@dataclass(frozen=True)
class Plan:
    """A run that can be trained, and what is known of it before."""

    config: Config
    like: Config
    """The run that it takes everything else from."""
    hardware: Hardware
    document_tokens: float
    flops_per_token: float
    """Of training, at the target R."""
    prediction: Prediction | None
    """At constant learning rate; None without a law."""
    decay_gain: float | None
    """Nats a token that the decay is predicted to take off it, where Eq. 23 was fitted."""
    partners: tuple[Partner, Partner]
    notes: tuple[str, ...]
    """How it was chosen, and what to look at."""
    tried: int
    """Shapes that were compared."""

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def tokens(self) -> int:
        return self.config.optim.total_tokens

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.tokens * self.flops_per_token


def plan(request: Request, like: Config, laws: LadderLaws | None, name: str) -> Plan:
    """The run that was asked for. ConfigError: what is asked contradicts itself, has no shape, or lies too far outside
    of what the law has seen."""
    request.check(laws is not None)
    if like.model.kind != "dlcm":
        raise ConfigError(f"--like {like.name}: is a dense model; name the run of a DLCM, such as dlcm_2b_1t; dense "
                          "partners come with it")
    law = _concept_law(laws)
    document_tokens = request.document_tokens or like.data.sequence_length
    choice, notes = _choice(request, like, law, document_tokens)
    schedule = scheduled(like, name, choice.model, choice.tokens, request.gpus)
    config = schedule.config
    hardware = request.hardware(config.data.global_batch_size)
    if hardware.ranks > config.data.global_batch_size:
        raise ConfigError(f"--gpus {hardware.ranks}: more than the {config.data.global_batch_size} rows of a step of "
                          f"{like.name}; take fewer, or --like a run with more rows a step")
    cost = training_flops_per_token(config.model, document_tokens)
    tokens = config.optim.total_tokens
    prediction = predicted(config.model, choice.tokens, law, request.extrapolation) if law else None
    gain = None
    if prediction is not None and laws is not None and laws.decay is not None:
        gain = laws.decay.law.gain(prediction.loss, matrix_parameters(config.model).non_embedding,
                                   config.model.boundary.target_ratio)
    partners = partners_of(config.model, tokens * cost, document_tokens, laws.dense if laws else None,
                           request.extrapolation)
    return Plan(config, like, hardware, document_tokens, cost, prediction, gain, partners,
                (*notes, *choice.notes, *schedule.notes, *_memory_notes(config, hardware)), choice.tried)


def _memory_notes(config: Config, hardware: Hardware) -> Iterator[str]:
    """What to change where the run would not fit, with every token a concept."""

    def fits(strategy: Strategy, rows: int) -> bool:
        train = replace(config.train, strategy=strategy, devices=hardware.gpus_per_node, nodes=hardware.nodes,
                        offload=False, shard_ranks=config.train.shard_ranks if strategy == "fsdp2" else 0)
        mine = -(-config.data.global_batch_size // hardware.ranks)
        return rank_memory(config, train, rows, 1.0, -(-mine // rows)).total < hardware.gpu_bytes

    rows, strategy = config.data.micro_batch_size, config.train.strategy
    if fits(strategy, rows):
        return
    said = (f"train.strategy = {strategy} with {rows} rows a micro-batch does not fit into "
            f"{hardware.gpu_bytes / 1e9:g} GB")
    for fewer in sorted({rows, 1}, reverse=True):
        for other in get_args(Strategy):
            if fits(other, fewer):
                changes = f"train.strategy={other}" + (f" data.micro_batch_size={fewer}" if fewer != rows else "")
                yield f"{said}; train with {changes}, which does"
                return
    yield f"{said}, and no strategy does; take more GPUs, larger ones, or train.recompute=full"


def _concept_law(laws: LadderLaws | None) -> FittedLaw | None:
    if laws is not None and laws.concept is None:
        raise ConfigError("--law: holds no law of DLCMs; fit a table that has runs of them, or leave --law out")
    return laws.concept if laws is not None else None


def _choice(request: Request, like: Config, law: FittedLaw | None, document_tokens: float
            ) -> tuple[Choice, tuple[str, ...]]:
    """Model, tokens, and by what they were chosen."""
    budget = request.budget
    if law is not None and budget is not None:
        choice = by_law(budget, like.model, law, document_tokens, extrapolation=request.extrapolation,
                        size=request.params, share=request.backbone_share, ratio=request.ratio)
        free = [name for name, value in (("N", request.params), ("P", request.backbone_share), ("R", request.ratio))
                if value is None]
        chosen = ", ".join([*free, "tokens"]) if len(free) != 1 else f"{free[0]} and tokens"
        return choice, (f"{chosen} have the least predicted loss of {choice.tried:,} shapes at these FLOPs"
                        if free else "nothing is left for the law to choose but tokens, which the FLOPs pay for",)
    per_parameter = request.tokens_per_parameter or TOKENS_PER_PARAMETER
    choice = by_convention(like.model, document_tokens, flops=budget, size=request.params, tokens=request.tokens,
                           tokens_per_parameter=per_parameter, share=request.backbone_share, ratio=request.ratio)
    return choice, tuple(_convention(request, like, law, per_parameter, choice.model))


def _convention(request: Request, like: Config, law: FittedLaw | None, per_parameter: float, model: ModelConfig
                ) -> list[str]:
    found, known = (matrix_parameters(one).backbone_share for one in (model, like.model))
    same = abs(found - known) <= CLOSE_SHARE
    said = [] if law is not None else ["no law was given, so that no loss is predicted: --law law.json"]
    if law is not None and (request.backbone_share is None or request.ratio is None):
        said.append("with N and tokens given, the law has no budget to choose P and R by: more FLOPs are always better")
    taken = [name for name, free in (("P", request.backbone_share is None and same), ("R", request.ratio is None))
             if free]
    if taken:
        said.append(f"{' and '.join(taken)} {'are those' if len(taken) > 1 else 'is that'} of {like.name}")
    if request.backbone_share is None and not same:
        said.append(f"P is {found:.3f} in place of the {known:.3f} of {like.name}, which no shape of this size has")
    if request.tokens is None and (request.params is None or request.budget is None):
        stated = "as was asked" if request.tokens_per_parameter else "a convention of dense models, not of DLCMs"
        said.append(f"about {per_parameter:g} tokens a parameter: {stated}")
    return said
