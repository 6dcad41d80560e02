"""The pictures of a fitted ladder, each as PNG and SVG.

One colour is one R in all of them, from a palette that colour-blind readers tell apart (Okabe and Ito). Bands are 95 %
intervals of the law by the bootstrap; what lies right of the dotted line is dearer than any run of the ladder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from dlcm_lightning.scaling.law.compute import BestRatio, Savings, at_fixed_flops, evaluate
from dlcm_lightning.scaling.law.formula import FittedLaw
from dlcm_lightning.scaling.law.table import Run, sizes_of

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DENSE = "#555555"
DOTS_PER_INCH = 150
NAMES = ("trajectories-dlcm", "trajectories-dense", "loss-over-share", "savings", "best-ratio")
SUFFIXES = ("png", "svg")
MOST_SAVED = (-100, 100)
"""Percent, the axis of savings: wider intervals leave it."""
STYLE: Any = {"font.size": 10.0, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False, "svg.hashsalt": "dlcm"}


def _drawn(out: Path, name: str, width: float, height: float, draw: Callable[[Figure], None]) -> list[Path]:
    """Same data, same bytes: neither dates nor random ids are written. name: one of `NAMES`."""
    assert name in NAMES
    files = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        for suffix, metadata in zip(SUFFIXES, ({"Software": None}, {"Date": None}), strict=True):
            files.append(out / f"{name}.{suffix}")
            figure.savefig(files[-1], dpi=DOTS_PER_INCH, metadata=metadata)
    return files


def _parameters(N: float) -> str:
    """Of parameters or tokens: 98 k, 833 M, 1.3 B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= N:
            return f"{N / unit:.3g} {letter}"
    return f"{N:.3g}"


