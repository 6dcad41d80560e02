"""The table: what was asked, what guessing would give, and under which name it is kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.evaluation.tasks import local_tasks as local_module
from dlcm_lightning.evaluation.tasks.evaluate import evaluate, what
from dlcm_lightning.evaluation.tasks.models import Question
from dlcm_lightning.evaluation.tasks.results import Line, lines_of
from tests.evaluation.tasks.conftest import ROWS, SMALL, only, quiet


def test_the_table_says_what_was_asked_and_what_guessing_would_give(asked: Path) -> None:
    content = json.loads(only(asked, "results-*.json").read_text())
    table = {line["name"]: line for line in content["table"]}
    assert {name: table[name]["items"] for name in SMALL} == dict.fromkeys(SMALL, ROWS)
    assert {name: table[name]["chance"] for name in SMALL} == pytest.approx({
        "commonsense_qa": 20, "hellaswag": 25, "winogrande": 50, "openbookqa": 25, "piqa": 50, "arc_challenge": 25,
        "arc_easy": 25, "boolq": 50, "race": 25})
    assert table["arc_easy"]["split"] == "test" and table["arc_challenge"]["split"] == "validation"
    assert table["piqa"]["dlcm"] == 75.52 and table["piqa"]["baseline"] == 73.10
    for name in SMALL:
        theirs = content["lm_eval"]["results"][name]
        for metric, score in table[name]["scores"].items():
            assert score["value"] == 100 * theirs[f"{metric},none"]
            assert score["stderr"] == 100 * theirs[f"{metric}_stderr,none"]
    assert "acc_norm" in table["piqa"]["scores"] and "acc_norm" not in table["boolq"]["scores"]
    accs = [table[name]["scores"]["acc"]["value"] for name in SMALL]
    assert table["average"]["scores"]["acc"]["value"] == pytest.approx(sum(accs) / len(accs))
    errors = [table[name]["scores"]["acc"]["stderr"] for name in SMALL]
    assert table["average"]["scores"]["acc"]["stderr"] == pytest.approx(math.hypot(*errors) / len(errors))
    text = only(asked, "table-*.md").read_text()
    assert "bits per byte" in text and "42.24" in text and "| PIQA | validation | 3 |" in text
    assert list(asked.glob("events-*/events.out.tfevents.*"))


def result_of(name: str, subtasks: dict[str, list[str]], leaves: dict[str, tuple[str, int, list[str]]]) -> Line:
    """The line of a group or task; leaves: by name, output type, requests of each question, metrics."""
    samples = {leaf: [{"doc_id": number, "arguments": [["", ""]] * count, "metrics": metrics} for number in range(3)]
               for leaf, (_, count, metrics) in leaves.items()}
    return lines_of({"results": {leaf: {"acc,none": 0.5, "acc_stderr,none": 0.1} for leaf in leaves},
                     "groups": {group: {"acc,none": 0.5, "acc_stderr,none": "N/A"} for group in subtasks},
                     "group_subtasks": subtasks, "samples": samples,
                     "configs": {leaf: {"output_type": kind} for leaf, (kind, _, _) in leaves.items()}}, [name], {})[0]


def test_groups_of_groups_count_the_questions_of_their_leaves() -> None:
    line = result_of("mmlu", {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["a", "b"], "mmlu_other": ["c"]},
                     {leaf: ("multiple_choice", 4, ["acc"]) for leaf in "abc"})
    assert (line.items, line.chance, line.scores["acc"]) == (9, 25, (50, None))


@pytest.mark.parametrize(("kind", "asked", "metrics", "chance"), [
    ("multiple_choice", 4, ["acc", "acc_norm"], 25), ("multiple_choice", 8, ["acc", "acc_mutual_info"], 25),
    ("loglikelihood", 1, ["acc", "perplexity"], None), ("generate_until", 1, ["exact_match"], None)])
def test_chance_is_that_of_choices(kind: str, asked: int, metrics: list[str], chance: float | None) -> None:
    assert result_of("one", {}, {"one": (kind, asked, metrics)}).chance == chance


def test_tags_are_their_tasks(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    lines = evaluate(str(trained_run), Question(("ai2_arc", "piqa")), data_dir=small_tasks, out=tmp_path, log=quiet)
    assert lines is not None
    assert [line.name for line in lines] == ["arc_challenge", "arc_easy", "piqa", "average"]
    with pytest.raises(ConfigError, match="arc_easy is named twice"):
        evaluate(str(trained_run), Question(("ai2_arc", "arc_easy")), data_dir=small_tasks, out=tmp_path, log=quiet)


def test_no_answer_replaces_that_to_another_question(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_tasks, tmp_path / "elsewhere")
    for _ in range(2):
        for data in (small_tasks, tmp_path / "elsewhere"):
            evaluate(str(trained_run), Question(("piqa",)), data_dir=data, out=tmp_path / "out", log=quiet)
    found = sorted((tmp_path / "out").glob("results-piqa*.json"))
    assert {json.loads(file.read_text())["question"]["questions_from"] for file in found} == {
        str(small_tasks), str(tmp_path / "elsewhere")} and len(found) == 2
    assert len(list((tmp_path / "out").glob("events-piqa*/events.out.tfevents.*"))) == 2


def test_questions_have_names_of_their_own() -> None:
    plain = Question(tuple(task for task in local_module.BY_NAME))
    assert what(plain) == ""
    assert what(Question(("piqa",), "sampled", "bf16", 2, 10, 64)) == "-piqa-sampled-bf16-2shot-limit10-context64"
