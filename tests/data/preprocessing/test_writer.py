"""The shard writer: the format as others read it, what it refuses, and that it goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.data.manifest import build_index, parse_manifest
from dlcm_lightning.data.preprocessing.writer import ShardWriter, finished_shards
from dlcm_lightning.errors import DataError
from tests.synthetic import write_split

DOCUMENTS = [np.arange(length) for length in (1, 30, 7, 64, 2, 2, 90, 11, 5, 40, 33, 3)]


def identity(number: int) -> bytes:
    return hashlib.md5(bytes([number])).digest()


def write(folder: Path, first: int = 0, last: int = len(DOCUMENTS), finish: bool = True) -> ShardWriter:
    """Documents [first, last) of those not yet in finished shards, in shards of 100 tokens and blocks of 25."""
    writer = ShardWriter(folder, vocab_size=300, task=7, shard_bytes=200, block_tokens=25)
    for number in range(first, last):
        if not writer.has(identity(number)):
            writer.write(DOCUMENTS[number], identity(number), 1000 + number)
    writer.close() if finish else writer.abandon()
    return writer


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_shard_is_a_tar_of_blocks_with_sidecars_that_agree(tmp_path: Path) -> None:
    writer = write(tmp_path)
    names = [shard.name for shard in writer.shards]
    assert names == ["000007-00000.tar", "000007-00001.tar", "000007-00002.tar"]
    lengths, tokens, hashes, sizes = [], [], b"", []
    for shard in writer.shards:
        path = tmp_path / shard.name
        index = np.fromfile(path.with_suffix(".index"), "<i8").reshape(-1, 4)
        assert np.array_equal(index, build_index(path)) and len(index) == shard.blocks
        assert (sha256_of(path), path.stat().st_size) == (shard.sha256, shard.size)
        assert shard.size % tarfile.RECORDSIZE == 0
        for at, count, lengths_at, documents in index.tolist():
            content = path.read_bytes()
            tokens += np.frombuffer(content[at:at + 2 * count], "<u2").tolist()
            lengths += np.frombuffer(content[lengths_at:lengths_at + 4 * documents], "<u4").tolist()
        hashes += path.with_suffix(".hashes").read_bytes()
        sizes += np.fromfile(path.with_suffix(".sizes"), "<i8").tolist()
        assert shard.tokens == index[:, 1].sum() and shard.documents == index[:, 3].sum()
    assert lengths == list(map(len, DOCUMENTS)) and tokens == np.concatenate(DOCUMENTS).tolist()
    numbers = range(len(DOCUMENTS))
    assert hashes == b"".join(map(identity, numbers)) and sizes == [1000 + number for number in numbers]
    assert sum(shard.text_bytes for shard in writer.shards) == sum(sizes)


def test_tar_members_say_nothing_of_who_wrote_them_and_when(tmp_path: Path) -> None:
    write(tmp_path)
    with tarfile.open(tmp_path / "000007-00000.tar") as tar:
        assert tar.getnames()[:2] == ["00000000.lengths.u32", "00000000.tokens.u16"]
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "dlcm", 0o444)}


def test_the_tar_is_the_one_the_standard_library_writes(tmp_path: Path) -> None:
    write(tmp_path)
    path, ours = tmp_path / "000007-00001.tar", io.BytesIO()
    with tarfile.open(path) as tar, tarfile.open(fileobj=ours, mode="w", format=tarfile.PAX_FORMAT) as copy:
        for member in tar:
            copy.addfile(member, tar.extractfile(member))
    assert ours.getvalue() == path.read_bytes()


@pytest.mark.parametrize("killed_after", range(len(DOCUMENTS) + 1))
def test_an_interrupted_writer_goes_on_after_its_finished_shards(tmp_path: Path, killed_after: int) -> None:
    write(tmp_path / "whole")
    write(tmp_path / "broken", last=killed_after, finish=False)
    kept = {shard.name: (tmp_path / "broken" / shard.name).stat() for shard in finished_shards(tmp_path / "broken", 7)}
    write(tmp_path / "broken")
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    for name, before in kept.items():
        after = (tmp_path / "broken" / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "a finished shard was redone"
    assert bool(kept) == (killed_after >= 4)


@pytest.mark.parametrize("lost", ["entry", "tar"])
def test_a_shard_without_its_record_is_not_finished(tmp_path: Path, lost: str) -> None:
    write(tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "000007-00001.entry").unlink()
    if lost == "tar":
        (tmp_path / "000007-00001.tar").write_bytes(b"half")
    assert [shard.name for shard in finished_shards(tmp_path, 7)] == ["000007-00000.tar"]
    write(tmp_path)
    assert contents(tmp_path) == whole


def test_other_documents_than_those_in_finished_shards_are_noticed(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="task 7 hold other documents than its inputs do now; restore"):
        write(tmp_path, first=1)
    with pytest.raises(DataError, match="hold more documents than its inputs do now"):
        write(tmp_path, last=9)


def test_a_record_that_is_no_record_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "000007-00000.entry").write_text('{"name": 1}')
    with pytest.raises(DataError, match=r"000007-00000\.entry: not the record of a shard"):
        write(tmp_path)


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, [(np.array([0, 99_999, 1]), 5)], vocab_size=100_000)
    assert manifest.dtype == "uint32"
    with tarfile.open(tmp_path / "000000-00000.tar") as tar:
        assert tar.getnames() == ["00000000.lengths.u32", "00000000.tokens.u32"]
    assert parse_manifest((tmp_path / "manifest.json").read_bytes(), "").tokens == 3


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, vocab_size=300)
    for ids in (np.array([0, 300]), np.array([-1, 5]), np.array([], dtype=np.int64)):
        with pytest.raises(DataError, match=r"outside \[0, 300\)"):
            writer.write(ids, identity(0), 1)


def test_a_split_without_documents_is_a_manifest_without_shards(tmp_path: Path) -> None:
    assert len(write_split(tmp_path, []).shards) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
