"""The twelve zero-shot tasks of the paper (Table 2): their names in lm-eval, the paper's numbers, and where files of
them come from.

The paper prints an average of 43.92 for DLCM and a gain of 2.69 points. The mean of its own twelve numbers is 42.24,
and the gain over the mean of the baseline's twelve is 1.01. It does not say which of lm-eval's metrics it prints, nor
on which split; numbers are compared with `acc` here, and `acc_norm` stands beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlcm_lightning.errors import ConfigError

PAPER12 = "paper12"
LOCAL = "local"
"""Those that `dlcm data fetch-tasks` brings."""
PRINTED_AVERAGE = 43.92


@dataclass(frozen=True)
class PaperTask:
    """A task, or a group of one task a subject."""

    name: str
    """In lm-eval; also the folder of its files."""
    title: str
    dlcm: float
    """Percent, Table 2."""
    baseline: float
    """Percent, Table 2: the dense model of equal inference FLOPs."""
    release: str
    """Where its files come from."""
    files: str
    """What they are called there, and what `dlcm evaluate --data-dir` finds."""
    splits: Mapping[str, tuple[str, ...]]
    """What each of lm-eval's splits is called in file and folder names; the first that is there is evaluated."""
    subjects: bool = False
    """Whether it is a group, one file a subject and split."""
    leaves_out: tuple[str, ...] = ()
    """Words of files that belong to another task, or another edition of it."""


_VALIDATION = ("validation", "valid", "val", "dev")
_VAL = {"validation": _VALIDATION}
_TEST_OR_VAL = {"test": ("test",), "validation": _VALIDATION}

TASKS = (
    PaperTask("commonsense_qa", "CommonsenseQA", 21.38, 19.74, "tau/commonsense_qa on the Hugging Face hub, or "
              "dev_rand_split.jsonl of the official release", "dev_rand_split.jsonl", _VAL, leaves_out=("token",)),
    PaperTask("hellaswag", "HellaSwag", 46.66, 45.99, "Rowan/hellaswag, or hellaswag_val.jsonl of rowanz/hellaswag on "
              "GitHub", "hellaswag_val.jsonl", _VAL),
    PaperTask("winogrande", "Winogrande", 57.22, 56.20, "allenai/winogrande (winogrande_xl), or dev.jsonl of the "
              "official zip", "dev.jsonl", _VAL, leaves_out=("xs", "s", "m", "l", "debiased")),
    PaperTask("openbookqa", "OpenBookQA", 26.80, 23.80, "allenai/openbookqa (main), or Data/Main of the official zip",
              "test.jsonl, dev.jsonl", _TEST_OR_VAL, leaves_out=("additional",)),
    PaperTask("piqa", "PIQA", 75.52, 73.10, "baber/piqa, or valid.jsonl and valid-labels.lst of ybisk/ybisk.github.io",
              "valid.jsonl, valid-labels.lst", _VAL),
    PaperTask("arc_challenge", "ARC-Challenge", 34.81, 33.04, "allenai/ai2_arc (ARC-Challenge), or the official zip",
              "ARC-Challenge-Test.jsonl, ARC-Challenge-Dev.jsonl", _TEST_OR_VAL, leaves_out=("easy",)),
    PaperTask("arc_easy", "ARC-Easy", 69.91, 67.30, "allenai/ai2_arc (ARC-Easy), or the official zip",
              "ARC-Easy-Test.jsonl, ARC-Easy-Dev.jsonl", _TEST_OR_VAL, leaves_out=("challenge",)),
    PaperTask("mmlu", "MMLU", 25.40, 25.70, "cais/mmlu, or data.tar of hendrycks/test on GitHub",
              "test/SUBJECT_test.csv, dev/SUBJECT_dev.csv", {"test": ("test",), "dev": ("dev",)}, subjects=True),
    PaperTask("boolq", "BoolQ", 62.54, 64.01, "aps/super_glue (boolq), or dev.jsonl of google-research-datasets",
              "dev.jsonl, val.jsonl", _VAL),
    PaperTask("race", "RACE", 35.31, 36.03, "EleutherAI/race (high), or RACE.tar.gz of its authors, Carnegie Mellon",
              "test/high/*.txt", {"test": ("test",)}, leaves_out=("middle", "all")),
    PaperTask("ceval-valid", "C-Eval", 26.08, 24.37, "ceval/ceval-exam, or its ceval-exam.zip",
              "val/SUBJECT_val.csv, dev/SUBJECT_dev.csv", {"val": ("val",), "dev": ("dev",)}, subjects=True),
    PaperTask("cmmlu", "CMMLU", 25.23, 25.47, "haonan-li/cmmlu, or its cmmlu_v1_0_1.zip",
              "test/SUBJECT.csv, dev/SUBJECT.csv", {"test": ("test",), "dev": ("dev",)}, subjects=True),
)
BY_NAME = {task.name: task for task in TASKS}
FETCHED = ("commonsense_qa", "hellaswag", "winogrande", "openbookqa", "piqa", "arc_challenge", "arc_easy", "mmlu",
           "boolq")


def chosen(text: str) -> list[str]:
    """Names of tasks, of `NAME,NAME,...`, where paper12 stands for the twelve and local for the nine that can be
    fetched. ConfigError: none, or one twice. Whether lm-eval knows them is asked later."""
    names: list[str] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        names += {PAPER12: [task.name for task in TASKS], LOCAL: list(FETCHED)}.get(part, [part])
    if not names:
        raise ConfigError(f"--tasks {text!r}: name tasks of lm-eval, or {PAPER12}, or {LOCAL}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--tasks {text!r}: {twice[0]} stands there twice; name each task once")
    return names


def label(names: Sequence[str]) -> str:
    """Of a choice of tasks, short enough for a file's name; empty for the twelve."""
    if list(names) == [task.name for task in TASKS]:
        return ""
    if list(names) == list(FETCHED):
        return LOCAL
    if len(names) <= 3:
        return "+".join(names)
    return f"{len(names)}-tasks-{hashlib.sha256(','.join(names).encode()).hexdigest()[:6]}"


def averages(names: Sequence[str]) -> tuple[float, float] | None:
    """Percent: the means of the paper's two columns over these tasks; None where one of them is not the paper's."""
    found = [BY_NAME.get(name) for name in names]
    known = [task for task in found if task is not None]
    if len(known) < len(found) or not known:
        return None
    return (sum(task.dlcm for task in known) / len(known), sum(task.baseline for task in known) / len(known))
