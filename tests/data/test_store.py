"""Shards behind fsspec: the same rows, few and large reads, a bounded cache, stores that fail or are slow."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dlcm_lightning.config import DataConfig
from dlcm_lightning.data import store
from dlcm_lightning.data.loader import TrainingBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.store import Chunks, LocalStore, RemoteStore
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY


class Faulty(MemoryFileSystem):
    """An object store that can be told to fail, to be slow, to lose files; it notes what was asked of it."""

    protocol = "faulty"
    cachable = False
    failures: ClassVar[dict[str, int]] = {}
    """Ends of names -> how often asking for them fails before it works."""
    seconds = 0.0
    asked: ClassVar[list[tuple[str, int | None, int | None]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("faulty://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        Faulty.asked.append((path, start, end))
        time.sleep(Faulty.seconds)
        for name, count in Faulty.failures.items():
            if path.endswith(name) and count:
                Faulty.failures[name] -= 1
                raise RuntimeError("the bucket is on fire")
        content: bytes = super().cat_file(path, start=start, end=end, **options)
        return content


fsspec.register_implementation("faulty", Faulty, clobber=True)


@pytest.fixture
def address(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The corpus in the store."""
    for path in Path(config.root).rglob("*"):
        if path.is_file():
            MemoryFileSystem().pipe_file(f"/bucket/{path.relative_to(config.root)}", path.read_bytes())
    monkeypatch.setattr(Faulty, "failures", {})
    monkeypatch.setattr(Faulty, "seconds", 0.0)
    monkeypatch.setattr(Faulty, "asked", [])
    monkeypatch.setattr(store, "FIRST_PAUSE_SECONDS", 0.001)
    yield "faulty://bucket"
    MemoryFileSystem().rm("/bucket", recursive=True)


def remote(config: DataConfig, address: str, **changes: object) -> Reader:
    return Reader(replace(config, root=address, **changes), 7, VOCABULARY)  # type: ignore[arg-type]


def tokens_of(reader: Reader, steps: range) -> list[list[int]]:
    return [batch.tokens.tolist() for batch in TrainingBatches(reader, 0, 1, steps.start, steps.stop)]


def test_a_remote_corpus_gives_the_rows_of_a_local_one(config: DataConfig, address: str) -> None:
    local, far = Reader(config, 7, VOCABULARY), remote(config, address)
    assert tokens_of(far, range(6)) == tokens_of(local, range(6))
    assert far.fingerprint == local.fingerprint
    assert far.fixed_documents("zh") == local.fixed_documents("zh")
    assert far.validation_batch([0, 3]).tokens.tolist() == local.validation_batch([0, 3]).tokens.tolist()
    travelled = pickle.loads(pickle.dumps(far))
    assert tokens_of(travelled, range(3)) == tokens_of(local, range(3))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_loader_processes_read_a_remote_corpus_too(config: DataConfig, address: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 10.0)
    far = remote(config, address)
    tokens_of(far, range(2))  # threads of this process are running when the others are forked
    far.chunks._held.clear()
    there = [batch.tokens.tolist() for batch in TrainingBatches(far, 0, 1, 0, 6, workers=2)]
    assert there == tokens_of(Reader(config, 7, VOCABULARY), range(6))


def test_a_shard_is_fetched_in_large_pieces_and_each_piece_once(config: DataConfig, address: str) -> None:
    assert store.CHUNK_BYTES >= 1024**2
    reader = remote(config, address)
    Faulty.asked.clear()
    tokens_of(reader, range(40))
    pieces = [(path, start) for path, start, _ in Faulty.asked if path.endswith(".tar")]
    assert pieces and len(set(pieces)) == len(pieces), "a shard of one piece is asked for once"
    for path, start, end in Faulty.asked:
        if path.endswith(".tar"):
            size = MemoryFileSystem().size(path)
            assert start is not None and end is not None and (end - start >= 1024**2 or (start, end) == (0, size))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 100), (99, 101), (250, 1000), (0, 1000), (900, 1000)])
def test_any_range_of_a_remote_file_comes_out_of_its_chunks(monkeypatch: pytest.MonkeyPatch, address: str, start: int,
                                                            stop: int) -> None:
    content = bytes(np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8))
    MemoryFileSystem().pipe_file("/bucket/file", content)
    monkeypatch.setattr(store, "CHUNK_BYTES", 100)
    folder = RemoteStore(address, Chunks(300))
    assert folder.size("file") == 1000 and folder.whole("file") == content and folder.exists("file")
    assert folder.open("file", 1000).read(start, stop) == content[start:stop]
    with pytest.raises(OSError, match="the file has 1000 bytes"):
        folder.open("file", 1000).read(990, 1001)


