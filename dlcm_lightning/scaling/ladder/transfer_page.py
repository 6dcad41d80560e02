"""The report of `dlcm ladder transfer`: transfer.md, the same numbers as transfer.json, transfer.png."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.scaling.ladder.descent import Descent
from dlcm_lightning.scaling.ladder.transfer_plot import draw
from dlcm_lightning.scaling.ladder.transfer_result import Curve, Result

NAME = "transfer"
DIVERGED = "diverged"


def write_report(folder: Path, result: Result) -> Path:
    """Into the folder of the study; the page's file."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{NAME}.md"
    plain = asdict(result) | {"found_rates": result.found_rates}
    write_atomically(folder / f"{NAME}.json", (json.dumps(_plain(plain), indent=1) + "\n").encode())
    if any(curve.minimum for curve in result.curves):
        draw(folder / f"{NAME}.png", result)
    write_atomically(page, ("\n".join(lines(result)) + "\n").encode())
    return page


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return DIVERGED if isinstance(value, float) and math.isinf(value) else value


def lines(result: Result) -> Iterator[str]:
    """Of the page."""
    yield f"# Learning-rate transfer of {result.study}"
    yield ""
    seeds = "one seed" if result.seeds == 1 else f"{result.seeds} seeds, averaged; +- is their standard deviation"
    yield (f"Validation loss in nats a token; {seeds}. A minimum is the vertex of the parabola over the logarithm of "
           f"the factor through the lowest point and its neighbours. A grid step is {result.grid_step:.3g}.")
    for verdict in result.verdicts:
        yield ""
        yield f"- {verdict.text}."
    if result.missing:
        yield ""
        yield f"- {result.missing} points are not measured yet."
    if result.descent is not None:
        yield from _search(result, result.descent)
    for (sweep, variant), curves in groupby(result.curves, key=lambda one: (one.sweep, one.variant)):
        yield from _sweep(sweep, variant, list(curves), result)
    if any(curve.minimum for curve in result.curves):
        yield ""
        yield f"![Loss over learning rates]({NAME}.png)"


def _search(result: Result, descent: Descent) -> Iterator[str]:
    yield from ("", "## The search on the proxy", "")
    yield (f"One field at a time, in factors of {result.factor:g}. " + (
        "The last round moved nothing." if descent.settled else
        "It ended with its rounds, while fields still moved: give more rounds." if descent.finished else
        "It is not finished."))
    yield ""
    yield "| round | field | loss by rate | best |"
    yield "|---|---|---|---|"
    for one in descent.searches:
        base = result.base_rates[one.field]
        tried = ", ".join(f"{base * result.factor**power:.3g}: {_loss(loss)}" for power, loss in one.tried.items())
        yield f"| {one.round} | {one.field} | {tried} | {base * result.factor**one.chosen:.3g} |"
    yield ""
    yield "Found: " + ", ".join(f"{name} = {rate:.4g}" for name, rate in result.found_rates.items()) + "."


def _sweep(sweep: str, variant: str, curves: Sequence[Curve], result: Result) -> Iterator[str]:
    yield from ("", f"## {sweep}, {variant}", "")
    yield "| width | N | lr_token x 1 | " + " | ".join(f"x {factor:g}" for factor in curves[0].factors) + (
        " | minimum at | moved by, grid steps |")
    yield "|---" * (len(curves[0].factors) + 5) + "|"
    verdict = next((one for one in result.verdicts if (one.sweep, one.variant) == (sweep, variant)), None)
    for place, curve in enumerate(curves):
        cells = [_loss(loss) + ("" if spread is None else f" +- {spread:.4f}")
                 for loss, spread in zip(curve.losses, curve.spreads, strict=True)]
        minimum, moved = "-", "-"
        if curve.minimum is not None:
            minimum = f"x {curve.minimum.factor:.3g}{' (edge)' if curve.minimum.at_edge else ''}"
        if verdict is not None and place:
            moved = f"{verdict.moves[place]:+.2f}"
        cells = [curve.width, f"{curve.N:,}", f"{curve.rates['lr_token']:.3g}", *cells, minimum, moved]
        yield f"| {' | '.join(cells)} |"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else DIVERGED if math.isinf(loss) else f"{loss:.4f}"
