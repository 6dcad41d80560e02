"""What a check found: a table to read, a page of numbers, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.config import Config
from dlcm_lightning.progress import Log
from dlcm_lightning.training.mup_check.verdict import MEASURED, Line, Seen

JSON, ALL, PICTURE = "mup.json", "coordinates.json", "mup.png"
NAMES = {"token": "token width D", "concept": "concept width E", "depth": "layers of each stack"}
WORDS = {"size": "size at first", "own": "own move", "move": "move", "learning_rate": "learning rate",
         "weight_decay": "weight decay", "epsilon": "epsilon"}
COLOURS = dict(zip((
    "embedding", "norm_token", "token", "stream_token", "boundary", "token_to_concept", "norm_concept", "concept",
    "stream_concept", "concept_to_token", "unembedding"), (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "black"), strict=True))
"""By role, the same in every panel."""


def write_report(config: Config, seen: Sequence[Seen], lines: Sequence[Line], out: Path, log: Log
                 ) -> None:
    """Files into a folder, which is made; the table line by line to `say`."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / JSON, (json.dumps(as_json(config, lines), indent=1) + "\n").encode())
    write_atomically(out / ALL, json.dumps(coordinates(seen)).encode())
    figure = picture(lines, seen)
    figure.savefig(out / PICTURE, dpi=110)
    for line in table(lines):
        log(line)
    log(summary(lines))
    log(f"{out / PICTURE}, {out / JSON}; every coordinate: {out / ALL}")


def as_json(config: Config, lines: Sequence[Line]) -> dict[str, Any]:
    """What is not a number becomes null."""
    return {
        "config": asdict(config.model) | {"name": config.name, "strategy": config.train.strategy,
                                          "optim": asdict(config.optim)},
        "lines": [asdict(line) | {"slope": _number(line.slope), "good": line.good, "promised": line.promised and [
            _number(one) for one in line.promised]} for line in lines],
    }


def coordinates(seen: Sequence[Seen]) -> list[dict[str, Any]]:
    """Of every size: its model, what its optimizer holds, what every module gave at every look."""
    return [{"axis": one.size.axis, "value": one.size.value, "model": asdict(one.size.model), "groups": one.groups,
             "coordinates": one.coordinates} for one in seen]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summary(lines: Sequence[Line]) -> str:
    promised = [line for line in lines if line.promised is not None]
    parts = [(name, [line for line in promised if (line.quantity in MEASURED) is measured])
             for name, measured in (("measured slopes", True), ("powers in the optimizer", False))]
    return "; ".join(f"{sum(line.good for line in found)} of {len(found)} {name} are as promised"
                     for name, found in parts)


def table(lines: Iterable[Line]) -> Iterable[str]:
    """Slopes by axis, quantity and role; what is out of its band is marked. Of what is read off the optimizer, only
    what is wrong."""
    axis = ""
    for line in lines:
        if line.quantity not in MEASURED and line.good:
            continue
        if line.axis != axis:
            axis = line.axis
            yield ""
            yield f"{NAMES[axis]:<22}{'':<16}{'promised':>14}{'slope':>9}   from smallest to largest"
        promised = "-" if line.promised is None else "..".join(dict.fromkeys(f"{one:+.2f}" for one in line.promised))
        values = " ".join(f"{value:.3g}" for value in line.values)
        yield (f"  {line.role:<20}{WORDS[line.quantity]:<16}{promised:>14}{line.slope:>+9.2f}   {values}"
               f"{'' if line.good else '   <- OUT OF BAND'}")
    yield ""


def picture(lines: Sequence[Line], seen: Sequence[Seen]) -> Figure:
    """A row an axis; size, own move and move of every role over the axis, relative to the smallest."""
    matplotlib.use("Agg")
    axes = list(dict.fromkeys(line.axis for line in lines))
    figure = Figure(figsize=(17, 0.8 + 4.2 * len(axes)), layout="constrained")
    panels = figure.subplots(len(axes), len(MEASURED), squeeze=False)
    for row, axis in zip(panels, axes, strict=True):
        values = [one.size.value for one in seen if one.size.axis == axis]
        for panel, quantity in zip(row, MEASURED, strict=True):
            mine = [line for line in lines if line.axis == axis and line.quantity == quantity]
            _draw(panel, values, mine)
            panel.set(title=f"{WORDS[quantity]} over {NAMES[axis]}", xlabel=NAMES[axis])
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    return figure


def _draw(panel: Axes, values: Sequence[int], lines: Sequence[Line]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    for line in lines:
        relative = [one / line.values[0] for one in line.values]
        panel.plot(values, relative, marker="o", markersize=4, linestyle="-" if line.good else "--",
                   linewidth=1.2 if line.good else 2.2, color=COLOURS[line.role], alpha=0.9,
                   label=f"{line.role} {line.slope:+.2f}{'' if line.good else ', out'}")
    band = lines[0].band
    low, high = ([(one / values[0]) ** power for one in values] for power in (-band, band))
    panel.fill_between(values, low, high, color="grey", alpha=0.15, linewidth=0)
    panel.set_xticks(values, [str(one) for one in values])
    panel.set_ylabel("relative to the smallest")
    panel.minorticks_off()
