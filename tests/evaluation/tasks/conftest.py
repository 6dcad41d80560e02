"""Small questions of the twelve tasks in the formats of their releases, and models to ask."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dlcm_lightning.config import Config, DataConfig, OptimConfig, TrainConfig
from dlcm_lightning.evaluation.tasks.evaluate import evaluate
from dlcm_lightning.evaluation.tasks.models import Question
from dlcm_lightning.training.run import pretrain
from tests.conftest import MODEL

ROWS = 3
"""Questions of a task."""
SMALL = ("commonsense_qa", "hellaswag", "winogrande", "openbookqa", "piqa", "arc_challenge", "arc_easy", "boolq",
         "race")


def lines(file: Path, rows: Iterable[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(file: Path, head: list[str] | None, rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as content:
        csv.writer(content).writerows([*([head] if head else []), *rows])


def nested(number: int, letters: str) -> dict[str, Any]:
    """ARC's and CommonsenseQA's release."""
    return {"id": f"q{number}", "answerKey": letters[number % len(letters)], "question": {
        "stem": f"Which stone is number {number}?",
        "choices": [{"text": f"stone {letter} of {number}", "label": letter} for letter in letters]}}


def write_small_tasks(root: Path) -> None:
    """Those without subjects."""
    lines(root / "arc_easy/ARC-Easy-Test.jsonl", (nested(one, "ABCD") for one in range(ROWS)))
    lines(root / "arc_easy/ARC-Easy-Dev.jsonl", (nested(one + 50, "ABCD") for one in range(ROWS)))
    lines(root / "arc_challenge/ARC-Challenge-Dev.jsonl", (nested(one, "1234") for one in range(ROWS)))
    lines(root / "commonsense_qa/dev_rand_split.jsonl", (nested(one, "ABCDE") for one in range(ROWS)))
    lines(root / "openbookqa/Main/test.jsonl", (nested(one, "ABCD") for one in range(ROWS)))
    lines(root / "openbookqa/Additional/test_complete.jsonl", (nested(one + 50, "ABCD") for one in range(ROWS)))
    lines(root / "hellaswag/hellaswag_val.jsonl", ({
        "ind": one, "activity_label": "Walking", "ctx_a": "A boy walks.", "ctx_b": "he", "ctx": "A boy walks. he",
        "split": "val", "label": one % 4, "endings": [f"turns {turn} times." for turn in range(4)]}
        for one in range(ROWS)))
    lines(root / "winogrande/dev.jsonl", ({
        "qID": f"w{one}", "sentence": "The cup did not fit the box because _ was too big.", "option1": "the cup",
        "option2": "the box", "answer": str(1 + one % 2)} for one in range(ROWS)))
    lines(root / "piqa/valid.jsonl", ({"goal": f"Open jar {one}", "sol1": "turn the lid", "sol2": "turn the jar over"}
                                      for one in range(ROWS)))
    (root / "piqa/valid-labels.lst").write_text("".join(f"{one % 2}\n" for one in range(ROWS)))
    lines(root / "boolq/dev.jsonl", ({"question": "is water wet", "title": "Water", "answer": bool(one % 2),
                                      "passage": f"Water is wet, says page {one}."} for one in range(ROWS)))
    for number in range(ROWS):
        for level in ("high", "middle"):
            lines(root / f"race/RACE/test/{level}/{number}.txt", [{
                "id": f"{level}{number}.txt", "article": f"The {level} river of {number} is long.",
                "questions": ["The river is  _  .", "How long is it?"],
                "options": [["long", "short", "red", "blue"], [f"{one} miles" for one in range(4)]],
                "answers": ["A", "ABCD"[number]]}])


def write_subjects(root: Path, task: str, subjects: Iterable[str]) -> None:
    """MMLU, C-Eval or CMMLU, every file of its release."""
    letters = ["A", "B", "C", "D"]
    for place, subject in enumerate(subjects):
        rows = [[f"问题{one} {subject}", "甲", "乙", "丙", "丁", letters[(one + place) % 4]] for one in range(2)]
        if task == "mmlu":
            table(root / f"mmlu/data/test/{subject}_test.csv", None, rows)
            table(root / f"mmlu/data/dev/{subject}_dev.csv", None, rows[:1])
        elif task == "cmmlu":
            for split in ("test", "dev"):
                table(root / f"cmmlu/{split}/{subject}.csv", ["", "Question", *letters, "Answer"],
                      [[str(one), *row] for one, row in enumerate(rows)])
        else:
            table(root / f"ceval-valid/val/{subject}_val.csv", ["id", "question", *letters, "answer"],
                  [[str(one), *row] for one, row in enumerate(rows)])
            table(root / f"ceval-valid/dev/{subject}_dev.csv", ["id", "question", *letters, "answer", "explanation"],
                  [[str(one), *row, "因为"] for one, row in enumerate(rows)])


@pytest.fixture(scope="session")
def small_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("questions")
    write_small_tasks(root)
    return root


@pytest.fixture(scope="session")
def trained_run(build_corpus: Callable[[Path], DataConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a few steps, on rows long enough for questions."""
    folder = tmp_path_factory.mktemp("asked")
    data = replace(build_corpus(folder / "data"), sequence_length=256, global_batch_size=4, micro_batch_size=4)
    config = Config(
        name="asked", seed=3, model=MODEL, data=data,
        optim=OptimConfig(total_tokens=6 * data.tokens_per_step, warmup_tokens=data.tokens_per_step),
        train=TrainConfig(output_dir=str(folder / "runs"), precision="fp32", devices=1, nodes=1,
                          checkpoint_every_steps=3))
    pretrain(config, lambda message: None)
    return folder / "runs/asked"


def quiet(line: str) -> None:
    del line


def samples_of(out: Path, name: str = "") -> dict[tuple[str, int], Any]:
    return {(one["task"], one["doc_id"]): one for one in
            map(json.loads, (out / f"samples{name}.jsonl").read_text().splitlines())}


@pytest.fixture(scope="session")
def asked(trained_run: Path, small_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks without subjects, answered once."""
    out = tmp_path_factory.mktemp("out")
    lines = evaluate(str(trained_run), Question(SMALL), data_dir=small_tasks, out=out, samples=True, log=quiet)
    assert lines is not None and [line.name for line in lines] == [*SMALL, "average"]
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.fixture(scope="session")
def hub_folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public architecture with drawn weights, in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(trained_run / "tokenizer.json"), eos_token="<eos>",
                                        bos_token="<bos>", pad_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
