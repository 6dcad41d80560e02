"""`dlcm evaluate --tasks`: tasks of lm-eval, of a run, an export or a Hugging Face model.

    OUT/
        answers/QUESTION/rank-00000.jsonl   what the model has answered so far; the same command goes on from there
        results[-WHAT].json                 our table as values, and lm-eval's own results; WHAT names what differs from
        table[-WHAT].md                     the plain question: tasks, boundaries, precision, few-shot, limit
        samples[-WHAT].jsonl                every question and answer, where asked for

Prompts, metrics and standard errors are lm-eval's. Its tasks come from the Hugging Face hub, or their questions from a
local folder (releases.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import lm_eval.evaluator
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.errors import DataError, RunError
from dlcm_lightning.evaluation.tasks import results as tables
from dlcm_lightning.evaluation.tasks.harness import ConceptLM, sampling_of
from dlcm_lightning.evaluation.tasks.local_tasks import check_known, expanded, local_tasks
from dlcm_lightning.evaluation.tasks.models import HUB, Asked, Question, first_line, open_model
from dlcm_lightning.evaluation.tasks.paper import label
from dlcm_lightning.evaluation.tasks.sharing import joined
from dlcm_lightning.ops.collectives import rank
from dlcm_lightning.progress import Log

BOOTSTRAPS = 1000
"""Of metrics whose standard error has no formula."""


def evaluate(place: str, question: Question, *, step: int | None = None, data_dir: Path | None = None,
             out: Path | None = None, samples: bool = False, log: Log = print
             ) -> list[tables.Line] | None:
    """Scores of a model on tasks, written and told; None on ranks but the first.

    place: a run's directory, an export, or hf:PATH of a model that transformers loads. step: of a run's checkpoint.
    data_dir: a folder with the questions of every task. out: where answers and results go; tasks-STEP in the run's
    directory, or tasks-NAME here. samples: keep every question and answer too.

    ConfigError: unknown tasks, or a question that the model cannot be asked. DataError: files of a task are missing or
    damaged. CheckpointError: there is no model. RunError: the results cannot be written.
    """
    with joined() as (where, group), _quiet():
        log = log if rank() == 0 else lambda line: None
        manager = task_manager()
        check_known(manager, question.tasks)
        names = expanded(manager, question.tasks)
        if data_dir is not None:
            wanted, splits = local_tasks(manager, names, data_dir, question.fewshot)
        else:
            wanted, splits = _from_hub(manager, names), {}
        if not place.startswith(HUB):
            _check_generation(wanted)
        asked = open_model(place, question, step, out, where, group)
        for fact in asked.facts:
            log(fact)
        found = simple_evaluate(asked.lm, tasks=wanted, num_fewshot=question.fewshot, limit=question.limit,
                                task_manager=manager, bootstrap_iters=BOOTSTRAPS, log_samples=True)
        if rank() or found is None:
            return None
        lines = tables.lines_of(found, names, splits)
        log(tables.plain(lines))
        source = "the hub" if data_dir is None else str(data_dir.resolve())
        _write(asked, {**asdict(question), "place": place, "step": asked.step, "questions_from": source}, question,
               found, lines, samples, log)
        return lines


def _from_hub(manager: TaskManager, names: Sequence[str]) -> list[Task | Group]:
    """DataError: their questions cannot be had. Whatever lm-eval, datasets and a task's own code raise then is said."""
    try:
        loaded = manager.load([*names])
    except Exception as error:
        raise DataError(f"--tasks {','.join(names)}: questions cannot be had from the hub ({first_line(error)}); give "
                        "--data-dir, and see `dlcm data fetch-tasks`") from error
    return [loaded.get("groups", {}).get(name) or loaded["tasks"][name] for name in names]


def _check_generation(wanted: Sequence[Task | Group]) -> None:
    """ConfigError: a task asks for a way of generating that there is not. Said before anything is computed."""
    for one in wanted:
        for task in one.get_all_tasks() if isinstance(one, Group) else [one]:
            if task.get_config("output_type") == "generate_until":
                sampling_of(task.get_config("generation_kwargs") or {})


@cache
def task_manager() -> TaskManager:
    """lm-eval's index of thousands of files, read once."""
    return TaskManager()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets log every task they load, warn of what is chosen here on purpose, draw a bar a task for what
    takes no time, and ask git of the folder that this happens to be started in."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    drawn = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(drawn, disable=True)
    asks_git = lm_eval.evaluator.get_git_commit_hash
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            lm_eval.api.task.tqdm = drawn
            lm_eval.evaluator.get_git_commit_hash = asks_git
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def what(question: Question) -> str:
    """How a question differs from the plain one, for file names."""
    parts = [label(question.tasks)] if label(question.tasks) else []
    parts += [question.boundaries] * (question.boundaries != "thresholded")
    parts += [question.precision] * (question.precision != "auto")
    parts += [f"{question.fewshot}shot"] * (question.fewshot > 0)
    parts += [f"limit{question.limit}"] * (question.limit is not None)
    parts += [f"context{question.context}"] * (question.context is not None)
    return "".join(f"-{part}" for part in parts)


def _write(asked: Asked, exactly: dict[str, Any], question: Question, found: dict[str, Any],
           lines: list[tables.Line], samples: bool, log: Log) -> None:
    cut = len(asked.lm.cut) if isinstance(asked.lm, ConceptLM) else 0
    facts = [*asked.facts, f"lm-eval's prompts and metrics, {question.fewshot} solved questions in front",
             *([f"the first {question.limit} questions of each task, or subject, only"] if question.limit else []),
             *([f"{cut} contexts were longer than the model's and lost their beginning"] if cut else [])]
    text = tables.markdown(lines, facts)
    theirs = {name: value for name, value in found.items() if name != "samples"}
    content = {"question": exactly, "facts": facts, "table": tables.as_values(lines), "note": tables.NOTE,
               "lm_eval": theirs}
    name, out = what(question), asked.out
    if _question_of(out / f"results{name}.json") not in (None, json.loads(_json(exactly))):
        name += "-" + hashlib.sha256(_json(exactly)).hexdigest()[:8]  # no answer replaces that to another question
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / f"results{name}.json", _json(content) + b"\n")
        write_atomically(out / f"table{name}.md", text.encode())
        if samples:
            every = [{"task": task, **one} for task, some in found["samples"].items() for one in some]
            write_atomically(out / f"samples{name}.jsonl", b"\n".join(map(_json, every)) + b"\n")
        tables.to_tensorboard(out / f"events{name}", lines, text, asked.step or 0)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error}); give another --out") from error
    log(f"{out / f'table{name}.md'}; results{name}.json beside it")


def _question_of(file: Path) -> Any:
    """What results that are there answer; None where there are none."""
    try:
        return json.loads(file.read_bytes())["question"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _json(content: Any) -> bytes:
    return json.dumps(_plain(content), default=handle_non_serializable, ensure_ascii=False).encode()


def _plain(content: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
