"""The points of the section `transfer:` of a study, each as runs, one a seed.

A point of a sweep is a width, a variant and a factor x. Its rates are those that width and variant compose, times the
powers that the search on the proxy has found, times x. A variant that corrects rates by width is so measured in the
same steps as one that does not. Points whose runs are the same, such as those of two variants that differ at larger
widths only, are trained once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dlcm_lightning.config import Config
from dlcm_lightning.flops import matrix_parameters
from dlcm_lightning.scaling.ladder.plan import composed, model_overrides, planned_run, rate_overrides, rates_of
from dlcm_lightning.scaling.ladder.runs import PlannedRun
from dlcm_lightning.scaling.ladder.study import RATES, Study, Sweep, Transfer, Variant, Width
from dlcm_lightning.scaling.shapes import model_of_size


@dataclass(frozen=True)
class Point:
    """A point of a sweep."""

    sweep: Sweep
    width: Width
    variant: Variant
    factor: float
    runs: tuple[PlannedRun, ...]
    """One a seed."""


class Runs:
    """Runs by what they compute: of two that differ in their names alone the first stands for both."""

    def __init__(self) -> None:
        self._known: dict[str, PlannedRun] = {}

    def same(self, run: PlannedRun) -> PlannedRun:
        """The run itself, or the one that it repeats."""
        return self._known.setdefault(_computes(run.config), run)

    def all(self) -> list[PlannedRun]:
        """In the order in which they came."""
        return list(self._known.values())


def _computes(config: Config) -> str:
    """As text, without the name."""
    plain: dict[str, Any] = asdict(replace(config, name="x"))
    return repr(plain)


def section_of(study: Study) -> Transfer:
    """The section `transfer` of a study that has one."""
    assert study.transfer is not None
    return study.transfer


def proxy_runs(study: Study, place: Mapping[str, int], runs: Runs) -> tuple[PlannedRun, ...]:
    """Of the proxy, at powers of the factor. ConfigError: there is no such shape."""
    transfer = section_of(study)
    assert transfer.proxy is not None
    overrides: tuple[str, ...] = transfer.proxy.overrides
    if transfer.proxy.parameters:
        like = composed(study, overrides).model
        shape = model_of_size(transfer.proxy.parameters, matrix_parameters(like).backbone_share, like)
        overrides = (*overrides, *model_overrides(like, shape))
    config = composed(study, overrides)
    rates = scaled(rates_of(config), place, transfer.factor)
    label = "-".join(["proxy", *(f"{name.removeprefix('lr_')}{rates[name]:g}" for name in RATES)])
    return _seeds(study, label, [*overrides, *rate_overrides(rates)], config, "proxy", runs)


def scaled(rates: Mapping[str, float], place: Mapping[str, int], factor: float) -> dict[str, float]:
    """Rates times the powers of a place; a field that it does not name stays."""
    return {name: rate * factor ** place.get(name, 0) for name, rate in rates.items()}


def sweep_points(study: Study, place: Mapping[str, int], runs: Runs) -> list[Point]:
    """All points of all sweeps. place: where the search has ended; empty where there was none."""
    transfer = section_of(study)
    points = []
    for sweep in transfer.sweeps:
        for variant in sweep.variants:
            for width in sweep.widths:
                config = composed(study, width_overrides(width, variant))
                points += [_point(study, sweep, width, variant, factor, config, place, runs)
                           for factor in transfer.factors]
    return points


def width_overrides(width: Width, variant: Variant) -> tuple[str, ...]:
    """Of the base, for a width under a variant; rates among them are those at the factor 1."""
    return (*width.overrides, *variant.overrides, *variant.by_width.get(width.name, ()))


def _point(study: Study, sweep: Sweep, width: Width, variant: Variant, factor: float, config: Config,
           place: Mapping[str, int], runs: Runs) -> Point:
    """config: of the width under the variant."""
    overrides = width_overrides(width, variant)
    rates = scaled(rates_of(config), place, section_of(study).factor)
    rates = {name: rate * factor if name in sweep.rates else rate for name, rate in rates.items()}
    label = f"{sweep.name}-{width.name}-{variant.name}-x{factor:g}"
    found = _seeds(study, label, [*overrides, *rate_overrides(rates)], config, variant.name, runs)
    return Point(sweep, width, variant, factor, found)


def _seeds(study: Study, label: str, overrides: Sequence[str], config: Config, variant: str, runs: Runs
           ) -> tuple[PlannedRun, ...]:
    tokens = study.tokens or study.tokens_per_parameter * matrix_parameters(config.model).non_embedding
    return tuple(runs.same(planned_run(replace(study, decays=None), f"{label}-s{seed}", overrides, tokens, seed,
                                       variant)) for seed in study.seeds)


def distinct(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Each once, in order."""
    return list({run.name: run for run in runs}.values())
