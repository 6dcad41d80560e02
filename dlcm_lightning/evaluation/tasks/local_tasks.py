"""Tasks of lm-eval whose questions lie in a local folder: the official prompts and metrics over other files.

A task is lm-eval's own, given its questions by a callable in place of a hub's address, so that nothing is downloaded
and nothing cached. The group of MMLU, C-Eval or CMMLU holds one task a subject, all of which must be there.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.config.group import AggMetricConfig
from lm_eval.tasks import TaskManager

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.evaluation.tasks.paper import BY_NAME, TASKS, PaperTask
from dlcm_lightning.evaluation.tasks.releases import splits_of, subjects_in

MMLU_TAGS = ("mmlu_stem_tasks", "mmlu_other_tasks", "mmlu_social_sciences_tasks", "mmlu_humanities_tasks")


def check_known(manager: TaskManager, names: Sequence[str]) -> None:
    """ConfigError: lm-eval has no such task."""
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks)
        raise ConfigError(f"--tasks {unknown[0]}: no task of lm-eval" + (f"; do you mean {', '.join(near)}?" if near
                          else f"; the paper's are {', '.join(task.name for task in TASKS)}"))


def expanded(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """lm-eval's tags name several tasks; groups stay what they are. ConfigError: a task is named twice by them."""
    found = [one for name in names for one in
             (sorted(manager.task_index[name].tags) if name in manager.all_tags else [name])]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ConfigError(f"--tasks: {twice[0]} is named twice, by itself or by a tag; name each task once")
    return found


class _Given:
    """What lm-eval calls for the questions of a task, in place of the hub."""

    def __init__(self, splits: dict[str, datasets.Dataset]) -> None:
        self.splits = splits

    def __repr__(self) -> str:  # lm-eval writes it with its results
        return "questions of --data-dir"

    def __call__(self, **metadata: Any) -> dict[str, datasets.Dataset]:  # lm-eval hands over the task's metadata
        return self.splits


def local_tasks(manager: TaskManager, names: Sequence[str], root: Path, fewshot: int
                ) -> tuple[list[Any], dict[str, str]]:
    """Tasks for lm-eval, and the split that each is asked, by name. fewshot: solved questions in front of each.

    ConfigError: a task whose files nobody knows, or no solved questions. DataError: files are missing or damaged."""
    wanted: list[Any] = []
    splits: dict[str, str] = {}
    for name in names:
        task = BY_NAME.get(name)
        if task is None:
            raise ConfigError(f"--data-dir {root}: files are known for {', '.join(one.name for one in TASKS)}; ask "
                              f"{name} without it, from the hub")
        if not task.subjects:
            found = splits_of(root, task)
            splits[name] = _split(found)
            wanted.append(_leaf(manager, name, found, fewshot))
            continue
        leaves = leaves_of(manager, task)
        group = Group(name, aggregate_metric_list=[AggMetricConfig(metric) for metric in
                                                   (("acc",) if name == "mmlu" else ("acc", "acc_norm"))])
        for subject in subjects_in(root, task, list(leaves)):
            found = splits_of(root, task, subject)
            splits[name] = _split(found)
            group.add(_leaf(manager, leaves[subject], found, fewshot))
        wanted.append(group)
    return wanted, splits


def leaves_of(manager: TaskManager, task: PaperTask) -> dict[str, str]:
    """The tasks of a group, by subject."""
    if task.name == "mmlu":
        names = sorted(name for tag in MMLU_TAGS for name in manager.task_index[tag].tags)
    else:
        names = sorted(name for name in manager.all_subtasks if name.startswith(f"{task.name}_"))
    return {name.removeprefix(f"{task.name}_"): name for name in names}


def _split(found: dict[str, datasets.Dataset]) -> str:
    return next(name for name in found if name != "dev")


def _leaf(manager: TaskManager, name: str, found: dict[str, datasets.Dataset], fewshot: int) -> Any:
    split = _split(found)
    if fewshot and "dev" not in found:
        raise ConfigError(f"--fewshot {fewshot}: {name} has no local files of solved questions; leave it out, "
                          "or ask it without --data-dir")
    fields = {
        "task": name, "custom_dataset": _Given(found), "training_split": None,
        "validation_split": split if split != "test" else None, "test_split": split if split == "test" else None,
        "fewshot_split": "dev" if "dev" in found else None,
        **({} if "dev" in found else {"fewshot_config": None})}
    # As a member of a group, because a task alone would not begin with what lm-eval says of it.
    return manager.load([{"group": f"local-{name}", "task": [fields]}])["tasks"][name]
