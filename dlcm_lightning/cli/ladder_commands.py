"""`dlcm ladder run` and `dlcm ladder transfer`: what can be written after them, and what they do."""

from __future__ import annotations

import argparse
from typing import Any

from dlcm_lightning.cli.commands import load, log, log_all, need
from dlcm_lightning.cli.types import part, path
from dlcm_lightning.config import ConfigError


def add_study_commands(actions: Any) -> None:
    """actions: sub-commands of `dlcm ladder`."""
    command = actions.add_parser(
        "run", help="train the runs of a study and keep their table",
        description="Train every run of a study that is not finished, one at a time, and write the table that dlcm "
                    "ladder fit reads. Called again, it goes on; in a SLURM array each task does its part.")
    only = _add_study(command, "ladder_cpu")
    only.add_argument("--write", action="store_true",
                      help="write run files, those of decays once their runs are finished; say how SLURM trains them")
    only.add_argument("--table-only", action="store_true", help="collect what is finished, and train nothing")
    command.add_argument("--only", metavar="PATTERN", help="runs of these names, such as '*-R4-*'")
    command.add_argument("--task", type=part, metavar="i/n", help="part i of n, counted from 0, equal by FLOPs")
    command.set_defaults(run=ladder_run)
    command = actions.add_parser(
        "transfer", help="whether the best learning rates of one width are those of another",
        description="Search the learning rates of a small model, perturb them at larger widths, and report how far the "
                    "best ones move. Called again, it goes on.")
    only = _add_study(command, "lr_transfer_cpu")
    only.add_argument("--report-only", action="store_true", help="report on what is finished, and train nothing")
    command.add_argument("--task", type=part, metavar="i/n", help="part i of n of the sweeps, counted from 0")
    command.set_defaults(run=ladder_transfer)


def _add_study(command: argparse.ArgumentParser, shipped: str) -> Any:
    """The study, and the group of what is done instead of training it."""
    command.add_argument("study", metavar="STUDY.yaml", type=path, help=f"or the name of a shipped one: {shipped}")
    only = command.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="say what there is to do and what is done, and train nothing")
    return only


def ladder_run(arguments: argparse.Namespace) -> None:
    study = load("scaling.ladder.study_file", "read_study")(arguments.study)
    if study.table == "parquet":
        need("pandas", "table: parquet", "scaling")
        need("pyarrow", "table: parquet", "parquet")
        write_table = load("scaling.ladder.parquet_table", "write_parquet")
    else:
        write_table = load("scaling.ladder.table_file", "write_csv")
    runs = load("scaling.ladder.plan", "grid")(study)
    part = load("scaling.ladder.study_run", "this_part")(arguments.task)
    mine = load("scaling.ladder.study_run", "chosen")(runs, arguments.only, part)
    log_all(f"note: {line}" for line in load("scaling.ladder.study_run", "notes_of")(runs))
    if arguments.list:
        log_all(load("scaling.ladder.study_run", "overview")(study, mine))
    elif arguments.write:
        load("scaling.ladder.study_run", "write_for_slurm")(study, mine, log)
    elif arguments.table_only:
        file, rows = load("scaling.ladder.study_run", "Table")(study, runs, write_table, log).collect()
        log(f"{file} has {rows} rows" if rows else "no run is finished: there is no table")
    elif not load("scaling.ladder.study_run", "run_study")(study, runs, mine, write_table, log):
        raise SystemExit(1)


def ladder_transfer(arguments: argparse.Namespace) -> None:
    study = load("scaling.ladder.study_file", "read_study")(arguments.study)
    if study.transfer is None:
        raise ConfigError(f"transfer (in {arguments.study}): the study has no such section; write sweeps, or a proxy, "
                          "below transfer (docs/ladder.md), or call dlcm ladder run")
    need("matplotlib", "dlcm ladder transfer", "scaling")
    part = load("scaling.ladder.study_run", "this_part")(arguments.task)
    if arguments.list:
        log_all(load("scaling.ladder.transfer", "overview")(study, part))
    elif not load("scaling.ladder.transfer", "run_transfer")(study, part, log, train=not arguments.report_only):
        raise SystemExit(1)
