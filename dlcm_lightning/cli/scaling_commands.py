"""`dlcm plan`: what can be written after it, and what it does."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from dlcm_lightning.cli.commands import load, load_config, log, log_all
from dlcm_lightning.cli.types import path, real, whole
from dlcm_lightning.config import ConfigError
from dlcm_lightning.config.checks import LARGEST_COUNT

LIKE = "dlcm_2b_1t"
OPTIONS = ("flops", "gpus", "days", "params", "tokens", "tokens_per_parameter", "like", "ratio", "backbone_share",
           "law", "extrapolation", "peak_tflops", "mfu", "measured", "gpus_per_node", "gpu_gigabytes",
           "document_tokens", "name", "out")
"""Of `dlcm plan`, as they are written into a run file."""


def add_plan(command: argparse.ArgumentParser) -> None:
    budget = command.add_argument_group("what for: one of them (--params with --gpus and --days: tokens follow)")
    budget.add_argument("--flops", type=real(1, 1e30), help="training FLOPs of the whole run")
    budget.add_argument("--gpus", type=whole(1, 2**24), help="of the run; with --days, a budget")
    budget.add_argument("--days", type=real(1e-6, 1e5), help="that they compute")
    budget.add_argument("--params", type=real(1, 1e15), help="N, parameters outside the embeddings")
    budget.add_argument("--tokens", type=real(1, LARGEST_COUNT), help="with --params")
    budget.add_argument("--tokens-per-parameter", type=real(1e-6, 1e9), help="where no law chooses (20, a convention)")
    model = command.add_argument_group("the model")
    model.add_argument("--like", metavar="RUN_FILE", type=path,
                       help=f"run file, or the name of a shipped one, that all else is taken from ({LIKE})")
    model.add_argument("--ratio", type=real(1.01, 2**20), help="R, tokens per concept (by the law, or as --like)")
    model.add_argument("--backbone-share", type=real(0.01, 0.99),
                       help="P, the backbone's share of the stacks (by the law, or as --like)")
    model.add_argument("--law", metavar="law.json", type=path, help="that dlcm ladder fit wrote")
    model.add_argument("--extrapolation", type=real(1, 1e6),
                       help="factor outside of what the law has seen that is allowed (the law's own)")
    machine = command.add_argument_group("the machine")
    machine.add_argument("--peak-tflops", type=real(0.001, 1e6), help="dense bf16 peak of a GPU (989, an H100)")
    machine.add_argument("--mfu", type=real(0.0001, 1), help="share of the peak that training reaches (0.4)")
    machine.add_argument("--measured", metavar="RUN_OR_JSON", type=path, help="take the MFU that a run, or a file of "
                                                                             "benchmarks/results, has measured")
    machine.add_argument("--gpus-per-node", type=whole(1, 1024), help="(8)")
    machine.add_argument("--gpu-gigabytes", type=real(0.001, 1e6), help="memory of a GPU (80)")
    machine.add_argument("--document-tokens", type=real(1, 1e12),
                         help="mean length of documents by tokens (a whole row)")
    command.add_argument("--out", metavar="FILE.yaml", type=path, help="run file to write")
    command.add_argument("--name", help="of the run (that of --out)")
    command.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> None:
    like_name = arguments.like or LIKE
    like = load_config(like_name, [])
    laws = load("scaling.law.formula", "LadderLaws").read(Path(arguments.law)) if arguments.law else None
    out = Path(arguments.out) if arguments.out else None
    found = load("scaling.plan.plan", "plan")(_request(arguments), like, laws,
                                              arguments.name or (out.stem if out else "plan"))
    if out is not None:
        like_file = load("shipped", "find")(like_name, "configs/run")
        load("scaling.plan.run_file", "write_run_file")(found, like_file, _command(arguments), out)
    log_all(load("scaling.plan.report", "report")(found))
    shape = f"--nodes {found.hardware.nodes} --gpus-per-node {found.hardware.gpus_per_node}"
    log("\n--out FILE.yaml writes it as a run file" if out is None else
         f"\n{out} is a run file; dlcm estimate {out} {shape} --dry-run, then dlcm pretrain {out}")


def _request(arguments: argparse.Namespace) -> Any:
    names = ("flops", "gpus", "days", "params", "tokens", "tokens_per_parameter", "ratio", "backbone_share",
             "extrapolation", "document_tokens", "gpus_per_node", "mfu")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.gpu_gigabytes is not None:
        given["gpu_bytes"] = arguments.gpu_gigabytes * 1e9
    if arguments.peak_tflops is not None:
        given["peak_flops"] = arguments.peak_tflops * 1e12
    if arguments.measured is not None:
        if arguments.mfu is not None:
            raise ConfigError(f"--mfu {arguments.mfu:g} and --measured {arguments.measured}: give one of them")
        given["mfu"] = load("scaling.plan.measured", "measured_mfu")(arguments.measured)
        given["mfu_origin"] = f"measured, {arguments.measured}"
    return load("scaling.plan.request", "Request")(**given)


def _command(arguments: argparse.Namespace) -> str:
    """The line that was typed, with options in a fixed order."""
    words = ["dlcm", "plan"]
    for name in OPTIONS:
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", f"{value:.12g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
