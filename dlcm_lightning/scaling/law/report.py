"""fit.md: a fitted ladder as a page that says first what it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from dlcm_lightning.scaling.law.compute import BestRatio, Savings
from dlcm_lightning.scaling.law.formula import FittedDecay, FittedLaw, LadderLaws

MEANING = {
    "E0": "loss at infinite size and data (nats)", "A_tok": "token stacks",
    "t_tok": "offset (parameters)",
    "d1": "exponent of the token stacks", "A_con": "backbone", "gamma": "exponent of R, in the numerator",
    "t_con": "offset (parameters)", "d2": "exponent of the backbone", "A_dat": "data", "t_dat": "offset (tokens)",
    "alpha": "exponent of data", "c_tok": "nats of the token stacks in the middle of the grid",
    "c_con": "nats of the backbone in the middle of the grid", "c_dat": "nats of data in the middle of the grid",
    "k": "factor",
    "a": "exponent of the stable loss", "b": "exponent of R", "c": "exponent of N"}


def page(laws: LadderLaws, best: BestRatio | None, saved: list[Savings], notes: list[str]) -> Iterator[str]:
    """Its lines. notes: what could not be done, each a sentence."""
    origin = laws.origin
    yield f"# Scaling law of {origin['table']}"
    yield ""
    yield (f"`dlcm ladder fit`, seed {origin['seed']}, {origin['starts']} starts, {origin['bootstraps']} draws of "
           f"runs, late weight (D / D end)^{origin['late']:g}, points before {100 * origin['skip']:g} % of a run "
           f"left out, offsets {origin['offsets']}, realised R within {100 * origin['off_target']:g} % of its target. "
           f"Table sha256 `{origin['sha256'][:16]}`.")
    for note in notes:
        yield ""
        yield f"- {note}"
    for law, title in ((laws.concept, "DLCM, Eq. 22"), (laws.dense, "Dense baseline")):
        if law is not None:
            yield from _law(law, title)
    for decay, title in ((laws.decay, "Decay of DLCMs, Eq. 23"), (laws.dense_decay, "Decay of dense models, Eq. 23")):
        if decay is not None:
            yield from _decay(decay, title)
    if best is not None:
        yield from _best(best, saved)


def _constants(values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]],
               together: list[list[str]], unclear: list[str]) -> Iterator[str]:
    """A row a constant, and whether a value of it may be quoted."""
    yield "| constant | | value | 95 % interval | known |"
    yield "|---|---|---|---|---|"
    for name, value in values.items():
        ends = intervals.get(name)
        group = next((one for one in together if name in one), None)
        known = "no" if name in unclear else ("only with " + ", ".join(one for one in group if one != name)
                                              if group else "yes")
        if name[:2] == "A_":
            known = f"no: read c_{name[2:]}"
        yield (f"| {name} | {MEANING[name]} | {value:.4g} | "
               f"{f'{ends[0]:.4g} to {ends[1]:.4g}' if ends else 'not drawn'} | {known} |")


def _law(law: FittedLaw, title: str) -> Iterator[str]:
    quality: dict[str, Any] = law.quality
    yield from ("", f"## {title}", "")
    yield (f"{quality['runs']} runs of {quality['rungs']} rungs, {quality['sizes']} sizes, {quality['points']:,} "
           f"points. {quality['starts_at_best']} of {quality['starts']} starts reached the best optimum; "
           f"the worst ended at {quality['worst_start']:.3g} times its loss.")
    yield ""
    yield "| how well it fits | |"
    yield "|---|---|"
    yield f"| R^2 of all points (mostly the early fall of each run) | {quality['R2']:.5f} |"
    yield f"| R^2 of the last losses of runs | {quality['R2_of_last_losses']:.5f} |"
    yield f"| noise that is left, of log loss | {quality['noise']:.2g} |"
    if quality["rms_left_out"] is not None:
        yield f"| **a rung left out, last loss: root mean square error** | **{100 * quality['rms_left_out']:.3f} %** |"
    if quality["rms_largest"] is not None:
        yield f"| **the largest size from the smaller ones** | **{100 * quality['rms_largest']:.3f} %** |"
    yield ""
    yield from _constants(asdict(law.law) | quality["contributions"], law.intervals, quality["together"],
                          quality["unclear"])
    yield ""
    yield f"Condition number of the fit: {quality['condition_number']:.3g}."
    if quality["too_few_rungs"]:
        yield (f"**{quality['rungs']} rungs are no more than the constants: the fit runs through its data, and "
               "nothing is left to judge it by. Quote no constant of it.**")
    for group in quality["together"]:
        yield f"The grid cannot tell apart {', '.join(group)}: only together are they known."
    for name, factor in quality["wide"].items():
        yield f"{name} is unknown within a factor of {factor:.3g}."
    for name in quality["at_bounds"]:
        yield f"{name} ended at the end of its bounds: the data do not hold it."
    if quality["largest"]:
        yield from ("", "| run of the largest size | measured | predicted from the smaller ones | error |",
                    "|---|---|---|---|")
        for one in quality["largest"]:
            yield (f"| {one['run']} | {one['measured']:.4f} | {one['predicted']:.4f} | "
                   f"{100 * (one['predicted'] / one['measured'] - 1):+.3f} % |")
    yield ""
    seen = ", ".join(f"{name} {one.low:.3g} to {one.high:.3g}" for name, one in law.seen.items())
    yield f"Seen: {seen}. Predictions reach {law.extrapolation:g} times beyond, further only with `extrapolation=`."


def _decay(decay: FittedDecay, title: str) -> Iterator[str]:
    quality = decay.quality
    yield from ("", f"## {title}", "")
    yield f"{quality['runs']} runs; R^2 of log delta {quality['R2_of_log_gain']:.4f}."
    yield ""
    yield from _constants(quality["constants"], decay.intervals, quality["together"], quality["unclear"])


def _best(best: BestRatio, saved: list[Savings]) -> Iterator[str]:
    yield from ("", "## The best R, and what is saved", "")
    yield ("FLOPs of the body; N, D and P at their best for each R. An R at the end of the range that was trained is "
           "a bound, not an optimum.")
    yield ""
    yield "| FLOPs | best R | 95 % interval |" + "".join(f" saved at R = {one.R:g} |" for one in saved)
    yield "|---|---|---|" + "---|" * len(saved)
    places = np.unique(np.linspace(0, len(best.flops) - 1, 8).astype(int))
    for place in places:
        if not np.isfinite(best.R[place]):
            continue
        row = (f"| {best.flops[place]:.2e} | {best.R[place]:.2f}{' (end)' if best.at_edge[place] else ''} | "
               f"{best.low[place]:.2f} to {best.high[place]:.2f} |")
        yield row + "".join(_saved(one, int(place)) for one in saved)


def _saved(one: Savings, place: int) -> str:
    if not np.isfinite(one.share[place]):
        return " outside |"
    if not np.isfinite(one.low[place]):
        return f" {100 * one.share[place]:+.0f} % |"
    return f" {100 * one.share[place]:+.0f} % ({100 * one.low[place]:+.0f} to {100 * one.high[place]:+.0f}) |"
