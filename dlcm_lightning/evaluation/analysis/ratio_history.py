"""Tokens per concept over training (the paper's Fig. 8), from the lines that the run wrote to metrics.jsonl.

R sampled is what the rate loss steers; R thresholded is what inference gets. The band is the target and a tenth of it
on either side. Long histories are drawn in at most POINTS windows; a window's R is tokens over concepts, hence the
harmonic mean of its lines.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlcm_lightning.evaluation.analysis.absent import absent
from dlcm_lightning.run_directory import METRICS_FILE

NAMES = ("R_sampled", "R_thresholded")
BAND = 0.1
"""Share of the target."""
POINTS = 200


def ratio_history(folder: Path | None, target: float, until: int) -> dict[str, Any]:
    """folder: of the run; None for an export. until: the step that is looked at."""
    if folder is None:
        return absent("an export carries no metrics; name the directory of the run to see them")
    lines = [line for line in read_metrics(folder / METRICS_FILE)
             if line.get("kind") == "train" and "R_sampled" in line and line["step"] <= until]
    if not lines:
        return absent(f"{folder / METRICS_FILE} holds no line of training with R; the file is written while the run "
                      "trains")
    size = -(-len(lines) // POINTS)
    windows = [lines[begin:begin + size] for begin in range(0, len(lines), size)]
    domains = list(dict.fromkeys(domain for line in lines for domain in line.get("domains", {})))
    return {"target": target, "low": target * (1 - BAND), "high": target * (1 + BAND),
            "lines": len(lines), "lines_per_point": size,
            "steps": [window[-1]["step"] for window in windows], "tokens": [window[-1]["tokens"] for window in windows],
            "all": {name: [_harmonic([line.get(name) for line in window]) for window in windows] for name in NAMES},
            "domains": {domain: {name: [_harmonic([line.get("domains", {}).get(domain, {}).get(name)
                                                   for line in window]) for window in windows] for name in NAMES}
                        for domain in domains}}


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Its lines; a half-written one and what is no line of metrics are passed over."""
    found = []
    try:
        content = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in content.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict) and {"step", "tokens"} <= read.keys():
            found.append(read)
    return found


def _harmonic(values: Sequence[Any]) -> float | None:
    """None where no value is a positive number, as of a domain that had no tokens."""
    kept = [one for one in values if isinstance(one, int | float) and 0 < one < float("inf")]
    return len(kept) / sum(1 / one for one in kept) if kept else None
