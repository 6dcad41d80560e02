"""The table of a ladder: one row a measurement of the validation loss, csv or parquet, in any order.

    run       name of the run
    kind      dlcm or dense
    N         non-embedding parameters
    P         the backbone's share of N, 0 to 1; empty for dense
    R_target  tokens per concept aimed at; empty for dense
    R         tokens per concept realised over all of the run's tokens so far; empty for dense
    tokens    D, training tokens so far
    loss      validation loss, nats a token
    phase     stable: the learning rate is held (after warm-up); decayed: at the end of the decay

and, not read by the fit or only where they are there:

    flops     training FLOPs spent so far, counted by the realised concepts
    seed      of the run
    seconds   of training so far
    loss_X    validation loss of domain X
    decay_from  of a decayed row: tokens at which its decay began; where it is not given, the last stable row at or
              before the end counts as the last before the decay

A rung is a configuration (kind, N, P, R_target); runs of it may differ by seed. What is fitted is what was trained: the
law gets the *realised* R of a run's last row, and a run whose R missed its target by more than a bound is refused,
because it is another rung than its name says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dlcm_lightning.errors import ConfigError

REQUIRED = ("run", "kind", "N", "P", "R_target", "R", "tokens", "loss", "phase")
OPTIONAL = ("flops", "seed", "seconds")
DOMAIN_PREFIX = "loss_"
DECAY_FROM = "decay_from"
KINDS, PHASES = ("dlcm", "dense"), ("stable", "decayed")
LEAST_POINTS = 3
"""Stable rows of a run."""
SAME_SIZE = 1.15
"""Neighbouring N closer than this factor are one size of the ladder: P and R change a model's N by a few per cent."""


@dataclass(frozen=True)
class Run:
    """One run of a ladder, rows in the order of tokens."""

    name: str
    kind: str
    N: float
    P: float
    """0 for dense."""
    R_target: float
    R: float
    """Realised. 1 for dense, as the target."""
    tokens: np.ndarray
    """Of the stable rows, (points,)."""
    loss: np.ndarray
    flops: np.ndarray | None
    decayed: tuple[tuple[float, float, float], ...]
    """(tokens, loss, tokens at which it began) at the ends of decays."""

    @property
    def rung(self) -> tuple[str, float, float, float]:
        return self.kind, self.N, self.P, self.R_target


def read_table(file: Path, off_target: float) -> list[Run]:
    """Runs, by name. off_target: share by which a realised R may miss its target.

    ConfigError: what is missing, not a number, twice there, contradictory, or off target.
    """
    return runs_of(_read(file), off_target, str(file))


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file; name the table of a ladder, csv or parquet")
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        return pd.read_csv(file)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{file}: cannot be read as {'parquet' if file.suffix == '.parquet' else 'csv'} ({error}); "
                          "write it with pandas' to_csv(index=False)") from error


def runs_of(table: pd.DataFrame, off_target: float, name: str = "table") -> list[Run]:
    """As `read_table`, of a table in memory."""
    missing = [column for column in REQUIRED if column not in table.columns]
    if missing:
        raise ConfigError(f"{name}: no column {', '.join(missing)}; needed are {', '.join(REQUIRED)}")
    if not len(table):
        raise ConfigError(f"{name}: has no rows; add the measurements of a ladder")
    for column, allowed in (("kind", KINDS), ("phase", PHASES)):
        wrong = sorted({str(value) for value in table[column]} - set(allowed))
        if wrong:
            raise ConfigError(f"{name}: {column} = {wrong[0]!r}; write {' or '.join(allowed)}")
    table = _numbers(table, name)
    double = table[table.duplicated(["run", "tokens", "phase"])]
    if len(double):
        row = double.iloc[0]
        raise ConfigError(f"{name}: run {row['run']} has two {row['phase']} rows at tokens = {row['tokens']:,.0f}; "
                          "leave one of them (an attempt that was continued writes rows again)")
    runs = [_run(str(run), rows.sort_values("tokens"), name) for run, rows in table.groupby("run", sort=True)]
    _check_targets(runs, off_target, name)
    return runs


