"""Which fields say what a run computes, and which where and how it is trained: two configurations that differ in the
latter alone are one run.

Which rows can be read may differ, which rows there are may not; how a step is split may, as long as the rule for F
stays what it was.
"""

from __future__ import annotations

FREE = ("name", "data.root", "data.workers", "data.cache_megabytes", "data.read_ahead_steps", "data.unreadable",
        "data.max_unreadable", "data.micro_batch_size", "model.boundary.previous_rate")
FREE_SECTIONS = ("train.", "job.")
BOUND = ("train.precision", "train.compile")
"""Of these sections."""


def may_differ(name: str) -> bool:
    """Whether a field, named as in `compose.differences`, says nothing of what is computed."""
    return name in FREE or (name.startswith(FREE_SECTIONS) and name not in BOUND)
