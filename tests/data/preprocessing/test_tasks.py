"""A task reads, encodes and writes at the same time, and tells of what is tokenised only; workers share the cores."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.data.preprocessing.plan import Plan
from dlcm_lightning.data.preprocessing.tasks import Task
from dlcm_lightning.data.preprocessing.worker_pool import cores, default_workers, threads_of
from dlcm_lightning.data.text_encoder import Encoder
from dlcm_lightning.data.tokenizer import Tokenizer


@pytest.fixture
def task(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Its batches are of ten characters or more."""
    monkeypatch.setattr("dlcm_lightning.data.preprocessing.tasks.BATCH_CHARACTERS", 10)
    return Task(Plan(source="s", domain="d", tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                     text_field="text", validation_share=0.0, shard_bytes=10**6, block_tokens=1000), tmp_path, 0)


def test_the_next_batch_is_read_while_one_is_encoded(task: Task, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    second_was_read = threading.Event()
    encode = Encoder.encode_documents

    def slow(self: Encoder, texts: Sequence[str]) -> list[np.ndarray]:
        assert second_was_read.wait(timeout=20), "nothing is read until a batch is encoded"
        return encode(self, texts)

    def texts() -> Iterator[str]:
        yield "the first document"
        second_was_read.set()
        yield "the second document"

    monkeypatch.setattr(Encoder, "encode_documents", slow)
    task.write(texts(), tokenizer.encoder, lambda *_: None, threads=1)


def test_a_meter_hears_of_a_batch_once_it_is_encoded_and_of_no_byte_that_is_only_read(
        task: Task, tokenizer: Tokenizer) -> None:
    texts = ["the first document", "a second one, longer", "天地玄黄，宇宙洪荒"]
    told: list[tuple[int, int]] = []
    task.write(texts, tokenizer.encoder, lambda *counts: told.append(counts), threads=1)
    lengths = [len(ids) for ids in tokenizer.encode_documents(texts)]
    assert told == [(len(text.encode()), length) for text, length in zip(texts, lengths, strict=True)]


@pytest.mark.parametrize(("count", "workers", "threads"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (6, 2, 3), (64, 16, 4)])
def test_workers_share_the_cores_and_fewer_of_them_use_fewer(
        count: int, workers: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlcm_lightning.data.preprocessing.worker_pool.cores", lambda: count)
    assert (default_workers(), threads_of(workers)) == (workers, threads)
    assert threads_of(count) == threads_of(3 * count) == 1 and threads_of(1) == min(count, 4)


@pytest.mark.parametrize(("asked", "found"), [("1", 1), ("1000", None), ("", None), ("0", None), ("two", None)])
def test_a_slurm_task_takes_no_more_cores_than_it_asked_for(asked: str, found: int | None,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", asked)
    assert cores() == (found or len(os.sched_getaffinity(0)))