def trajectories(out: Path, runs: Sequence[Run], law: FittedLaw, skip: float) -> list[Path]:
    """Measured losses as points and the law as lines, a panel a size; hollow points were not fitted."""
    sizes = sizes_of(runs)
    ratios, shares = sorted({run.R_target for run in runs}), sorted({run.P for run in runs})
    dense = runs[0].kind == "dense"

    def draw(figure: Figure) -> None:
        columns = min(2, len(sizes))
        panels = figure.subplots(-(-len(sizes) // columns), columns, squeeze=False).ravel()
        for panel in panels[len(sizes):]:
            panel.set_visible(False)
        for panel, group in zip(panels, sizes, strict=False):
            for run in group:
                colour = DENSE if dense else COLOURS[ratios.index(run.R_target) % len(COLOURS)]
                marker = MARKERS[shares.index(run.P) % len(MARKERS)]
                fitted = run.tokens >= skip * run.tokens[-1]
                panel.plot(run.tokens[fitted], run.loss[fitted], marker, color=colour, markersize=3, alpha=0.7)
                panel.plot(run.tokens[~fitted], run.loss[~fitted], marker, color=colour, markersize=3, fillstyle="none")
                line = np.geomspace(run.tokens[0], run.tokens[-1], 60)
                ones = np.ones_like(line)
                panel.plot(line, evaluate(law.law, run.N * ones, line, run.R * ones, run.P * ones), color=colour,
                           linewidth=0.9)
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter(lambda value, _: _parameters(value))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set( title=f"N = {_parameters(group[0].N)}", xlabel="training tokens D",
                      ylabel="validation loss (nats a token)")
            if fitted_losses := [one for run in group for one in run.loss[run.tokens >= 2 * skip * run.tokens[-1]]]:
                low, high = min(fitted_losses), max(fitted_losses)
                panel.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        figure.suptitle(f"{'Dense' if dense else 'DLCM'} ladder: measured (points) and the fitted law (lines)")
        if not dense:
            handles = [Line2D([], [], color=COLOURS[place % len(COLOURS)], label=f"R = {R:g}")
                       for place, R in enumerate(ratios)]
            handles += [Line2D([], [], color="black", linestyle="", marker=MARKERS[place % len(MARKERS)], markersize=4,
                               label=f"P = {100 * P:.0f} %") for place, P in enumerate(shares)]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))

    rows = -(-len(sizes) // 2)
    return _drawn(out, f"trajectories-{'dense' if dense else 'dlcm'}", 9, 1.2 + 3.3 * rows, draw)


def loss_over_share(out: Path, law: FittedLaw, dense: FittedLaw | None, flops: float, tokens: float,
                    ratios: Sequence[float]) -> list[Path]:
    """Fig. 6a: the law over P at fixed FLOPs and tokens, a line for each R; a dot marks the best P."""
    P = np.linspace(law.seen["P"].low, law.seen["P"].high, 81)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, R in enumerate(ratios):
            colour = COLOURS[place % len(COLOURS)]
            N, loss = at_fixed_flops(law, flops, tokens, P, R)
            axes.plot(100 * P, loss, color=colour, label=f"R = {R:g}")
            if law.samples:
                drawn = np.stack([evaluate(one, N, np.full_like(N, tokens), np.full_like(N, R), P)
                                  for one in law.samples])
                low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
                axes.fill_between(100 * P, np.where(np.isnan(loss), np.nan, low), high, color=colour, alpha=0.18,
                                  linewidth=0)
            if np.isfinite(loss).any():
                best = int(np.nanargmin(loss))
                axes.plot(100 * P[best], loss[best], "o", color=colour, markersize=6)
        if dense is not None:
            same = flops / 6 / tokens
            axes.axhline(dense.predict(same, tokens, extrapolation=np.inf).loss, color=DENSE, linestyle="--",
                         linewidth=1.2, label=f"dense, N = {_parameters(same)}")
        axes.set(xlabel="P, the backbone's share of non-embedding parameters (%)", ylabel="loss (nats a token)",
                 title=f"Loss over P at {flops:.2g} FLOPs and {_parameters(tokens)} tokens (as Fig. 6a)")
        axes.legend()

    return _drawn(out, "loss-over-share", 7, 4.6, draw)


def _compute_axis(axes: Axes, dearest: float) -> None:
    axes.axvline(dearest, color="black", linestyle=":", linewidth=1, label="dearest run of the ladder")
    axes.set(xscale="log", xlabel="training FLOPs of the body")


def savings_over_compute(out: Path, found: Sequence[Savings], dearest: float) -> list[Path]:
    """Fig. 6b: FLOPs saved against compute-optimal dense models of the same loss, a panel an R."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(found), squeeze=False, sharey=True).ravel()
        for place, (axes, one) in enumerate(zip(panels, found, strict=True)):
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(one.flops, 100 * one.share, color=colour)
            axes.fill_between(one.flops, 100 * one.low, 100 * one.high, color=colour, alpha=0.18, linewidth=0)
            axes.axhline(0, color=DENSE, linestyle="--", linewidth=1.2, label="dense")
            _compute_axis(axes, dearest)
            axes.set_title(f"R = {one.R:g}")
        panels[0].set(ylabel="FLOPs saved at equal loss (%)", ylim=MOST_SAVED)
        panels[-1].legend(loc="lower right")
        figure.suptitle("FLOPs that a compute-optimal DLCM saves against dense (as Fig. 6b); band: 95 % interval")

    return _drawn(out, "savings", 1.5 + 3.2 * len(found), 4.2, draw)


def best_ratio_over_compute(out: Path, found: BestRatio, dearest: float) -> list[Path]:
    """The best R by compute. Hollow where it is the least or the largest R of the ladder: a bound, no optimum."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.fill_between(found.flops, found.low, found.high, color=COLOURS[0], alpha=0.18, linewidth=0,
                          label="95 % interval")
        axes.plot(found.flops, found.R, color=COLOURS[0])
        inside = ~found.at_edge
        axes.plot(found.flops[inside], found.R[inside], "o", color=COLOURS[0], markersize=5, label="best R")
        axes.plot(found.flops[~inside], found.R[~inside], "o", color=COLOURS[0], markersize=5, fillstyle="none",
                  label="at the end of what was trained")
        _compute_axis(axes, dearest)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.5)))
        axes.set_ylim(found.ratios[0] * 0.9, found.ratios[1] * 1.1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(ylabel="tokens per concept R", title="The best R by compute, N, D and P at their best")
        axes.legend()

    return _drawn(out, "best-ratio", 7, 4.6, draw)
