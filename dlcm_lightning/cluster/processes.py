"""Which process of a run this is, known before any of them speak to each other."""

from __future__ import annotations

import os

RANK_NAMES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")


def first_process() -> bool:
    """Whether this process is the one that writes and speaks."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_NAMES)
