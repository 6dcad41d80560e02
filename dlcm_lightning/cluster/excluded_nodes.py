"""Nodes that a chain of jobs does without, and the evidence against each: `excluded.json` in a submission's folder.

A node is left out where it was found bad in two looks in a row (checks.py), for `job.exclude_hours`. Nodes that a
person has excluded are that person's, and stay out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dlcm_lightning.atomic_io import write_atomically

EXCLUDED = "excluded.json"


@dataclass(frozen=True)
class Exclusion:
    """One node."""

    node: str
    since: float
    """Seconds since 1970."""
    evidence: list[str]
    """What was found, a line a look."""

    def holds(self, now: float, hours: float) -> bool:
        return hours == 0 or now < self.since + 3600 * hours


def load_exclusions(folder: Path) -> list[Exclusion]:
    """All there ever were, oldest first."""
    file = folder / EXCLUDED
    return [Exclusion(**one) for one in json.loads(file.read_text())] if file.is_file() else []


def record_exclusions(folder: Path, bad: Mapping[str, Sequence[str]], now: float) -> None:
    """bad: nodes, and the evidence against them."""
    found = [*load_exclusions(folder), *(Exclusion(node, now, list(evidence)) for node, evidence in bad.items())]
    write_atomically(folder / EXCLUDED, (json.dumps([asdict(one) for one in found], indent=1) + "\n").encode())


def to_leave_out(folder: Path, given: Iterable[str], now: float | None = None, hours: float = 0) -> list[str]:
    """Nodes that the next attempt does without. given: those that this one did without; what is not in the record among
    them a person has excluded."""
    record = load_exclusions(folder)
    moment = time.time() if now is None else now
    ours = {one.node for one in record}
    held = [one.node for one in record if one.holds(moment, hours)]
    return list(dict.fromkeys([*(node for node in given if node not in ours), *held]))
