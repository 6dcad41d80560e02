"""From the metrics.jsonl of finished runs to the rows of the table that `dlcm ladder fit` reads.

A line of training averages over all steps since the line before, also where the run was killed in between, so that sums
over lines are sums over steps. With c concepts a token of the stretch that a line speaks of and n its tokens,

    R = sum of n / sum of c n        FLOPs = sum of n x training_flops_per_token(c)

over all lines so far, for a branch over those of its run up to the checkpoint that it begins with, and its own.

Rows of a run are `stable` after the warm-up and before its own decay; what lies in a decay is no row; its end is
`decayed`, and so is the end of a branch, which is a row of the run that it is a branch of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dlcm_lightning.errors import RunError
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.run_directory import METRICS_FILE
from dlcm_lightning.scaling.ladder.plan import rates_of
from dlcm_lightning.scaling.ladder.runs import Branch, PlannedRun, state_of

LEAST_CONCEPTS = 1e-9
"""Per token: a stretch without any would have no FLOPs that can be counted."""


@dataclass(frozen=True)
class Row:
    """One row of the table; docs/scaling.md has the columns up to `seconds`."""

    run: str
    kind: str
    N: int
    P: float | None
    R_target: float | None
    R: float | None
    tokens: int
    loss: float
    phase: Literal["stable", "decayed"]
    flops: float
    seed: int
    seconds: float
    """Of training steps, without validation and checkpoints."""
    decay_from: int | None
    """Tokens at which the decay began that ends here."""
    variant: str
    rates: dict[str, float]
    """Base learning rates by field of `optim`."""
    domains: dict[str, float]
    """Loss by domain."""

    @property
    def cells(self) -> dict[str, Any]:
        """By column; None where a row has nothing there."""
        plain = {name: getattr(self, name) for name in (
            "run", "kind", "N", "P", "R_target", "R", "tokens", "loss", "phase", "flops", "seed", "seconds",
            "decay_from", "variant")}
        return plain | self.rates | {f"loss_{name}": loss for name, loss in self.domains.items()}


@dataclass(frozen=True)
class _Stretch:
    """What a line of training sums up."""

    last_step: int
    steps: int
    concepts_per_token: float | None
    seconds: float


@dataclass(frozen=True)
class _Sums:
    """Up to a step, over all of them."""

    tokens: int
    concepts: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class _Measured:
    """What a metrics.jsonl holds."""

    stretches: list[_Stretch]
    """In order; together they are all steps of the file."""
    validations: dict[int, dict[str, Any]]
    """By step."""


def rows_of(planned: PlannedRun) -> list[Row]:
    """Of a run and its branches, as far as they are finished. RunError: a file that lacks lines."""
    trunk, *branches = planned.jobs(Path())
    if state_of(trunk) != "finished":
        return []
    measured = read_metrics(trunk.run)
    rows = list(_trunk_rows(planned, measured))
    for job, branch in zip(branches, planned.branches, strict=True):
        if state_of(job) == "finished":
            rows.append(_branch_row(planned, branch, measured.stretches))
    return rows


def read_metrics(run: Path, after: int = 0) -> _Measured:
    """after: steps up to this one are another run's. RunError: there is no file, or a line of it is damaged."""
    file = run / METRICS_FILE
    stretches: list[_Stretch] = []
    validations: dict[int, dict[str, Any]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            read = json.loads(line)
            step = read["step"]
            if step is None or step <= after:
                continue
            if read["kind"] == "train":
                before = stretches[-1].last_step if stretches else after
                seconds = (step - before) * float(read["step_seconds"])
                stretches.append(_Stretch(step, step - before, read.get("F"), seconds))
            elif read["kind"] == "validation":
                validations[step] = read
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file} cannot be used ({error!r}); move {run} away and train it again") from error
    return _Measured(stretches, validations)


def _sums(planned: PlannedRun, stretches: Sequence[_Stretch], step: int) -> _Sums:
    """RunError: no line ends at the step."""
    counted = [one for one in stretches if one.last_step <= step]
    if not counted or counted[-1].last_step != step:
        raise RunError(f"{planned.run / METRICS_FILE}: no line of training ends at step {step}; the run was trained by "
                       "another configuration than that of the study")
    per_step = planned.config.data.tokens_per_step
    tokens, concepts, flops, seconds = 0, 0.0, 0.0, 0.0
    for one in counted:
        here = one.steps * per_step
        tokens += here
        seconds += one.seconds
        share = None if one.concepts_per_token is None else max(LEAST_CONCEPTS, one.concepts_per_token)
        concepts += here * (share or 0.0)
        flops += here * training_flops_per_token(planned.config.model, planned.document_tokens, share)
    return _Sums(tokens, concepts, flops, seconds)


def _trunk_rows(planned: PlannedRun, measured: _Measured) -> Iterator[Row]:
    optim, per_step = planned.config.optim, planned.config.data.tokens_per_step
    last = planned.config.total_steps
    decays, start = optim.decay_fraction > 0, optim.stable_tokens
    for step in sorted(measured.validations):
        tokens = step * per_step
        if decays and step == last:
            yield _row(planned, step, measured.validations[step], measured.stretches, "decayed", start)
        elif optim.warmup_tokens < tokens <= start:
            yield _row(planned, step, measured.validations[step], measured.stretches, "stable", None)


def _branch_row(planned: PlannedRun, branch: Branch, before: Sequence[_Stretch]) -> Row:
    run = planned.branch_run(branch)
    measured = read_metrics(run, branch.first_step)
    if branch.last_step not in measured.validations:
        raise RunError(f"{run / METRICS_FILE}: has no validation at step {branch.last_step}, its end; move {run} away "
                       "and train it again")
    stretches = [*(one for one in before if one.last_step <= branch.first_step), *measured.stretches]
    return _row(planned, branch.last_step, measured.validations[branch.last_step], stretches, "decayed",
                branch.first_step * planned.config.data.tokens_per_step)


def _row(planned: PlannedRun, step: int, validation: dict[str, Any], stretches: Sequence[_Stretch],
         phase: Literal["stable", "decayed"], decay_from: int | None) -> Row:
    config, sums = planned.config, _sums(planned, stretches, step)
    segmented = config.model.kind == "dlcm"
    loss = float(validation["loss"])
    if not math.isfinite(loss):
        raise RunError(f"{planned.name}: its loss at step {step} is {loss}; train it with lower rates")
    return Row(
        planned.name, config.model.kind, planned.weights.non_embedding,
        planned.weights.backbone_share if segmented else None,
        config.model.boundary.target_ratio if segmented else None,
        sums.tokens / sums.concepts if segmented and sums.concepts else None, sums.tokens, loss, phase, sums.flops,
        config.seed, sums.seconds, decay_from, planned.variant, rates_of(config),
        {name: float(one["loss"]) for name, one in validation.get("domains", {}).items()})
