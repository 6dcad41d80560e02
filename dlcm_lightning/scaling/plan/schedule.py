"""The run around a model and its tokens: everything that the known run says, but for what its length changes.

- Rows of a step are kept, since learning rates belong to a batch; where fewer than 500 steps would be left, they are
  halved until there are as many, but never below one row a GPU. Where GPUs are named, rows are the nearest number that
  whole micro-batches of all of them make: else some would compute padding rows.
- Tokens are a whole number of steps.
- Warm-up is as many steps as in the known run, in a longer run as large a share; at most a twentieth of it.
- Validations and checkpoints are as far apart as in the known run, in a longer run up to 1000 steps; at most a tenth of
  it. Lines of metrics are as far apart, at most a fiftieth.

Base learning rates are the known run's: muP makes the real ones of them, by the table of model/mup.py. What that does
not carry over is the batch and the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dlcm_lightning.config import Config, ModelConfig, OptimConfig

LEAST_STEPS = 500
WARMUP_SHARE, INTERVAL_SHARE, LOG_SHARE = 1 / 20, 1 / 10, 1 / 50
"""Of a run's steps, at most."""
USUAL_INTERVAL = 1000
"""Steps between validations, and between checkpoints, of long runs."""


@dataclass(frozen=True)
class Schedule:
    """A whole run."""

    config: Config
    notes: tuple[str, ...]
    """What is not as in the known run, and why."""


def scheduled(like: Config, name: str, model: ModelConfig, tokens: float, ranks: int | None) -> Schedule:
    """The known run with this model on about so many tokens. ranks: GPUs that each want a row; None if nobody says.
    ConfigError: a field that such a run cannot have."""
    rows, micro_batch = _whole_batches(_rows(like, tokens, ranks or 1), like.data.micro_batch_size, ranks or 1)
    per_step = rows * like.data.sequence_length
    steps = max(1, round(tokens / per_step))
    optim = replace(like.optim, total_tokens=steps * per_step, warmup_tokens=_warmup_steps(like, steps) * per_step)
    data = replace(like.data, global_batch_size=rows, micro_batch_size=micro_batch)
    train = replace(like.train, init_from="" if model != like.model else like.train.init_from,
                    log_every_steps=min(like.train.log_every_steps, max(1, int(LOG_SHARE * steps))),
                    validate_every_steps=_interval(like, like.train.validate_every_steps, steps),
                    checkpoint_every_steps=_interval(like, like.train.checkpoint_every_steps, steps))
    config = replace(like, name=name, model=model, data=data, optim=optim, train=train)
    return Schedule(config, tuple(_notes(like, config)))


def _rows(like: Config, tokens: float, least: int) -> int:
    rows = like.data.global_batch_size
    while tokens / (rows * like.data.sequence_length) < LEAST_STEPS and rows // 2 >= least:
        rows //= 2
    return rows


def _whole_batches(rows: int, micro_batch: int, ranks: int) -> tuple[int, int]:
    """Rows of a step and of a micro-batch, so that every rank has whole ones."""
    micro_batch = min(micro_batch, max(1, rows // ranks))
    unit = ranks * micro_batch
    return max(unit, round(rows / unit) * unit) if 1 < ranks <= rows else rows, micro_batch


def _warmup_steps(like: Config, steps: int) -> int:
    known = like.optim.warmup_tokens / like.data.tokens_per_step * max(1.0, steps / like.total_steps)
    decay = like.optim.decay_fraction if like.optim.schedule == "wsd" else 0.0
    return min(round(known), max(1, round(WARMUP_SHARE * steps)), int((1 - decay) * steps * (1 - 1e-12)))


def _interval(like: Config, known: int, steps: int) -> int:
    longer = round(known * max(1.0, steps / like.total_steps))
    return min(max(known, min(USUAL_INTERVAL, longer)), max(1, int(INTERVAL_SHARE * steps)))


def _notes(like: Config, config: Config) -> Iterator[str]:
    rows, known = config.data.global_batch_size, like.data.global_batch_size
    if rows != known:
        yield (f"{rows} row{'s' * (rows > 1)} a step in place of {like.name}'s {known}, for {config.total_steps:,} "
               "steps: its learning rates belong to its batch")
    if config.total_steps < LEAST_STEPS:
        yield f"{config.total_steps:,} steps are few: fewer than {LEAST_STEPS}"
    if like.train.init_from and not config.train.init_from:
        yield f"train.init_from = {like.train.init_from} is left out: those weights have another shape"
    if like.data.weight_changes:
        yield "data.weight_changes stay at the tokens at which they were: look at them"


def real_rates(model: ModelConfig, optim: OptimConfig) -> dict[str, tuple[float, float]]:
    """By field of `optim`: (base rate, peak rate of the matrices of blocks at this size), as model/mup.py has it."""
    exponent = model.mup.depth_exponent
    slower = [m ** (1 - exponent) if exponent else 1.0 for m in (model.m_token, model.m_concept)]
    return {"lr_token": (optim.lr_token, optim.lr_token / model.s_token / slower[0]),
            "lr_concept": (optim.lr_concept, optim.lr_concept / model.s_concept / slower[1]),
            "lr_boundary": (optim.lr_boundary, optim.lr_boundary / model.s_token),
            "lr_other": (optim.lr_other, optim.lr_other)}
