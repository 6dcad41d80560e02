"""A measured share of the peak (model FLOPs utilisation), in place of a stated one.

It is there where a GPU of a known peak was: in the lines of metrics.jsonl of a run, as `mfu`, and in the results of
`python -m benchmarks.step`. Of a run, the middle of the last half of its lines counts: its beginning compiles, and cuts
the text into more concepts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.run_directory import METRICS_FILE


def measured_mfu(place: str) -> float:
    """place: directory of a run, or a file of benchmarks/results. ConfigError: it holds no MFU, or cannot be read."""
    path = Path(place)
    try:
        if path.is_dir():
            values = list(_of_lines((path / METRICS_FILE).read_text(encoding="utf-8")))
            values = values[len(values) // 2:]
        else:
            values = list(_of_result(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"--measured {place}: cannot be read ({error}); name the directory of a run, or a file such "
                          "as benchmarks/results/h200.json") from error
    values = [value for value in values if 0 < value <= 1]
    if not values:
        raise ConfigError(f"--measured {place}: holds no mfu, which is only measured on a GPU whose peak is known; "
                          "state one with --mfu 0.4")
    return statistics.median(values)


def _of_lines(text: str) -> Iterator[float]:
    for line in text.splitlines():
        yield from _number(json.loads(line))


def _of_result(content: Any) -> Iterator[float]:
    """Of a file of one result, or of its section `step`."""
    if isinstance(content, dict):
        yield from _number(content) or _number(content.get("step"))


def _number(content: Any) -> list[float]:
    value = content.get("mfu") if isinstance(content, dict) else None
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
