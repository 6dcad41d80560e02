"""A ladder that a CPU can train: `python -m benchmarks.ladder` trains what is not trained of the study `ladder_cpu`
(hours; interrupted, the same command goes on), fits the law to its table and draws it.

`--fit-only` takes the table of the last time, in a minute. The table is `benchmarks/results/ladder_cpu.csv`; constants,
errors, hardware and versions go to `benchmarks/results/ladder_cpu.json`, pictures to `docs/images/ladder-*.png`; the
page of the fit, with an interval for each constant, is printed. docs/scaling.md says what follows from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dlcm_lightning.scaling.ladder.plan import grid, study_folder
from dlcm_lightning.scaling.ladder.study_file import read_study
from dlcm_lightning.scaling.law.fit_table import Fitted, fit_table
from dlcm_lightning.training.device import choose_device, describe_hardware

STUDY = "ladder_cpu"
RESULTS = Path("benchmarks/results")
TABLE, SUMMARY = RESULTS / f"{STUDY}.csv", RESULTS / f"{STUDY}.json"
IMAGES = Path("docs/images")


def train() -> dict[str, Any]:
    """Trains the study, keeps its table, and says where it was trained."""
    subprocess.run([sys.executable, "-m", "dlcm_lightning", "ladder", "run", STUDY], check=True)
    study = read_study(STUDY)
    shutil.copyfile(study_folder(study) / "table.csv", TABLE)
    config = grid(study)[0].config
    return {"hardware": describe_hardware(config.train, choose_device()), "torch": torch.__version__,
            "lightning": version("lightning"), "python": platform.python_version()}


def last_rows() -> list[dict[str, Any]]:
    """Of each run: its last loss while the rate was held, and that after the decay."""
    found = []
    for run, rows in pd.read_csv(TABLE).groupby("run", sort=False):
        stable, decayed = (rows[rows["phase"] == phase].sort_values("tokens") for phase in ("stable", "decayed"))
        last = stable.iloc[-1]
        concept = last["kind"] == "dlcm"
        found.append({
            "run": run, "N": int(last["N"]), "P": float(last["P"]) if concept else None,
            "R": float(last["R"]) if concept else None, "flops": float(last["flops"]),
            "stable": float(last["loss"]), "decayed": float(decayed.iloc[-1]["loss"]),
            "seconds": float(decayed.iloc[-1]["seconds"])})
    return found


def summary(fitted: Fitted, trained: dict[str, Any]) -> dict[str, Any]:
    laws: dict[str, Any] = {}
    for name, law in (("dlcm", fitted.laws.concept), ("dense", fitted.laws.dense)):
        if law is not None:
            laws[name] = {"law": asdict(law.law), "intervals": law.intervals, "quality": law.quality}
    for name, decay in (("decay", fitted.laws.decay), ("dense_decay", fitted.laws.dense_decay)):
        if decay is not None:
            laws[name] = {"law": asdict(decay.law), "intervals": decay.intervals, "quality": decay.quality}
    return {"about": {"command": "python -m benchmarks.ladder", "trained": trained,
                      "fitted": {name: version(name) for name in ("numpy", "scipy", "pandas")}},
            "fit": fitted.laws.origin, "runs": last_rows(), **laws, "notes": list(fitted.notes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-only", action="store_true", help="take the table that is there, and train nothing")
    arguments = parser.parse_args()
    trained = json.loads(SUMMARY.read_text())["about"]["trained"] if arguments.fit_only else train()
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit_table(TABLE, Path(folder), log=print)
        for file in fitted.files:
            if file.suffix == ".png":
                shutil.copyfile(file, IMAGES / f"ladder-{file.name}")
        page = (Path(folder) / "fit.md").read_text()
    SUMMARY.write_text(json.dumps(summary(fitted, trained), indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
