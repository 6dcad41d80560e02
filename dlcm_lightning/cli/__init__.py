"""The `dlcm` command: a thin front of the package, one function a sub-command.

Arguments are parsed, and a configuration is composed and checked, before torch is loaded; whatever the user can mend
is answered with one line on standard error and exit code 2, not with a traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dlcm_lightning.cli.arguments import parser
from dlcm_lightning.cli.types import QUICKSTART, is_override
from dlcm_lightning.cluster.attempts import this_attempt
from dlcm_lightning.cluster.launch import leave
from dlcm_lightning.data.inspection.table import escape_control_characters
from dlcm_lightning.errors import DONE, FAILED, INTERRUPTED, STOPPED, USER_ERROR, Stopped, UserError

CONTINUED = ("pretrain", "job", "prepare", "tokenize", "data", "verify-resume", "submit", "anneal", "ladder")
"""Commands that go on where they were interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; errors.py has them all."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and not ("overrides" in arguments and all("=" in one and not one.startswith("-") for one in rest)):
        parser().parse_args(argv)  # says which arguments nobody knows
    elif rest:
        arguments.overrides += rest  # field=value after an option
    if "run_file" in arguments:
        if is_override(arguments.config) or (arguments.run_file and arguments.config != QUICKSTART):
            arguments.overrides.insert(0, arguments.config)  # it only stands in the place of a run file
            arguments.config = QUICKSTART
        arguments.config = arguments.run_file or arguments.config
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted" + "; the same command continues" * (arguments.command in CONTINUED), file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"dlcm: {_rank()}{escape_control_characters(str(error))}", file=sys.stderr)
        if not isinstance(error, Stopped):
            return USER_ERROR
        # A job reads how its run left; another code would end the ranks that are still leaving.
        return DONE if this_attempt() is not None else STOPPED
    return DONE


def _rank() -> str:
    """Whose words these are, where several processes share a terminal."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    return f"rank {rank}: " if rank and size != "1" else ""


def entry() -> NoReturn:
    """The command as a process."""
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the number of concepts, and sizes with it, changes with every batch
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "0"  # NVIDIA's containers have torch take TF32 for fp32
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = FAILED
    leave(code)