def _numbers(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Columns as floats, each positive and finite where it has to be."""
    table = table.copy()
    dense = table["kind"] == "dense"
    for column, value in (("P", 0.0), ("R_target", 1.0), ("R", 1.0)):
        table[column] = table[column].astype(object).mask(dense, value)
    columns = ["N", "P", "R_target", "R", "tokens", "loss", *(["flops"] if "flops" in table.columns else [])]
    for column in columns:
        values = pd.to_numeric(table[column], errors="coerce").astype(float)
        good = np.isfinite(values) & (values > 0) if column != "P" else values.between(0, 1) & (dense | (
            (values > 0) & (values < 1)))
        if not good.all():
            place = int(np.argmin(good.to_numpy()))
            want = "a share between 0 and 1, both excluded" if column == "P" else "a number above 0"
            raise ConfigError(f"{name}: {column} = {table[column].iloc[place]} of run {table['run'].iloc[place]} in "
                              f"row {place + 1}; must be {want}; mend the row or leave it out")
        table[column] = values
    return table


def _run(run: str, rows: pd.DataFrame, name: str) -> Run:
    for column in ("kind", "N", "P", "R_target"):
        values = rows[column].unique()
        if len(values) > 1:
            raise ConfigError(f"{name}: run {run} has {column} = {values[0]} and {values[1]}; give two runs two names")
    stable, decayed = (rows[rows["phase"] == phase] for phase in PHASES)
    if len(stable) < LEAST_POINTS:
        raise ConfigError(f"{name}: run {run} has {len(stable)} stable rows; at least {LEAST_POINTS} are needed to "
                          "follow a trajectory")
    last = stable.iloc[-1]
    return Run(run, str(last["kind"]), float(last["N"]), float(last["P"]), float(last["R_target"]), float(last["R"]),
               stable["tokens"].to_numpy(), stable["loss"].to_numpy(),
               stable["flops"].to_numpy() if "flops" in rows.columns else None,
               tuple(zip(decayed["tokens"].tolist(), decayed["loss"].tolist(), _begun(decayed), strict=True)))


def _begun(decayed: pd.DataFrame) -> list[float]:
    """Tokens at which each decay began, no later than its end."""
    if DECAY_FROM not in decayed.columns:
        return [float(value) for value in decayed["tokens"]]
    begun = pd.to_numeric(decayed[DECAY_FROM], errors="coerce").astype(float)
    return [float(value) for value in begun.fillna(decayed["tokens"]).clip(upper=decayed["tokens"])]


def _check_targets(runs: Iterable[Run], off_target: float, name: str) -> None:
    off = [run for run in runs if abs(run.R / run.R_target - 1) > off_target]
    if off:
        worst = max(off, key=lambda run: abs(run.R / run.R_target - 1))
        raise ConfigError(
            f"{name}: R = {worst.R:.3g} of run {worst.name} misses its target {worst.R_target:g} by "
            f"{100 * abs(worst.R / worst.R_target - 1):.1f} %, more than {100 * off_target:g} %"
            + (f", and so do {len(off) - 1} others" if len(off) > 1 else "")
            + "; train it again with a boundary form that holds its rate, leave the run out, or ask for --off-target")


def sizes_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs by size, the smallest first; N that differ by less than SAME_SIZE are one size."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda one: (one.N, one.name)):
        if groups and run.N / groups[-1][-1].N < SAME_SIZE:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def rungs_of(runs: Sequence[Run]) -> dict[tuple[str, float, float, float], list[Run]]:
    """Runs by configuration, in order."""
    rungs: dict[tuple[str, float, float, float], list[Run]] = {}
    for run in sorted(runs, key=lambda one: (one.rung, one.name)):
        rungs.setdefault(run.rung, []).append(run)
    return rungs
