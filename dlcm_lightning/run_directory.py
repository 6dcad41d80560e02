"""Where things stand in a run's directory: names only, standard library only.

    <train.output_dir>/<name>/
        config.yaml       the resolved configuration
        tokenizer.json    what `dlcm export` gives with the model
        checkpoints/      step-NNNNNNNN/: see checkpoint/folder.py; each carries the configuration that wrote it
        metrics.jsonl     one line per logged step and per validation
        events.out.*      the same for TensorBoard, on an axis of consumed tokens; histograms; boundaries as text
        boundaries.html   fixed validation documents, cut into concepts
        report.json       the table at the end
        evaluation-STEP.json                        what `dlcm evaluate` found, see training/evaluate.py
        tasks-STEP/                                 and with --tasks, see evaluation/tasks/evaluate.py
        analysis-STEP.html, .json, analysis-STEP/   what `dlcm analyze` found: page, numbers, TensorBoard events
        logs/             on a cluster: rank-00000.log of every rank, over all attempts
        jobs/             on a cluster: what each submission was and came to, see cluster/attempts.py
        STOP              made by anyone: the run saves and ends, and no job starts it again while it is there
"""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
CHECKPOINTS = "checkpoints"
COMPLETE = "step-"
UNFINISHED = ".unfinished-"
LOGS = "logs"
JOBS = "jobs"
STOP = "STOP"


def unfinished(run: Path, step: int) -> Path:
    """Where the files of a checkpoint are written before they count."""
    return run / CHECKPOINTS / f"{UNFINISHED}{step}"


def finished(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / CHECKPOINTS / f"{COMPLETE}{step:08d}"


def folders(run: Path) -> list[Path]:
    """Of complete checkpoints, oldest first."""
    return sorted(folder for folder in (run / CHECKPOINTS).glob(f"{COMPLETE}*") if folder.is_dir())


def newest_step(run: Path) -> int:
    """Optimizer steps that the newest complete checkpoint has, 0 where there is none."""
    found = folders(run)
    return int(found[-1].name.removeprefix(COMPLETE)) if found else 0
