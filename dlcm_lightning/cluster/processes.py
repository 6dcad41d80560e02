"""Which process of a run this is, known before any of them speak to each other; and how it ends."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

RANK_NAMES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_NAMES)


def leave(code: int) -> NoReturn:
    """Ends this process, and does not wait until the interpreter is taken down where torch was loaded: threads of its
    collectives may ask for the interpreter meanwhile, which Python 3.11 answers with an abort of the process, now and
    then (2 of some 40 ends in one test run)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)
