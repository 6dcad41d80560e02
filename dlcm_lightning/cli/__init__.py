"""The `dlcm` command: a thin front of the package, one function a sub-command.

Arguments are parsed, and a configuration is composed and checked, before torch is loaded; whatever the user can mend
is answered with one line and exit code 2, not with a traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dlcm_lightning.cli.arguments import QUICKSTART, parser
from dlcm_lightning.cli.commands import load
from dlcm_lightning.cluster.lives import this_life
from dlcm_lightning.cluster.processes import first_process, leave
from dlcm_lightning.config import ConfigError
from dlcm_lightning.data.looking.table import harmless

MENDABLE = ("ConfigError", "DataError", "CheckpointError", "RunError")
"""Errors whose message is written for the user."""
STOPPED = "Stopped"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a proof that failed, 2 something the user can mend, 75 stopped when asked, 130
    interrupted."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and not ("overrides" in arguments and all("=" in one and not one.startswith("-") for one in rest)):
        parser().parse_args(argv)  # says which arguments nobody knows
    elif rest:
        arguments.overrides += rest  # field=value behind an option
    if "run_file" in arguments and arguments.run_file:
        if arguments.config != QUICKSTART:  # what stands in the place of a run file is an override then
            arguments.overrides.insert(0, arguments.config)
        arguments.config = arguments.run_file
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        stopped = type(error).__name__ == STOPPED
        if not stopped and not isinstance(error, ConfigError) and type(error).__name__ not in MENDABLE:
            raise
        if first_process():  # an error of one process is an error of all
            print(f"dlcm: {harmless(str(error))}", file=sys.stderr)
        if stopped and this_life() is not None:
            return 0  # a job reads how its run left; another code would end the ranks that are still leaving
        return load("training.callbacks.checkpoint", "STOPPED_CODE") if stopped else 2
    return 0


def entry() -> NoReturn:
    """The command as a process."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
