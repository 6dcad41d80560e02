"""`dlcm ladder fit`: from the table of a ladder to law.json, fit.md and pictures.

What is too little to fit is refused, or left out with a sentence in fit.md: the DLCM law needs six rungs of two sizes
and two R, the dense law three sizes. What can be fitted and yet not known is said beside each constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.atomic_io import sha256_of, write_atomically
from dlcm_lightning.config.checks import require_range
from dlcm_lightning.errors import ConfigError
from dlcm_lightning.progress import Log
from dlcm_lightning.scaling.law import plots
from dlcm_lightning.scaling.law.compute import BestRatio, Savings, best_ratio, budgets, savings
from dlcm_lightning.scaling.law.decay import fit_decay
from dlcm_lightning.scaling.law.diagnostics import constant_intervals, identifiability
from dlcm_lightning.scaling.law.fit import OffsetsBy, Options, bootstrap, search
from dlcm_lightning.scaling.law.formula import FittedDecay, FittedLaw, LadderLaws, Range, body_flops_per_token
from dlcm_lightning.scaling.law.held_out import each_rung, largest_size, root_mean_square
from dlcm_lightning.scaling.law.report import page
from dlcm_lightning.scaling.law.table import Run, read_table, rungs_of, sizes_of
from dlcm_lightning.scaling.law.terms import Points, points_of

OFF_TARGET, EXTRAPOLATION = 0.05, 4.0
LEAST_RUNGS, LEAST_SIZES, LEAST_RATIOS, LEAST_DENSE = 6, 2, 2, 3


@dataclass(frozen=True)
class Fitted:
    """What was written."""

    laws: LadderLaws
    notes: tuple[str, ...]
    """What could not be done, each a sentence."""
    files: tuple[Path, ...]


def fit_runs(runs: Sequence[Run], options: Options, extrapolation: float) -> FittedLaw:
    """The law of runs of one kind. ConfigError: too few rungs."""
    _check_rungs(runs)
    points = points_of(runs, late=options.late, skip=options.skip, by_rung=options.offsets == "configuration")
    best, spread, noise = search(points, options)
    samples = bootstrap(points, best, noise, options)
    left_out = each_rung(points, options, best, noise)
    largest = largest_size(points, options, best, noise)
    known = identifiability(points, best.coordinates, samples)
    values, _ = points.evaluate(best.coordinates)
    quality: dict[str, Any] = {
        "runs": len(runs), "rungs": len(points.rungs), "sizes": len(sizes_of(runs)), "points": len(points.loss),
        "starts": spread.starts, "starts_at_best": spread.reached, "worst_start": spread.worst, "noise": noise,
        "R2": _determination(points.loss, values, points.weight),
        "R2_of_last_losses": _determination(points.loss[points.last], values[points.last], np.ones(len(runs))),
        "rms_left_out": root_mean_square(left_out) if left_out else None,
        "rms_largest": root_mean_square(largest) if largest else None,
        "left_out": [asdict(one) for one in left_out], "largest": [asdict(one) for one in largest],
        "contributions": points.contributions(best.coordinates), "condition_number": known.condition_number,
        "together": [list(one) for one in known.together], "wide": known.wide, "at_bounds": list(known.at_bounds),
        "too_few_rungs": bool(known.too_few_rungs), "unclear": list(known.unclear)}
    return FittedLaw(points.law(best.coordinates), constant_intervals(points, samples),
                     tuple(points.law(one) for one in samples), _seen(points), extrapolation, quality,
                     points.offsets(best.coordinates))


def _check_rungs(runs: Sequence[Run]) -> None:
    dense = runs[0].kind == "dense"
    sizes, rungs, ratios = len(sizes_of(runs)), len(rungs_of(runs)), len({run.R_target for run in runs})
    if dense and sizes < LEAST_DENSE:
        raise ConfigError(f"the dense rungs have {sizes} sizes; a law needs {LEAST_DENSE}; train another one")
    if not dense and (sizes < LEAST_SIZES or rungs < LEAST_RUNGS or ratios < LEAST_RATIOS):
        raise ConfigError(f"the ladder has {rungs} DLCM rungs of {sizes} sizes and {ratios} R; Eq. 22 needs "
                          f"{LEAST_RUNGS} rungs, {LEAST_SIZES} sizes and {LEAST_RATIOS} R; train what is missing (the "
                          "paper has 4 sizes x 3 P x 3 R)")


def _determination(measured: np.ndarray, predicted: np.ndarray, weight: np.ndarray) -> float:
    """R^2."""
    mean = np.average(measured, weights=weight)
    return 1 - float(np.sum(weight * (measured - predicted)**2) / np.sum(weight * (measured - mean)**2))


def _seen(points: Points) -> dict[str, Range]:
    runs = points.runs
    values: dict[str, list[float]] = {"N": [run.N for run in runs], "D": points.tokens.tolist()}
    if points.concept:
        values |= {"R": [run.R for run in runs], "P": [run.P for run in runs],
                   "token_parameters": [run.N * (1 - run.P) for run in runs],
                   "concept_parameters": [run.N * run.P for run in runs]}
    return {name: Range(min(one), max(one)) for name, one in values.items()}


def fit_table(file: Path, out: Path, *, seed: int = 0, starts: int = 32, bootstraps: int = 200,
              late: float = 1.0, skip: float = 0.05, offsets: OffsetsBy = "shared", off_target: float = OFF_TARGET,
              extrapolation: float = EXTRAPOLATION, log: Log) -> Fitted:
    """Fits a table and writes law.json, fit.md and pictures into `out`; what is there of these names is replaced.

    seed to offsets: as in `Options`. off_target: share by which a realised R may miss its target. extrapolation: factor
    beyond the ladder up to which predictions are given unasked. report: takes a few lines about the result.

    ConfigError: a table that cannot be used, too few rungs, or an option out of range.
    """
    require_range("--off-target", off_target, 0, 10)
    require_range("--extrapolation", extrapolation, 1, 1e6)
    options = Options(seed, starts, bootstraps, late, skip, offsets)
    runs = read_table(file, off_target)
    notes: list[str] = []
    kinds = {kind: [run for run in runs if run.kind == kind] for kind in ("dlcm", "dense")}
    laws: dict[str, FittedLaw | None] = {"dlcm": None, "dense": None}
    decays: dict[str, FittedDecay | None] = {"dlcm": None, "dense": None}
    if not kinds["dlcm"]:
        notes.append("The table has no DLCM runs: no Eq. 22.")
    if not kinds["dense"]:
        notes.append("The table has no dense runs: nothing is said about savings. Train the matched dense sizes.")
    for kind, some in kinds.items():
        if not some:
            continue
        try:
            laws[kind] = fit_runs(some, options, extrapolation)
        except ConfigError as error:
            if kind == "dlcm" or not kinds["dlcm"]:
                raise ConfigError(f"{file}: {error}") from error
            notes.append(f"No dense law: {error}.")
        decay = fit_decay(some, options.seed, options.bootstraps)
        if isinstance(decay, str):
            notes.append(f"No Eq. 23 for {kind}: {decay}.")
        else:
            decays[kind] = decay
    origin = {"table": file.name, "sha256": sha256_of(file), "off_target": off_target, **asdict(options)}
    fitted = LadderLaws(laws["dlcm"], laws["dense"], decays["dlcm"], decays["dense"], origin)
    return _written(out, fitted, kinds, notes, options.skip, log)


def _written(out: Path, laws: LadderLaws, kinds: dict[str, list[Run]], notes: list[str], skip: float,
             log: Log) -> Fitted:
    out.mkdir(parents=True, exist_ok=True)
    for name in plots.NAMES:  # of a fit before this one, which may have drawn more
        for suffix in plots.SUFFIXES:
            (out / f"{name}.{suffix}").unlink(missing_ok=True)
    files = [out / "law.json", out / "fit.md"]
    best: BestRatio | None = None
    saved: list[Savings] = []
    if laws.concept is not None:
        more, best, saved, pictures = _compute(out, laws, kinds["dlcm"])
        notes = [*notes, *more]
        files += pictures + plots.trajectories(out, kinds["dlcm"], laws.concept, skip)
    if laws.dense is not None:
        files += plots.trajectories(out, kinds["dense"], laws.dense, skip)
    write_atomically(files[0], laws.to_json().encode())
    write_atomically(files[1], ("\n".join(page(laws, best, saved, notes)) + "\n").encode())
    for name, law in (("DLCM", laws.concept), ("dense", laws.dense)):
        if law is not None:
            log(_summary(name, law))
    for note in notes:
        log(f"  {note}")
    log(f"{files[1]} says it in full; {files[0]} is the law")
    return Fitted(laws, tuple(notes), tuple(files))


def _summary(name: str, law: FittedLaw) -> str:
    quality = law.quality
    parts = [f"{name}: {quality['runs']} runs, R^2 {quality['R2']:.5f}",
             f"{quality['starts_at_best']} of {quality['starts']} starts at the best optimum"]
    if quality["rms_left_out"] is not None:
        parts.append(f"a rung left out {100 * quality['rms_left_out']:.2f} % off")
    if quality["rms_largest"] is not None:
        parts.append(f"the largest size from the smaller ones {100 * quality['rms_largest']:.2f} %")
    if quality["too_few_rungs"]:
        parts.append(f"{quality['rungs']} rungs are no more than its constants: none of them is known")
    elif quality["unclear"]:
        parts.append(f"not known: {', '.join(quality['unclear'])}")
    return "; ".join(parts)


def _compute(out: Path, laws: LadderLaws, runs: list[Run]
             ) -> tuple[list[str], BestRatio | None, list[Savings], list[Path]]:
    """What the laws say about compute, and its pictures. None, and empty: nothing within the range of the ladder."""
    law = laws.concept
    assert law is not None
    notes = []
    ratios = sorted({run.R_target for run in runs})
    spent = [body_flops_per_token(run.N, run.R, run.P) * float(run.tokens[-1]) for run in runs]
    shares = [float(run.flops[-1]) / one for run, one in zip(runs, spent, strict=True) if run.flops is not None]
    if shares:
        notes.append(f"The FLOPs of the table are {min(shares):.2f} to {max(shares):.2f} times those of the body, "
                     "which all comparisons below count.")
    if laws.dense is not None and laws.dense.quality["too_few_rungs"]:
        notes.append(f"The dense law stands on {laws.dense.quality['rungs']} rungs and has more constants: what is "
                     "saved is little to go by, whatever its interval says. Train more dense sizes.")
    flops = budgets(runs, law.extrapolation)
    best: BestRatio | None = best_ratio(law, flops)
    saved = [] if laws.dense is None else [savings(law, laws.dense, flops, R) for R in ratios]
    dearest = max(spent)
    largest = {run.name for run in sizes_of(runs)[-1]}
    tokens, middle = (float(np.median([value for value, run in zip(values, runs, strict=True) if run.name in largest]))
                      for values in ([float(run.tokens[-1]) for run in runs], spent))
    pictures = plots.loss_over_share(out, law, laws.dense, middle, tokens, ratios)
    if best is not None and np.isfinite(best.R).any():
        pictures += plots.best_ratio_over_compute(out, best, dearest)
    else:
        best = None
        notes.append("No best R: at no budget do the best N and D lie inside the range of the ladder; train longer or "
                     "larger rungs, or ask for more --extrapolation.")
    if any(np.isfinite(one.share).any() for one in saved):
        pictures += plots.savings_over_compute(out, saved, dearest)
    elif saved:
        notes.append("No savings: at no budget do the best N and D of a DLCM and of a dense model of the same loss lie "
                     "inside the range of the ladder.")
    return notes, best, saved, pictures
