"""The grid of a study as runs, each a whole configuration.

Every run is the base with overrides, so that what a study trains can be trained by hand, too. Three numbers are fitted
to one another, because the rows of the table, the checkpoints and the branches of a run share its steps:

- a run is a whole number of rows long, its tokens rounded up;
- a branch begins at a row, where the loss before the decay is known, and a checkpoint is written exactly there and kept
  for good: `train.checkpoint_every_steps` divides the steps of all branches, `train.keep_every_tokens` is their
  greatest common divisor. The first checkpoint at or after every multiple of that is then the one of the multiple
  itself. A branch at the end of a run asks for nothing: that checkpoint is always written, and is the newest;
- lines of metrics end where rows end: `train.log_every_steps` divides their steps. A line averages over all steps since
  the one before, so that R and FLOPs up to a row count every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dlcm_lightning.compose import differences_of, load_config
from dlcm_lightning.config import Config, ConfigError, ModelConfig
from dlcm_lightning.config.checks import LARGEST_COUNT
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.ladder.runs import Branch, PlannedRun
from dlcm_lightning.scaling.ladder.study import RATES, Rates, Size, Study, Variant
from dlcm_lightning.scaling.shapes import dense_of_flops, dense_of_size, model_of_size

ALIKE = Variant("alike")
"""Stands for the only variant of a study that has none."""


@dataclass(frozen=True)
class _Rung:
    """A shape of the grid."""

    label: str
    overrides: tuple[str, ...]
    tokens: float
    """Of its runs, before rounding."""
    kind: str


def grid(study: Study) -> list[PlannedRun]:
    """All runs, in the order of the axes of the study. ConfigError: a run that cannot be, or two of one name."""
    runs = []
    for rung in _rungs(study):
        for variant in study.variants or (ALIKE,):
            for rates in study.learning_rates or (None,):
                for seed in study.seeds:
                    runs.append(_grid_run(study, rung, variant, rates, seed))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"study {study.name}: two runs would be called {twice}; give sizes and variants names that "
                          "differ")
    for run in runs:
        _check_rows(study, run)
    return runs


def _grid_run(study: Study, rung: _Rung, variant: Variant, rates: Rates | None, seed: int) -> PlannedRun:
    label = [rung.label, *([rates.label] if rates else []), *([variant.name] if study.variants else []), f"s{seed}"]
    overrides = [*rung.overrides, *variant.overrides, *rate_overrides(rates.given if rates else {})]
    run = planned_run(study, "-".join(label), overrides, rung.tokens, seed, variant.name if study.variants else "")
    if run.config.model.kind != rung.kind:
        raise ConfigError(f"variants: {variant.name} makes {run.name} a model of the kind {run.config.model.kind}, "
                          f"where the grid has a {rung.kind} one; write kinds: [dlcm, dense] instead")
    return run


def rate_overrides(rates: dict[str, float]) -> list[str]:
    """Base rates as overrides, to the last digit."""
    return [f"optim.{name}={value!r}" for name, value in rates.items()]


def planned_run(study: Study, label: str, overrides: Sequence[str], tokens: float, seed: int, variant: str
                ) -> PlannedRun:
    """A run of a study: the base, the overrides, and what follows from the study. ConfigError: it cannot be."""
    name = f"{study.name}-{label}"
    given = [*study.overrides, *overrides, f"name={name}", f"seed={seed}",
             f"train.output_dir={study.output_dir}"]
    if study.decays:
        given.append("optim.decay_fraction=0")
    first = load_config(study.base, [*given, f"optim.total_tokens={math.ceil(tokens)}"])
    tokens_per_step = first.data.tokens_per_step
    steps, row = first.total_steps, first.total_steps
    if study.validate_every:
        row = -(-study.validate_every // tokens_per_step)
        steps = -(-steps // row) * row
    branches = _branches(study, name, steps, row, tokens_per_step)
    rhythm = _rhythm(first, steps, row, branches)
    given += [f"{field}={value}" for field, value in rhythm.items()]
    return PlannedRun(_with(first, rhythm), study.base, tuple(given), variant,
                      study.document_tokens or first.data.sequence_length, branches,
                      first.train.checkpoint_every_steps)


def composed(study: Study, overrides: Sequence[str] = ()) -> Config:
    """The base with the overrides of a study and more. Its tokens are not those of a run, which follow from its shape:
    no warm-up is too long for them. ConfigError: it cannot be."""
    return load_config(study.base, [*study.overrides, *overrides, f"optim.total_tokens={LARGEST_COUNT}"])


def _with(config: Config, rhythm: dict[str, int]) -> Config:
    """The same as composing it once more, which takes tens of milliseconds."""
    train: dict[str, Any] = {name.removeprefix("train."): value for name, value in rhythm.items()
                             if name.startswith("train.")}
    return replace(config, optim=replace(config.optim, total_tokens=rhythm["optim.total_tokens"]),
                   train=replace(config.train, **train))


def _branches(study: Study, name: str, steps: int, row: int, tokens_per_step: int) -> tuple[Branch, ...]:
    decays = study.decays
    found: dict[int, Branch] = {}
    if decays is None:
        return ()
    if 1 <= decays.over < tokens_per_step:
        raise ConfigError(f"decays.over = {decays.over:g}: fewer tokens than one step of {name}, which has "
                          f"{tokens_per_step:,}; write a share of what was trained before, such as 0.2, or at least "
                          f"{tokens_per_step} tokens")
    for at in decays.at:
        wanted = at * steps if at <= 1 else at / tokens_per_step
        start = max(1, round(wanted / row)) * row
        if start > steps:
            raise ConfigError(f"decays.at = {at:g}: {name} ends at {steps * tokens_per_step:,} tokens; give a place "
                              "within it")
        over = decays.over * start if decays.over < 1 else decays.over / tokens_per_step
        found[start] = Branch(f"{name}-anneal-{start * tokens_per_step}", start, max(1, round(over)))
    return tuple(found[start] for start in sorted(found))


def _rhythm(config: Config, steps: int, row: int, branches: Sequence[Branch]) -> dict[str, int]:
    """Length of the run, and steps between rows, checkpoints and lines, by field."""
    tokens_per_step = config.data.tokens_per_step
    given = {"optim.total_tokens": steps * tokens_per_step, "train.validate_every_steps": row}
    checkpoints = config.train.checkpoint_every_steps
    if inner := [branch.first_step for branch in branches if branch.first_step < steps]:  # the last one stays anyway
        unit = math.gcd(*inner)
        checkpoints = largest_divisor(unit, checkpoints)
        given["train.keep_every_tokens"] = unit * tokens_per_step
    return given | {"train.checkpoint_every_steps": checkpoints,
                    "train.log_every_steps": largest_divisor(row, config.train.log_every_steps)}


def largest_divisor(number: int, most: int) -> int:
    """Of a whole number, at most so large."""
    return next(one for one in range(min(number, most), 0, -1) if number % one == 0)


def _check_rows(study: Study, run: PlannedRun) -> None:
    """ConfigError: the table would have no row of it, or a branch of it cannot be."""
    optim, tokens_per_step = run.config.optim, run.config.data.tokens_per_step
    if optim.schedule != "wsd":
        raise ConfigError(f"optim.schedule = {optim.schedule!r}: the rows of a ladder are those of a rate that is "
                          "held; write optim.schedule=wsd below overrides")
    early = [branch for branch in run.branches if branch.first_step * tokens_per_step < optim.warmup_tokens]
    if early:
        raise ConfigError(f"decays.at: a branch of {run.name} would begin at {early[0].first_step * tokens_per_step:,} "
                          f"tokens, within the warm-up of {optim.warmup_tokens:,}; begin it later")
    if optim.warmup_tokens >= run.tokens:
        raise ConfigError(f"optim.warmup_tokens = {optim.warmup_tokens}: {run.name} has {run.tokens} tokens; give more "
                          f"tokens, or write a shorter warm-up below overrides")


# Shapes


def _rungs(study: Study) -> Iterator[_Rung]:
    base = composed(study)
    for size in study.sizes or (None,):
        shaped, own = base, size.overrides if size is not None else ()
        if own:
            shaped = composed(study, own)
        if size is not None and size.parameters and shaped.model.kind != "dlcm":
            raise ConfigError(f"base = {study.base!r}: it is dense; sizes are made of a DLCM, and its dense partners "
                              "by kinds")
        if shaped.model.kind != "dlcm" and (study.ratios or set(study.kinds) == {"dlcm", "dense"}):
            field = f"ratios = {list(study.ratios)}" if study.ratios else f"kinds = {list(study.kinds)}"
            raise ConfigError(f"{field}: base {study.base!r} is dense{f' at size {size.label}' if size else ''}, so "
                              "that the same model would be trained several times; leave the field out, or begin with "
                              "a DLCM")
        yield from _rungs_of_size(study, size, shaped, own)


def _rungs_of_size(study: Study, size: Size | None, base: Config, own: tuple[str, ...]) -> Iterator[_Rung]:
    """base: with the overrides of the size."""
    model = base.model
    shares = study.backbone_shares or (None,)
    label = size.label if size is not None else ""
    wanted = size.parameters if size is not None and size.parameters else 0.0
    partners: list[tuple[str, ModelConfig, float]] = []
    for share in shares:
        shape = model
        if wanted:
            shape = model_of_size(wanted, share or matrix_parameters(model).backbone_share, model)
        for ratio in study.ratios or (None,):
            rung = shape if ratio is None else replace(shape, boundary=replace(shape.boundary, target_ratio=ratio))
            parts = (label, f"P{100 * share:g}" if share else "", f"R{ratio:g}" if ratio else "")
            name = "-".join(filter(None, parts)) or "base"
            tokens = study.tokens or study.tokens_per_parameter * (wanted or matrix_parameters(rung).non_embedding)
            if "dlcm" in study.kinds:
                yield _Rung(name, (*own, *model_overrides(model, rung)), tokens, rung.kind)
            partners.append((name, rung, tokens))
    if "dense" in study.kinds:
        yield from _dense_rungs(study, label, wanted, base, own, partners)


def _dense_rungs(study: Study, label: str, wanted: float, base: Config, own: tuple[str, ...],
                 partners: Sequence[tuple[str, ModelConfig, float]]) -> Iterator[_Rung]:
    """partners: DLCMs of the size, with their tokens."""
    model = base.model
    if "parameters" in study.dense:
        parameters = wanted or matrix_parameters(model).non_embedding
        tokens = study.tokens or study.tokens_per_parameter * parameters
        dense = dense_of_size(parameters, model)
        yield _Rung(f"{label}-dense".lstrip("-"), (*own, *model_overrides(model, dense)), tokens, dense.kind)
    if "flops" in study.dense:
        document = study.document_tokens or base.data.sequence_length
        for name, shape, tokens in partners:
            dense = dense_of_flops(training_flops_per_token(shape, document), model, document)
            yield _Rung(f"{name}-denseflops", (*own, *model_overrides(model, dense)), tokens, dense.kind)


def model_overrides(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """field=value for what differs."""
    values = asdict(after)
    found = []
    for name in differences_of(asdict(before), values):
        section, _, key = name.rpartition(".")
        value = values[section][key] if section else values[key]
        found.append(f"model.{name}={value!r}" if not isinstance(value, str) else f"model.{name}={value}")
    return tuple(found)


def study_folder(study: Study) -> Path:
    """Where the run files, the logs and the table of a study are."""
    return Path(study.output_dir) / study.name


def rates_of(config: Config) -> dict[str, float]:
    """Base rates by field of `optim`."""
    return {name: getattr(config.optim, name) for name in RATES}
