"""What a run came to: one table for people, one file for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.config import Config
from dlcm_lightning.data.ngram import NgramBaseline
from dlcm_lightning.run_directory import REPORT_FILE
from dlcm_lightning.training.metrics.table import validation_table
from dlcm_lightning.training.speed import Speed


@dataclass(frozen=True)
class Report:
    """The end of a run."""

    steps: int
    tokens: int
    hardware: str
    precision: str
    attention: str
    parameters: int
    validation: dict[str, Any]
    """Metrics of all domains, and of each under "domains"."""
    baselines: list[NgramBaseline]
    speed: Speed | None

    def save(self, run: Path) -> None:
        write_atomically(run / REPORT_FILE, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(run: Path) -> Report | None:
        """The report of a finished run, None where there is none."""
        file = run / REPORT_FILE
        if not file.is_file():
            return None
        try:
            fields = json.loads(file.read_text())
            counted = fields.pop("floors", None) or fields.get("baselines", [])  # as it was once called
            fields["baselines"] = [NgramBaseline(**one) for one in counted]
            fields["speed"] = Speed(**fields["speed"]) if fields["speed"] else None
            return Report(**fields)
        except (ValueError, TypeError, KeyError):  # of another version, or edited: the run makes it again
            return None


def summary(config: Config, report: Report) -> str:
    """The table, the speed, and where to go from here."""
    run = Path(config.train.output_dir) / config.name
    parts = ["", validation_table(report.validation, report.baselines), ""]
    parts.append(f"{report.steps} steps, {report.tokens:,} tokens, {report.parameters:,} parameters, "
                 f"{report.precision}, attention {report.attention}, {report.hardware}")
    if report.speed:
        pace = report.speed
        parts.append(f"{pace.tokens_per_second:,.0f} tokens/s x {pace.flops_per_token / 1e6:.1f} MFLOP/token = "
                     f"{100 * pace.share:.0f} % of this machine's matrix-product rate "
                     f"({pace.matrix_product_rate / 1e9:,.0f} GFLOP/s)"
                     + (f", MFU {100 * pace.mfu:.1f} %" if pace.mfu is not None else "")
                     + f"; waiting for data {100 * pace.data_wait:.2f} %")
    parts += [
        f"run directory   {run}",
        "resume          the same command again; a finished run is left as it is",
        f"watch           make tensorboard   (tensorboard --logdir {config.train.output_dir})",
    ]
    return "\n".join(parts)