def test_the_cache_never_holds_more_than_its_bound(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    MemoryFileSystem().pipe_file("/bucket/file", bytes(10_000))
    monkeypatch.setattr(store, "CHUNK_BYTES", 100)
    chunks = Chunks(1000)
    content = RemoteStore(address, chunks).open("file", 10_000)
    for place in range(0, 10_000, 50):
        content.read(place, place + 50)
        assert len(chunks._held) <= 10
    asked = len(Faulty.asked)
    assert asked == 100
    content.read(9900, 10_000)
    assert len(Faulty.asked) == asked, "the newest are kept"
    content.read(0, 100)
    assert len(Faulty.asked) == asked + 1, "the oldest are gone"


def test_rows_of_steps_to_come_are_fetched_before_they_are_read(config: DataConfig, address: str) -> None:
    """While step 0 is in the hands of the consumer, threads fetch what steps 1 and 2 need, and nothing else does."""
    reader = remote(config, address, read_ahead_steps=2)
    batches = iter(TrainingBatches(reader, 0, 1, 0, 10))
    next(batches)
    deadline = time.monotonic() + 20
    while any(not future.done() for future in list(reader.chunks._held.values())) or not reader.chunks._wanted.empty():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    Faulty.asked.clear()
    for step in (1, 2):
        reader.read_steps(step, step + 1)
    assert not Faulty.asked


def test_the_main_thread_fetches_nothing_of_a_shard_itself(config: DataConfig, address: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    original = store._range

    def noted(*arguments: object) -> bytes:
        names.add(threading.current_thread().name)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_range", noted)
    tokens_of(remote(config, address), range(3))
    assert names == {"fetch"}


def test_a_store_that_fails_now_and_then_is_asked_again(config: DataConfig, address: str) -> None:
    reader = remote(config, address)
    Faulty.failures = {"00000.tar": 2, ".index": 3}
    assert tokens_of(reader, range(3)) == tokens_of(Reader(config, 7, VOCABULARY), range(3))
    assert Faulty.failures == {"00000.tar": 0, ".index": 0}


def test_a_store_that_keeps_failing_is_an_error_that_names_shard_and_sample(config: DataConfig, address: str) -> None:
    reader = remote(config, address)
    Faulty.failures = {".tar": 10**9}
    with pytest.raises(DataError, match=r"sample \d+ \(row \d+ of source '[ab]'\): faulty://bucket/[ab]/train/"
                                        r".*\.tar: cannot be read \(RuntimeError: the bucket is on fire\)"):
        tokens_of(reader, range(3))


def test_a_store_that_does_not_answer_is_an_error_in_time(config: DataConfig, address: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    reader = remote(config, address)
    tokens_of(reader, range(1))
    reader.chunks._held.clear()
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.2)
    Faulty.seconds = 2.0
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be read \(no answer within 0\.2 s\)"):
        reader.read_steps(5, 6)
    assert time.monotonic() - began < 60


def test_a_lost_object_is_not_asked_for_again_and_again(config: DataConfig, address: str) -> None:
    reader = remote(config, address)
    for path in MemoryFileSystem().find("/bucket/a/train"):
        if path.endswith(".tar"):
            MemoryFileSystem().rm_file(path)
    with pytest.raises(DataError, match=r"a/train/.*\.tar: missing, though the manifest lists it"):
        tokens_of(reader, range(3))


def test_a_chunk_that_failed_is_fetched_anew_by_the_next_read(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    MemoryFileSystem().pipe_file("/bucket/file", b"x" * 100)
    content = RemoteStore(address, Chunks(10**9)).open("file", 100)
    Faulty.failures = {"file": store.TRIES}
    with pytest.raises(OSError, match="on fire"):
        content.read(0, 100)
    assert content.read(0, 100) == b"x" * 100


def test_a_file_that_shrinks_under_the_reader_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    content = LocalStore(tmp_path).open("file", 1000)
    assert content.read(900, 1000) == b"x" * 100
    os.truncate(tmp_path / "file", 950)
    with pytest.raises(OSError, match="ends at byte 950, bytes up to 1000"):
        content.read(900, 1000)
