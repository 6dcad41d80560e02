"""Merging: copies are left out over all tasks and shards, the first stays, and a merge can die at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.data.manifest import SKIP_COLUMNS, build_index
from dlcm_lightning.data.preprocessing import merge as merging
from dlcm_lightning.data.preprocessing.account import Account
from dlcm_lightning.data.preprocessing.continuing import save_inputs
from dlcm_lightning.data.preprocessing.documents import SPLITS, split_of
from dlcm_lightning.data.preprocessing.duplicates import Marks, find_duplicates
from dlcm_lightning.data.preprocessing.inputs import Listing
from dlcm_lightning.data.preprocessing.merge import merge, merge_build, unfinished
from dlcm_lightning.data.preprocessing.plan import Plan
from dlcm_lightning.data.preprocessing.records import Record, write_record
from dlcm_lightning.data.preprocessing.writer import ShardWriter
from dlcm_lightning.errors import DataError

TASKS = [[0, 1, 2, 1, 3], [3, 0, 0, 1], [4, 5, 6, 7, 8, 9, 4], [], [9, 10, 2, 6, 11]]
"""Documents of each task, by number; 3, 0, 0, 1 are all copies."""
SHARE = 0.3


def identity(number: int) -> bytes:
    return hashlib.md5(bytes([number])).digest()


def ids(number: int) -> np.ndarray:
    return np.full(5 + number, number + 20)


def build(folder: Path, tasks: list[list[int]] = TASKS, done: int | None = None) -> Path:
    """An unfinished build of those documents, with shards of a few of them; returns its working folder."""
    working = unfinished(folder)
    (working / "tasks").mkdir(parents=True)
    save_inputs(working, Listing())
    Plan("s", "d", "f", 300, "text", SHARE, 40, 12, task_bytes=1, about={"licence": "mine"},
         names=tuple(f"{number}.txt" for number in range(len(tasks))), sizes=(1,) * len(tasks)).save(working)
    for task, documents in enumerate(tasks[:done]):
        writers = {split: ShardWriter(working / split, vocab_size=300, task=task, shard_bytes=40, block_tokens=12)
                   for split in SPLITS}
        for number in documents:
            writers[split_of(identity(number), SHARE)].write(ids(number), identity(number), 100 + number)
        counts = {split: len(writer.close()) for split, writer in writers.items()}
        account = Account(texts={"text": len(documents)}, text_bytes=sum(100 + number for number in documents))
        write_record(working, task, Record(counts, (f"{task}.txt",), ("0" * 64,), account))
    return working


def numbers_of(folder: Path, split: str) -> Iterator[int]:
    """The documents of the stream, by number, as the manifest and NAME.skip give it."""
    shards = json.loads((folder / split / "manifest.json").read_text())["shards"]
    for name in shards["name"]:
        path = folder / split / name
        skip = path.with_suffix(".skip")
        rows = np.fromfile(skip, "<i8").reshape(-1, SKIP_COLUMNS).tolist() if skip.is_file() else []
        assert rows == sorted(rows)
        content = path.read_bytes()
        for block, (at, count, lengths_at, documents) in enumerate(build_index(path).tolist()):
            tokens = np.frombuffer(content[at:at + 2 * count], "<u2")
            lengths = np.frombuffer(content[lengths_at:lengths_at + 4 * documents], "<u4").tolist()
            begin = 0
            for place, length in enumerate(lengths):
                if [block, place, begin, length] in rows:
                    rows.remove([block, place, begin, length])
                else:
                    yield int(tokens[begin]) - 20
                begin += length
        assert not rows


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_first_of_equal_documents_stays_across_tasks_and_shards(tmp_path: Path) -> None:
    build(tmp_path / "s")
    merged = merge(tmp_path, "s")
    stream = list(dict.fromkeys(number for documents in TASKS for number in documents))
    for split, manifest in zip(SPLITS, (merged.train, merged.validation), strict=True):
        wanted = [number for number in stream if split_of(identity(number), SHARE) == split]
        assert len(wanted) > 1 and list(numbers_of(tmp_path / "s", split)) == wanted
        assert manifest.documents == len(wanted)
        assert manifest.tokens == sum(len(ids(number)) for number in wanted)
        assert manifest.text_bytes == sum(100 + number for number in wanted)
        assert manifest.about == {"licence": "mine"}
        for shard in manifest.shards:
            path = tmp_path / "s" / split / shard.name
            assert (sha256_of(path), path.stat().st_size) == (shard.sha256, shard.size)
            held = build_index(path)
            assert held[:, 1].sum() == shard.tokens + shard.skipped_tokens
            assert held[:, 3].sum() == shard.documents + shard.skipped_documents and len(held) == shard.blocks
            if shard.skipped_documents:
                assert shard.skip_sha256 == sha256_of(path.with_suffix(".skip"))
            else:
                assert not shard.skip_sha256 and not path.with_suffix(".skip").exists()
    assert merged.train.shards.total("skipped_documents")
    copies = sum(map(len, TASKS)) - len(stream)
    assert merged.duplicates == merged.account["copies"] == copies, "those in shards that are gone are counted too"
    assert merged.account["copied_bytes"] == sum(100 + number for task in TASKS for number in task) - sum(
        100 + number for number in stream)
    names = {path.name for path in (tmp_path / "s" / "train").iterdir()}
    assert not any(name.startswith("000001") for name in names), "shards of nothing but copies are removed"
    assert {name.split(".")[-1] for name in names} == {"tar", "index", "hashes", "skip", "json"}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 20])
def test_any_bound_of_memory_gives_the_same_bytes(tmp_path: Path, chunk: int) -> None:
    for place, size in (("a", 10**6), ("b", chunk)):
        build(tmp_path / place / "s")
        merge_build(tmp_path / place / "s", chunk_documents=size)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("chunk", [7, 64, 1000, 5000, 10**6])
def test_duplicates_are_those_a_set_finds(tmp_path: Path, chunk: int) -> None:
    random = np.random.default_rng(0)
    hashes = random.integers(0, 40, (5000, 2)).astype(np.uint64) * np.uint64(2**58 + 12345)
    hashes[2000:4000] = hashes[0]  # one hash far oftener than a bucket holds
    seen: set[tuple[int, int]] = set()
    wanted = [tuple(row) in seen or bool(seen.add(tuple(row))) for row in hashes.tolist()]
    passed: list[int] = []
    parts = np.split(hashes, [0, 10, 11, 3000, 3000])
    marks = find_duplicates(parts, 5000, tmp_path / "x", chunk_documents=chunk, advance=passed.append)
    assert marks.of(0, 5000).tolist() == wanted and sum(passed) == 5000
    assert marks.of(2003, 77).tolist() == wanted[2003:2080]
    assert not (tmp_path / "x").exists()
    with pytest.raises(DataError, match="5000 hashes of 5001 documents"):
        find_duplicates(parts, 5001, tmp_path / "x", chunk_documents=chunk)


def test_hashes_that_share_a_half_are_not_the_same(tmp_path: Path) -> None:
    hashes = np.array([[1, 2], [1, 3], [2, 2], [3, 1], [1, 2]], dtype=np.uint64)
    for chunk in (1, 2, 10):
        marks = find_duplicates([hashes], 5, tmp_path / "x", chunk_documents=chunk)
        assert marks.of(0, 5).tolist() == [False, False, False, False, True]
    assert not Marks(3).of(0, 3).any()


def test_unfinished_tasks_are_listed(tmp_path: Path) -> None:
    working = build(tmp_path / "s", done=3)
    with pytest.raises(DataError, match=r"\.s\.unfinished: 2 of 5 tasks are unfinished: 3, 4; run `dlcm tokenize`"):
        merge(tmp_path, "s")
    (working / "tasks" / "000001.done").unlink()
    with pytest.raises(DataError, match="3 of 5 tasks are unfinished: 1, 3, 4"):
        merge(tmp_path, "s")
    assert not (tmp_path / "s").exists()


def test_shards_that_went_missing_or_were_cut_short_are_named(tmp_path: Path) -> None:
    working = build(tmp_path / "s")
    shard = working / "train" / "000002-00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"000002-00000\.tar: {len(whole) - 1} bytes, {len(whole)} were written"):
        merge(tmp_path, "s")
    shard.unlink()
    with pytest.raises(DataError, match=r"cannot be merged .*000002-00000\.tar"):
        merge(tmp_path, "s")
    shard.with_suffix(".entry").unlink()
    with pytest.raises(DataError, match=r"task 2 wrote \d shards and 0 are there; remove .*000002\.done"):
        merge(tmp_path, "s")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_merge_that_dies_at_any_moment_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "whole" / "s")
    shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    merge(tmp_path / "whole", "s")
    wanted = contents(tmp_path / "whole")
    left = 0

    def dying(real: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*arguments, **named)  # type: ignore[operator]
        return call

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    monkeypatch.setattr(merging.shutil, "rmtree", dying(shutil.rmtree))
    moment, finished = 0, False
    while not finished:
        out = tmp_path / "again"
        if out.exists():
            os.rename(out, tmp_path / f"old-{moment}")
        shutil.copytree(tmp_path / "begun", out)
        left = moment
        try:
            merge(out, "s")
            finished = True
        except Killed:
            left = 10**9
            merge(out, "s")
        assert contents(out) == wanted
        moment += 1
    assert moment > 30


def test_a_build_without_a_document_is_refused_and_cleared(tmp_path: Path) -> None:
    build(tmp_path / "s", [[], []])
    with pytest.raises(DataError, match="no document with text in it"):
        merge(tmp_path, "s")
    assert not list(tmp_path.iterdir())
