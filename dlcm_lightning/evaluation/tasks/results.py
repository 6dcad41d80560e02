"""The table of an evaluation: what the model scores, how sure that is, what guessing would score, and the paper's
numbers beside it. As plain text, Markdown, JSON and TensorBoard.

Everything is in percent. Standard errors are lm-eval's. Chance is the mean of one over the number of choices, over the
questions that were asked. An average is over tasks, each counted once, and the paper's columns are averaged over the
same tasks: over all twelve they come to 42.24 and 41.23, not to the 43.92 that the paper prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dlcm_lightning.evaluation.tasks.paper import BY_NAME, PRINTED_AVERAGE, averages

METRICS = ("acc", "acc_norm")
NOTE = (f"The paper does not say which metric it prints; acc is compared. Its own twelve numbers average 42.24 (DLCM) "
        f"and 41.23 (baseline), a gain of 1.01 points; it prints {PRINTED_AVERAGE} and 2.69.")


@dataclass(frozen=True)
class Line:
    """Of a task, or of the average over all."""

    name: str
    title: str
    items: int
    """Questions that were asked."""
    split: str
    """Which of the task's splits they are of; empty for the average."""
    scores: dict[str, tuple[float, float | None]]
    """Percent and standard error of each metric that lm-eval gives the task."""
    chance: float | None
    """Percent; None where questions have no choices."""
    dlcm: float | None
    baseline: float | None
    """Percent, the paper's; None for tasks that are not in it."""


def lines_of(results: dict[str, Any], names: Sequence[str], splits: dict[str, str]) -> list[Line]:
    """results: lm-eval's, with samples. names: tasks and groups, in the order asked. splits: by name."""
    lines = [_line(results, name, splits.get(name, "")) for name in names]
    return [*lines, _average(lines)] if len(lines) > 1 else lines


def _line(results: dict[str, Any], name: str, split: str) -> Line:
    found = {**results["results"], **results.get("groups", {})}[name]
    leaves = _leaves(results, name)
    samples = {(leaf, sample["doc_id"]): sample for leaf in leaves for sample in results["samples"].get(leaf, [])}
    scores: dict[str, tuple[float, float | None]] = {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{filtered}")
        scale = 100 if metric in METRICS else 1
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        scores[label] = (scale * value, scale * error if isinstance(error, int | float) else None)
    choices = [_choices(results["configs"].get(leaf, {}), sample) for (leaf, _), sample in samples.items()]
    of_paper = BY_NAME.get(name)
    whole = "acc" in scores and bool(choices) and None not in choices
    chance = 100 * sum(1 / count for count in choices if count) / len(choices) if whole else None
    return Line(name, of_paper.title if of_paper else name, len(samples), split, scores, chance,
                of_paper.dlcm if of_paper else None, of_paper.baseline if of_paper else None)


def _leaves(results: dict[str, Any], name: str) -> list[str]:
    """The tasks of a group of tasks or groups; a task itself."""
    members = results.get("group_subtasks", {}).get(name)
    return [leaf for member in members for leaf in _leaves(results, member)] if members else [name]


def _choices(config: dict[str, Any], sample: dict[str, Any]) -> int | None:
    """Answers that a question offers; None where there are none to choose from, or where a task rates in a way of its
    own."""
    if config.get("output_type") != "multiple_choice" or config.get("process_results"):
        return None
    asked = len(sample["arguments"])
    return asked // 2 if "acc_mutual_info" in sample["metrics"] else asked  # each answer also without its question


def _average(lines: Sequence[Line]) -> Line:
    """Over tasks that have an acc; acc_norm is acc where a task has no other."""
    rated = [line for line in lines if "acc" in line.scores]
    scores: dict[str, tuple[float, float | None]] = {}
    if rated:
        for metric in METRICS:
            values = [line.scores.get(metric, line.scores["acc"]) for line in rated]
            errors = [error for _, error in values if error is not None]
            whole = len(errors) == len(values)
            scores[metric] = (sum(value for value, _ in values) / len(values),
                              sum(error**2 for error in errors) ** 0.5 / len(values) if whole else None)
    paper = averages([line.name for line in lines])
    chances = [line.chance for line in rated if line.chance is not None]
    return Line("average", f"average of {len(rated)}", sum(line.items for line in lines), "", scores,
                sum(chances) / len(chances) if len(chances) == len(rated) and rated else None,
                paper[0] if paper else None, paper[1] if paper else None)


def _cells(line: Line) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    def rated(metric: str) -> str:
        if metric not in line.scores:
            return "-"
        value, error = line.scores[metric]
        return number(value) + (f" ± {error:.2f}" if error is not None else "")

    return [line.title, line.split or "-", f"{line.items:,}", *map(rated, METRICS), number(line.chance),
            number(line.dlcm), number(line.baseline)]


HEAD = ["task", "split", "questions", "acc", "acc_norm", "chance", "DLCM, paper", "dense, paper"]


def others_of(lines: Sequence[Line]) -> list[str]:
    """Metrics beside acc and acc_norm, a line each."""
    return [f"{line.title}: {metric} {value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            for line in lines for metric, (value, error) in line.scores.items() if metric not in METRICS]


def plain(lines: Sequence[Line]) -> str:
    """For a terminal."""
    rows = [HEAD, *map(_cells, lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join([*("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]),
                                   *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))])
                        for row in rows), *others_of(lines)])


def markdown(lines: Sequence[Line], facts: Sequence[str]) -> str:
    """facts: sentences of the model and of how it was asked."""
    table = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2),
             *("| " + " | ".join(_cells(line)) + " |" for line in lines)]
    return "\n".join(["# Zero-shot tasks", "", *(f"- {fact}" for fact in [*facts, *others_of(lines)]), "", *table, "",
                      *([NOTE] if any(line.dlcm is not None for line in lines) else []), ""])


def as_values(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{**asdict(line), "scores": {metric: {"value": value, "stderr": error}
                                        for metric, (value, error) in line.scores.items()}} for line in lines]


def to_tensorboard(folder: Path, lines: Sequence[Line], text: str, step: int) -> None:
    """Scores as scalars at the model's step, the table as text; in place of those that were there."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()  # of the same question
    with SummaryWriter(str(folder)) as writer:
        for line in lines:
            for metric, (value, _) in line.scores.items():
                writer.add_scalar(f"tasks_{metric}/{line.name}", value, step)
        writer.add_text("tasks", text, step)


