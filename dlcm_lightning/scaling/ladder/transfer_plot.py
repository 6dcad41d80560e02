"""The picture of a transfer: a panel for each sweep and variant, a line for each width, a star at each minimum.

What muP promises is that the stars of a panel stand above one another.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dlcm_lightning.scaling.ladder.transfer_result import Result
from dlcm_lightning.scaling.law.plots import COLOURS, DOTS_PER_INCH, STYLE


def draw(file: Path, result: Result) -> None:
    """Same data, same bytes."""
    panels = list(dict.fromkeys((one.sweep, one.variant) for one in result.curves))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 4.2 * columns, 0.8 + 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in axes[len(panels):]:
            panel.set_visible(False)
        for panel, (sweep, variant) in zip(axes, panels, strict=False):
            curves = [one for one in result.curves if (one.sweep, one.variant) == (sweep, variant)]
            for place, curve in enumerate(curves):
                colour = COLOURS[place % len(COLOURS)]
                measured = zip(curve.factors, curve.losses, curve.spreads, strict=True)
                points = [(factor, loss, spread or 0.0) for factor, loss, spread in measured
                          if loss is not None and math.isfinite(loss)]
                if not points:
                    continue
                x, y, error = zip(*points, strict=True)
                panel.errorbar(x, y, error if any(error) else None, marker="o", markersize=4, linewidth=1, color=colour,
                               label=f"{curve.width}, N = {curve.N:,}", capsize=2)
                if curve.minimum is not None and not curve.minimum.at_edge:
                    panel.plot(curve.minimum.factor, curve.minimum.loss, "*", color=colour, markersize=11)
            panel.set_xscale("log", base=2)
            panel.set_xticks(curves[0].factors, [f"{factor:g}" for factor in curves[0].factors])
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set(title=f"{sweep}, {variant}", xlabel="learning rates, times those of the first width",
                      ylabel="validation loss (nats a token)")
            panel.legend(fontsize=8)
        figure.suptitle(f"{result.study}: loss over learning rates; stars: minima")
        figure.savefig(file, dpi=DOTS_PER_INCH, metadata={"Software": None})
