"""`dlcm ladder transfer`: searches the rates of a small model, perturbs them at larger widths, and says how far the
best ones move.

Every point is a run of the machinery of `dlcm ladder run`: what is finished is not trained again, what was killed goes
on. A run whose gradient does not stay finite has an infinite loss here, and is not tried again until its log is
removed. The report is written of whatever is finished.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from dlcm_lightning.config import ConfigError
from dlcm_lightning.progress import Log
from dlcm_lightning.scaling.ladder.descent import Descent, Place, descend
from dlcm_lightning.scaling.ladder.execute import Executor
from dlcm_lightning.scaling.ladder.minimum import Minimum, grid_steps, minimum_of
from dlcm_lightning.scaling.ladder.plan import rates_of, study_folder
from dlcm_lightning.scaling.ladder.runs import PlannedRun, check_same_run, read_report, state_of
from dlcm_lightning.scaling.ladder.study import Study
from dlcm_lightning.scaling.ladder.study_run import LOGS, Part, chosen, jobs_of, write_run_files
from dlcm_lightning.scaling.ladder.study_run import overview as overview_of
from dlcm_lightning.scaling.ladder.sweeps import Point, Runs, distinct, proxy_runs, section_of, sweep_points
from dlcm_lightning.scaling.ladder.transfer_page import write_report
from dlcm_lightning.scaling.ladder.transfer_result import Curve, Result, Verdict

WIDEST = 2.0
"""Grid steps between factors that seeds may leave open: one to either side of a minimum."""


def overview(study: Study, part: Part | None) -> Iterator[str]:
    """Lines of --list: the points that are known by now."""
    with Executor(study_folder(study) / LOGS) as executor:
        session = _Session(study, executor, print, train=False)
        descent = session.search()
        runs = session.runs.all()
        if descent is None or descent.finished:
            mine = distinct(run for point in session.points(descent) for run in point.runs)
            runs = distinct([*runs[:session.searched], *(chosen(mine, None, part) if mine else [])])
    yield from overview_of(study, runs)
    if descent is not None and not descent.finished:
        yield "the search on the proxy is not finished; the sweeps follow from it"


def run_transfer(study: Study, part: Part | None, log: Log, *, train: bool = True) -> bool:
    """Trains what is not finished, if asked to, and reports; whether no run has failed.

    Stopped: this process was told to leave. ConfigError: a part is asked for while the search is not finished.
    """
    with Executor(study_folder(study) / LOGS) as executor:
        session = _Session(study, executor, log, train=train and part is None)
        descent = session.search()
        if descent is not None and not descent.finished and part is not None:
            raise ConfigError(f"--task {part.index}/{part.of}: the search on the proxy takes one step after another, "
                              "and is not finished; call the command without --task first")
        points = session.points(descent) if descent is None or descent.finished else []
        mine = distinct(run for point in points for run in point.runs)
        session.train = train
        if mine:
            session.measure(chosen(mine, None, part), "sweeps")
        result = session.result(descent, points)
    file = write_report(study_folder(study), result)
    for verdict in result.verdicts:
        log(verdict.text)
    if result.missing:
        log(f"{result.missing} points are not measured yet")
    log(f"{file} says it in full")
    return not session.failed


class _Session:
    """One call of the command."""

    def __init__(self, study: Study, executor: Executor, log: Log, *, train: bool) -> None:
        """train: whether what is missing is trained."""
        self.study, self.executor, self.log, self.train = study, executor, log, train
        self.runs = Runs()
        self.searched = 0
        """Distinct runs of the search."""
        self.failed: list[str] = []
        self._losses: dict[str, float | None] = {}

    def search(self) -> Descent | None:
        """The search on the proxy, as far as it comes; None where the study has none."""
        transfer = section_of(self.study)
        if transfer.proxy is None:
            return None
        descent = descend(transfer.fields, transfer.rounds, self._evaluate)
        self.searched = len(self.runs.all())
        return descent

    def points(self, descent: Descent | None) -> list[Point]:
        """Of the sweeps. descent: finished."""
        return sweep_points(self.study, descent.place if descent else {}, self.runs)

    def _evaluate(self, places: Sequence[Place], field: str) -> list[float | None]:
        groups = [proxy_runs(self.study, place, self.runs) for place in places]
        self.measure(distinct(run for group in groups for run in group), f"search of {field}")
        return [self.loss(group)[0] for group in groups]

    def measure(self, runs: Sequence[PlannedRun], what: str) -> None:
        """Trains what is not finished, if this call trains, and reads the losses."""
        groups = []
        for run in runs:
            trunk = jobs_of(self.study, run)[0]
            if state_of(trunk) == "finished":
                check_same_run(run)
            elif self.train and not self.executor.diverged(trunk):
                groups.append([trunk])
        if groups:
            write_run_files(self.study, runs)
            for outcome in self.executor.go_through(groups, what):
                if outcome.how == "failed" and self.executor.diverged(outcome.job):
                    self.log(f"{outcome.job.name} has diverged: its loss counts as infinite")
                elif outcome.how in ("failed", "taken"):
                    self.failed += [outcome.job.name] if outcome.how == "failed" else []
                    self.log(f"{outcome.job.name} " + (f"has failed: {outcome.said}" if outcome.how == "failed" else
                                                       "is being trained by another process"))
        for run in runs:
            self._losses[run.name] = self._loss_of(run)

    def _loss_of(self, run: PlannedRun) -> float | None:
        trunk = run.jobs(Path())[0]
        if state_of(trunk) != "finished":
            return math.inf if self.executor.diverged(trunk) else None
        report = read_report(run.run)
        assert report is not None
        loss = float(report["validation"]["loss"])
        return loss if math.isfinite(loss) else math.inf

    def loss(self, runs: Sequence[PlannedRun]) -> tuple[float | None, float | None]:
        """Mean over seeds, and their standard deviation where there are several; None where one is not known."""
        found = [self._losses[run.name] if run.name in self._losses else self._loss_of(run) for run in runs]
        losses = [loss for loss in found if loss is not None]
        if len(losses) < len(found):
            return None, None
        if not all(map(math.isfinite, losses)):
            return math.inf, None
        return statistics.fmean(losses), statistics.stdev(losses) if len(losses) > 1 else None

    def result(self, descent: Descent | None, points: Sequence[Point]) -> Result:
        transfer = section_of(self.study)
        base: dict[str, float] = {}
        if descent is not None:
            base = rates_of(proxy_runs(self.study, {}, self.runs)[0].config)
        curves = list(self._curves(points))
        verdicts = [verdict for sweep in transfer.sweeps for variant in sweep.variants
                    if (verdict := verdict_of([one for one in curves if (one.sweep, one.variant) == (
                        sweep.name, variant.name)], transfer.grid_step, len(self.study.seeds)))]
        missing = sum(loss is None for curve in curves for loss in curve.losses)
        return Result(self.study.name, len(self.study.seeds), transfer.factor, transfer.grid_step, descent, base,
                      tuple(curves), tuple(verdicts), missing)

    def _curves(self, points: Sequence[Point]) -> Iterator[Curve]:
        by_curve: dict[tuple[str, str, str], list[Point]] = {}
        for point in points:
            by_curve.setdefault((point.sweep.name, point.variant.name, point.width.name), []).append(point)
        for (sweep, variant, width), group in by_curve.items():
            factors = tuple(point.factor for point in group)
            measured = [self.loss(point.runs) for point in group]
            losses = tuple(loss for loss, _ in measured)
            run = group[0].runs[0]
            rates = {name: rate / factors[0] if name in group[0].sweep.rates else rate
                     for name, rate in rates_of(run.config).items()}
            yield Curve(sweep, variant, width, group[0].width.times, run.weights.non_embedding, rates, factors, losses,
                        tuple(spread for _, spread in measured), minimum_of(factors, losses))


def verdict_of(curves: Sequence[Curve], step: float, seeds: int = 1) -> Verdict | None:
    """Of a variant, its widths ascending. step: ratio of neighbouring factors. seeds: after each loss. None where a
    width has no loss."""
    minima = [curve.minimum for curve in curves]
    if not curves or any(one is None for one in minima):
        return None
    known: list[Minimum] = [one for one in minima if one is not None]
    moves = tuple(grid_steps(known[0].factor, one.factor, step) for one in known)
    edges = [curve.width for curve, one in zip(curves, known, strict=True) if one.at_edge]
    times = curves[-1].times / curves[0].times
    cost = _cost(curves[-1], known[0].factor)
    text = f"{curves[0].sweep}, {curves[0].variant}: the best rates "
    ranges = {curve.width: curve.alike(seeds) for curve in curves}
    unclear = {width: found for width, found in ranges.items()
               if found and grid_steps(min(found), max(found), step) > WIDEST + 1e-9}
    if unclear:
        said = ", ".join(f"x {min(found):g} to x {max(found):g} at {width}" for width, found in unclear.items())
        return Verdict(curves[0].sweep, curves[0].variant, times, moves, bool(edges), tuple(unclear), cost, text + (
            f"are not known: losses at factors {said} are no further apart than {seeds} seeds are; train longer, or "
            "with more seeds"))
    if known[0].at_edge and known[-1].at_edge and moves[-1] == 0:
        return Verdict(curves[0].sweep, curves[0].variant, times, moves, True, (), cost, text + (
            f"are not known: the minima of {curves[0].width} and {curves[-1].width} lie at the same edge of the "
            "factors, or beyond; give other factors"))
    text += f"move by {moves[-1]:+.2f} grid steps over {times:g} x width"
    if edges:
        text += f" (a bound: the minimum of {', '.join(edges)} lies at the edge of the factors or beyond)"
    if cost is not None:
        text += (f"; at {curves[-1].width}, the factor nearest to the best of {curves[0].width} costs {cost:.4f} nats "
                 "more than the best")
    return Verdict(curves[0].sweep, curves[0].variant, times, moves, bool(edges), (), cost, text)


def _cost(curve: Curve, factor: float) -> float | None:
    """Of a factor that another width has found best, in nats, at the nearest one that was measured."""
    losses = [(one, loss) for one, loss in zip(curve.factors, curve.losses, strict=True) if loss is not None]
    nearest = min(losses, key=lambda pair: abs(math.log(pair[0] / factor)))[1]
    least = min(loss for _, loss in losses)
    return nearest - least if math.isfinite(nearest) else None
