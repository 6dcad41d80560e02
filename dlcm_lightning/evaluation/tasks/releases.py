"""Files of the paper's tasks in a local folder, as rows that lm-eval's own prompts read.

    DATA/
        arc_easy/ARC-Easy-Test.jsonl          whatever the release calls it: a split is a word in the path
        mmlu/test/anatomy_test.csv            a subject is the file's name, or that of its folder
        race/test/high/1234.txt

Files may be .jsonl, .json, .csv, .parquet, .arrow, and for RACE .txt. Rows may have the shape of the official release
or of the Hugging Face hub's copy; `_SHAPES` brings the one to the other. What is missing is named with where it comes
from.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from dlcm_lightning.errors import DataError
from dlcm_lightning.evaluation.tasks.paper import PaperTask

SUFFIXES = (".jsonl", ".parquet", ".arrow", ".csv", ".json", ".txt")
"""The first that a split has is read: some releases have the same questions in two formats."""
SPLIT_WORDS = ("train", "test", "validation", "valid", "val", "dev")
PART = re.compile(r"[-_]\d+[-_]of[-_]\d+$")
Row = dict[str, Any]


def splits_of(root: Path, task: PaperTask, subject: str | None = None) -> dict[str, datasets.Dataset]:
    """By lm-eval's names of splits, those that there are. DataError: none that could be evaluated, more than one
    edition of the same split, or files that cannot be read."""
    folder = root / task.name
    files = [file for file in _files(folder, task) if subject is None or _is_of(file, folder, subject)]
    found = {split: _dataset(chosen, task) for split, names in task.splits.items()
             if (chosen := _of_split(files, folder, names, task))}
    if not any(split in found for split in task.splits if split != "dev"):
        of = f" of subject {subject}" if subject else ""
        raise DataError(f"{folder}: no file{of} of split {' or '.join(s for s in task.splits if s != 'dev')}; "
                        f"{_needs(task)}")
    return found


def subjects_in(root: Path, task: PaperTask, all_subjects: list[str]) -> list[str]:
    """The subjects, all of which must be there. DataError: some are not."""
    folder = root / task.name
    files = _files(folder, task)
    missing = [one for one in all_subjects if not any(_is_of(file, folder, one) for file in files)]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(all_subjects)} subjects have no file, such as {missing[0]}; "
                        f"{_needs(task)}")
    return all_subjects


def _needs(task: PaperTask) -> str:
    return f"{task.title} needs {task.files}, from {task.release}"


def _files(folder: Path, task: PaperTask) -> list[Path]:
    """Of a task; what archives of a Mac add, and what belongs to another task, left out. DataError: no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; {_needs(task)}")

    def belongs(file: Path) -> bool:
        parts = file.relative_to(folder).parts
        return not any(part.startswith(".") or part == "__MACOSX" for part in parts) and not any(
            word in task.leaves_out for part in parts for word in _words(part))

    return [file for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES and file.is_file() and belongs(file)]


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def _split_word(file: Path, folder: Path) -> str | None:
    """What the file's name says of its split, or else the innermost folder that says something."""
    inside = file.relative_to(folder).with_suffix("")
    for part in reversed(inside.parts):
        if found := [word for word in _words(part) if word in SPLIT_WORDS]:
            return found[-1]
    return None


def _of_split(files: list[Path], folder: Path, names: tuple[str, ...], task: PaperTask) -> list[Path]:
    """Files of a split: one, the parts of one, or for RACE one a text. DataError: several that are not parts."""
    found = [file for file in files if _split_word(file, folder) in names]
    best = min((SUFFIXES.index(file.suffix) for file in found), default=0)
    found = [file for file in found if file.suffix == SUFFIXES[best]]
    stems = {str(file.relative_to(folder).with_name(PART.sub("", file.stem))) for file in found}
    if len(stems) > 1 and found[0].suffix != ".txt":
        raise DataError(f"{folder}: {' and '.join(sorted(stems)[:3])} could all be {task.title}'s split {names[0]}; "
                        "leave one of them")
    return found


def _is_of(file: Path, folder: Path, subject: str) -> bool:
    stem = re.sub(r"[-_](test|val|dev|validation)$", "", PART.sub("", file.stem))
    return subject == stem or subject in file.relative_to(folder).parts[:-1]


def _dataset(files: list[Path], task: PaperTask) -> datasets.Dataset:
    shape = _SHAPES.get(task.name, _as_it_is)
    rows: list[Row] = []
    for file in files:
        for number, row in enumerate(_rows(file), 1):
            try:
                rows.append(shape(row))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{file}, row {number}: not a question of {task.title} ({type(error).__name__}: {error}"
                                f"); {_needs(task)}") from error
    if not rows:
        raise DataError(f"{files[0]}: holds no rows; {_needs(task)}")
    return datasets.Dataset.from_list(rows)


