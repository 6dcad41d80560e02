"""`dlcm mup check`, `dlcm anneal` and `dlcm merge`: what can be written after them, and what they do."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dlcm_lightning.cli.commands import load, load_config, log, need
from dlcm_lightning.cli.types import add_run_file, path, whole
from dlcm_lightning.cluster.signals import print_stacks_when_asked
from dlcm_lightning.config import ConfigError
from dlcm_lightning.config.checks import LARGEST_COUNT

TOKENS = LARGEST_COUNT


def add_tuning(subcommands: Any) -> None:
    mup = subcommands.add_parser("mup", help="whether learning rates carry over to other widths",
                                 description="What can be asked of muP.")
    command = mup.add_subparsers(dest="action", required=True).add_parser(
        "check", help="coordinates over width and depth, in the first steps of small runs",
        description="Train small models of a configuration's proportions for a few steps, at four widths of the tokens,"
                    " four of the concepts and four depths; say how sizes and moves of activations grow, draw them, and"
                    " end with 1 where something is not as muP promises.")
    add_run_file(command)
    command.add_argument("--out", metavar="DIR", type=path, help="folder to write (mup-check/NAME of the run)")
    command.add_argument("--axes", nargs="+", default=[], choices=("token", "concept", "depth"),
                         help="look along these only")
    command.add_argument("--steps", type=whole(1, 1000), help="of a size (5)")
    command.add_argument("--least-width", type=whole(1, 2**20), help="smallest of the four widths (64, or what heads "
                                                                     "allow); the largest is eight times that")
    command.set_defaults(run=check_mup)
    command = subcommands.add_parser(
        "anneal", help="a decay of the learning rate that branches off a warm-up-stable run",
        description="Make a run that begins with a checkpoint of another and decays its learning rate, and train it. "
                    "Called again, it goes on.")
    command.add_argument("run_folder", metavar="RUN", type=path, help="directory of the trunk, such as runs/trunk")
    command.add_argument("--over", type=whole(1, TOKENS), required=True, metavar="TOKENS", help="length of the decay")
    command.add_argument("--at", type=whole(1, TOKENS), required=True, metavar="TOKENS", help="of a kept checkpoint")
    command.add_argument("--name", default="", help="of the branch (RUN-anneal-TOKENS)")
    command.add_argument("--only-make", action="store_true", help="train nothing, and say what trains it")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as optim.final_fraction=0")
    command.set_defaults(run=anneal)
    command = subcommands.add_parser(
        "merge", help="the mean of several checkpoints, as an exported model",
        description="Average the weights of checkpoints of one run: what a decay would reach, without training.")
    command.add_argument("run_folder", metavar="RUN", type=path, help="directory of a run, such as runs/trunk")
    command.add_argument("out", metavar="OUT", type=path, help="folder to write; must not exist")
    command.add_argument("--last", type=whole(2, 10**6), metavar="K", help="so many of the newest that are kept")
    command.add_argument("--steps", type=whole(0, LARGEST_COUNT), nargs="+", default=[], metavar="STEP",
                         help="or those of these optimizer steps")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrices (fp32)")
    command.set_defaults(run=merge)


def check_mup(arguments: argparse.Namespace) -> None:
    need("matplotlib", "dlcm mup check", "scaling")
    if arguments.least_width is not None and arguments.axes == ["depth"]:
        raise ConfigError(f"--least-width {arguments.least_width}: depth has none; leave it out, or look along widths")
    config = load_config(arguments.config, arguments.overrides)
    given = {name: value for name in ("steps", "least_width") if (value := getattr(arguments, name)) is not None}
    out = Path(arguments.out or Path("mup-check") / config.name)
    if not load("training.mup_check.check", "check_mup")(config, out, log, axes=arguments.axes, **given):
        raise SystemExit(1)


def anneal(arguments: argparse.Namespace) -> None:
    print_stacks_when_asked()
    run = Path(arguments.run_folder)
    config, step = load("training.anneal", "branch_config")(
        run, arguments.at, arguments.over, arguments.name, arguments.overrides)
    if arguments.only_make or load("cluster.world", "world_of")(config.train).rank == 0:
        into = load("training.anneal", "branch")(run, config, step)
        log(f"{into} branches off {run} at {step * config.data.tokens_per_step:,} tokens, and decays to "
             f"{config.optim.total_tokens:,}")
        if arguments.only_make:
            log(f"dlcm pretrain {into}/config.yaml")
    if not arguments.only_make:
        load("training.run", "pretrain")(config)


def merge(arguments: argparse.Namespace) -> None:
    if arguments.last is None and len(arguments.steps) == 1:
        raise ConfigError(f"--steps {arguments.steps[0]}: a mean wants two or more; dlcm export writes one")
    merged = load("export.merge", "merge_checkpoints")(
        Path(arguments.run_folder), Path(arguments.out), last=arguments.last, steps=arguments.steps,
        dtype=arguments.dtype)
    steps = ", ".join(map(str, merged.merged))
    log(f"{arguments.out} holds the mean of the checkpoints of steps {steps}; loss on the probe text "
         f"{merged.fingerprint.loss:.4f}")
