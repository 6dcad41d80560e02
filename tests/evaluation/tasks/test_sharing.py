"""Work that ranks share and that survives them: the same answers, whoever gives them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.cluster.world import free_port
from dlcm_lightning.errors import DataError, RunError
from dlcm_lightning.evaluation.tasks.evaluate import evaluate, what
from dlcm_lightning.evaluation.tasks.harness import HubLM
from dlcm_lightning.evaluation.tasks.models import Question
from dlcm_lightning.evaluation.tasks.scoring import Request, Scorer
from dlcm_lightning.evaluation.tasks.sharing import Answers
from tests.evaluation.tasks.conftest import SMALL, only, quiet, samples_of


def test_what_is_answered_is_not_computed_twice_and_the_rest_is_the_same(
        asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that lost its end, as by a kill in the middle of a line."""
    shutil.copytree(asked, tmp_path / "out")
    file = only(tmp_path / "out", "answers/*/rank-00000.jsonl")
    kept = file.read_bytes().splitlines(keepends=True)
    batches: list[int] = []
    before = Scorer.score_batch

    def counted(self: Scorer, requests: list[Request]) -> Any:
        batches.append(len(requests))
        return before(self, requests)

    monkeypatch.setattr(Scorer, "score_batch", counted)
    question = Question(SMALL)

    def again() -> dict[tuple[str, int], Any]:
        batches.clear()
        evaluate(str(trained_run), question, data_dir=small_tasks, out=tmp_path / "out", samples=True, log=quiet)
        return samples_of(tmp_path / "out", what(question))

    whole = samples_of(asked, what(question))
    assert again() == whole and batches == []
    assert len(kept) >= 1
    file.write_bytes(b"".join(kept[:-1]) + kept[-1][: len(kept[-1]) // 2])
    assert again() == whole and len(batches) == 1
    assert again() == whole and batches == [], "what was written after the torn line is read"
    for other in (Question(SMALL, "half"), Question(SMALL, batch_tokens=512)):
        batches.clear()
        evaluate(str(trained_run), other, data_dir=small_tasks, out=tmp_path / "out", log=quiet)
        assert batches, "another question has answers of its own"


def ranks(arguments: list[str], out: Path, count: int = 2) -> list[str]:
    """What each rank says."""
    command = [sys.executable, "-m", "dlcm_lightning", "evaluate", *arguments, "--out", str(out), "--samples"]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "DLCM_DEVICE": "cpu", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = [subprocess.Popen(command, env={**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(count)]
    said = [rank.communicate(timeout=240)[0] for rank in started]
    assert [rank.returncode for rank in started] == [0] * count, said
    return said


def test_two_ranks_answer_as_one(asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    """Bit for bit: batches are planned for all, and go round."""
    said = ranks([str(trained_run), "--tasks", ",".join(SMALL), "--data-dir", str(small_tasks), "--batch-tokens",
                  "512"], tmp_path)
    assert "average of 9" in said[0] and "average" not in said[1]
    assert len(list(tmp_path.glob("answers/*/rank-*.jsonl"))) == 2
    evaluate(str(trained_run), Question(SMALL, batch_tokens=512), data_dir=small_tasks, out=tmp_path / "alone",
             samples=True, log=quiet)
    name = what(Question(SMALL))
    assert samples_of(tmp_path, name) == samples_of(tmp_path / "alone", name)
    other = samples_of(asked, name)  # other batches: equal but for rounding
    for key, sample in samples_of(tmp_path, name).items():
        for (one,), (two,) in zip(sample["resps"], other[key]["resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5)


def test_ranks_share_a_hugging_face_model_once(hub_folder: Path, small_tasks: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's class would share questions itself where it sees ranks and GPUs."""
    names = ("piqa", "boolq")
    ranks(["--model", f"hf:{hub_folder}", "--tasks", ",".join(names), "--data-dir", str(small_tasks)], tmp_path)
    evaluate(f"hf:{hub_folder}", Question(names), data_dir=small_tasks, out=tmp_path / "alone", samples=True,
             log=quiet)
    assert samples_of(tmp_path, what(Question(names))) == samples_of(tmp_path / "alone", what(Question(names)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    lm = HubLM(str(hub_folder), "cpu", "float32", 8, None, False)
    assert (lm.rank, lm.world_size) == (0, 1) and os.environ["RANK"] == "1"


def test_ranks_with_other_questions_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = Answers(tmp_path, None)
    monkeypatch.setattr(answers, "_gathered", lambda mine: [mine, mine + "x"] if isinstance(mine, str) else [mine])
    with pytest.raises(DataError, match="other questions than each other"):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], lambda batch: [[0.0, True]])


def test_a_failure_is_told_to_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = Answers(tmp_path, None)
    told: list[Any] = []
    monkeypatch.setattr(answers, "_gathered", lambda mine: told.append(mine) or [mine])

    def fails(batch: list[Any]) -> list[Any]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], fails)
    assert told[-1] == ({}, "MemoryError: no room")
    monkeypatch.setattr(answers, "_gathered", lambda mine: [mine, ({}, "MemoryError: no room")]
                        if isinstance(mine, tuple) else [mine])
    with pytest.raises(RunError, match=r"rank 1 has failed \(MemoryError: no room\)"):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], lambda batch: [[0.0, True]])