def _rows(file: Path) -> Iterator[Row]:
    """DataError: it cannot be read."""
    try:
        yield from _READERS[file.suffix](file)
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({error}); fetch it again") from error


def _of_lines(file: Path) -> Iterator[Row]:
    labels = file.with_name(f"{file.stem}-labels.lst")  # PIQA keeps its answers apart
    answers = labels.read_text().split() if labels.is_file() else None
    with file.open(encoding="utf-8-sig") as lines:
        rows = [json.loads(line) for line in filter(str.strip, lines)]
    if answers is None:
        yield from rows
    elif len(answers) != len(rows):
        raise ValueError(f"{len(rows)} questions, but {labels.name} has {len(answers)} answers")
    else:
        yield from ({"label": answer, **row} for row, answer in zip(rows, answers, strict=True))


def _of_json(file: Path) -> Iterator[Row]:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    yield from content if isinstance(content, list) else [content]


def _of_csv(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as content:
        lines = [line for line in csv.reader(content) if line]
    if lines and {"answer"} & {name.lower() for name in lines[0]}:
        yield from (dict(zip(lines[0], line, strict=True)) for line in lines[1:])
    else:  # MMLU's have no line of names
        yield from (dict(zip(("question", "A", "B", "C", "D", "answer"), line, strict=True)) for line in lines)


def _of_arrow(file: Path) -> Iterator[Row]:
    yield from datasets.Dataset.from_file(str(file))


def _of_parquet(file: Path) -> Iterator[Row]:
    yield from pyarrow.parquet.read_table(file).to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _of_lines, ".json": _of_json, ".txt": _of_json, ".csv": _of_csv, ".arrow": _of_arrow,
    ".parquet": _of_parquet}


# The shape that lm-eval's prompts read


def _as_it_is(row: Row) -> Row:
    return row


def _choices(row: Row) -> Row:
    """ARC, CommonsenseQA: the release nests question and choices, a row a choice."""
    question: Any = row["question"]
    choices: Any = row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {"text": [one["text"] for one in choices], "label": [one["label"] for one in choices]}
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {choices['label']}")
    return {"question": question, "choices": choices, "answerKey": row["answerKey"]}


def _openbookqa(row: Row) -> Row:
    if "question_stem" in row:
        return {name: row[name] for name in ("question_stem", "choices", "answerKey")}
    shaped = _choices(row)
    return {"question_stem": shaped.pop("question"), **shaped}


def _hellaswag(row: Row) -> Row:
    return {name: row[name] for name in ("ctx_a", "ctx_b", "activity_label", "endings")} | {"label": str(row["label"])}


def _winogrande(row: Row) -> Row:
    return {name: row[name] for name in ("sentence", "option1", "option2")} | {"answer": str(int(row["answer"]))}


def _piqa(row: Row) -> Row:
    return {name: row[name] for name in ("goal", "sol1", "sol2")} | {"label": int(row["label"])}


def _boolq(row: Row) -> Row:
    label = row["label"] if "label" in row else row["answer"]
    return {"question": row["question"], "passage": row["passage"], "label": int(label)}


def _mmlu(row: Row) -> Row:
    choices = row["choices"] if "choices" in row else [row[letter] for letter in "ABCD"]
    answer = row["answer"]
    return {"question": row["question"], "choices": list(choices),
            "answer": "ABCD".index(_letter(answer)) if isinstance(answer, str) else int(answer)}


def _ceval(row: Row) -> Row:
    return {name: str(row[name]) for name in ("question", "A", "B", "C", "D")} | {"answer": _letter(row["answer"])}


def _cmmlu(row: Row) -> Row:
    return {name: str(row[name]) for name in ("Question", "A", "B", "C", "D")} | {"Answer": _letter(row["Answer"])}


def _letter(answer: Any) -> str:
    if answer not in ("A", "B", "C", "D"):
        raise ValueError(f"answer {answer!r} is none of A, B, C, D")
    return str(answer)


def _race(row: Row) -> Row:
    """The release keeps questions, options and answers of an article in three lists; lm-eval reads Python's spelling of
    a list of problems."""
    problems = row.get("problems")
    if problems is None:
        problems = str([{"question": question, "answer": _letter(answer), "options": options} for question, answer,
                        options in zip(row["questions"], row["answers"], row["options"], strict=True)])
    return {"article": row["article"], "problems": problems}


_SHAPES: dict[str, Callable[[Row], Row]] = {
    "commonsense_qa": _choices, "arc_easy": _choices, "arc_challenge": _choices, "openbookqa": _openbookqa,
    "hellaswag": _hellaswag, "winogrande": _winogrande, "piqa": _piqa, "boolq": _boolq, "mmlu": _mmlu,
    "ceval-valid": _ceval, "cmmlu": _cmmlu, "race": _race}
