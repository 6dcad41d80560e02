"""Other writers' WebDataset tars as input, with nothing lost in silence; commands as input."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset
import zstandard

from dlcm_lightning.data.preprocessing.build import tokenize
from dlcm_lightning.data.preprocessing.formats import Reading, read_texts
from dlcm_lightning.data.preprocessing.inputs import list_inputs
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.data.preprocessing.sources import say_nothing
from tests.synthetic import make_texts

TEXTS = make_texts("english", 40)


def tar(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as made:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            made.addfile(about, io.BytesIO(content))
    return out.getvalue()


def read(path: Path | str, reading: Reading | None = None, field: str = "text") -> list[str]:
    return [str(text) for file in list_inputs([path]).files for text in read_texts(file, field, reading=reading)]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=10, verbose=0) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"{number:06d}", "txt": text, "json": {"number": number}, "cls": 1})
    reading = Reading()
    assert read(f"{tmp_path}/s-{{000..003}}.tar", reading) == TEXTS
    assert reading.account.other_members == {".json": 40, ".cls": 40} and reading.account.other_member_bytes > 40
    with webdataset.TarWriter(str(tmp_path / "j.tar.gz")) as writer:
        for number, text in enumerate(TEXTS):
            writer.write({"__key__": f"a/{number}", "json": {"body": text}})
    assert read(tmp_path / "j.tar.gz", field="body") == TEXTS


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.tar.zst"])
def test_members_of_every_kind(tmp_path: Path, name: str, format: int) -> None:
    lines = "\n".join([json.dumps({"text": "one"}), "", json.dumps({"text": None}), json.dumps({"text": "two"})])
    long = "x" * 2_000_000
    content = tar([
        ("README", b"ignored"), ("deep/er/1.txt", "naïve".encode()), ("deep/er/1.jpg", b"\xff\xd8"),
        ("deep/er/2.jsonl", lines.encode()), ("3.JSON", b'{"text": "three"}'), ("4.json", b'{"text": null}'),
        ("5.txt.gz", gzip.compress(b"five")), ("6.jsonl.zst", zstandard.compress(b'{"text": "six"}\n')),
        ("7.meta.txt", b"seven"), ("中" * 90 + ".txt", b"eight"), ("9.txt", long.encode())], format)
    pack = {"a.tar": bytes, "a.tar.zst": zstandard.compress}.get(name, gzip.compress)
    (tmp_path / name).write_bytes(pack(content))
    reading = Reading()
    found = [text if isinstance(text, str) else bytes(text.content).decode()
             for text in read_texts(list_inputs([tmp_path / name]).files[0], "text", reading=reading)]
    assert found == ["naïve", "one", "two", "three", "five", "six", "seven", "eight", long]
    assert (reading.account.nulls, reading.account.blanks) == (2, 1)
    assert reading.account.other_members == {"(no ending)": 1, ".jpg": 1}
    assert reading.account.file_bytes == {"webdataset": (tmp_path / name).stat().st_size}


def test_places_are_named(tmp_path: Path) -> None:
    for content, message in (
            ([("1.txt", b"a"), ("2.json", b"{")], r"a\.tar, sample 2: no JSON object"),
            ([("1.txt", b"a"), ("2.txt", b"\xff")], r"a\.tar, sample 2: not UTF-8"),
            ([("1.txt", b"a"), ("2.jsonl", b'{"text": "x"}\n{')], r"a\.tar, sample 2, line 2: no JSON object"),
            ([("1.txt", b"a"), ("1.txt", b"b")], "duplicate file name"),
            ([("1.jpg", b"a"), ("2.png", b"b")], "no sample holds a text"),
            ([("1.txt", b"a"), ("2.txt.gz", b"nogzip")], "sample 2: damaged")):
        (tmp_path / "a.tar").write_bytes(tar(content))
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.tar")


def test_a_tar_that_broke_off_anywhere_is_noticed(tmp_path: Path) -> None:
    whole = tar((f"{number}.txt", text.encode() * 9) for number, text in enumerate(TEXTS[:6]))
    last = len(whole.rstrip(b"\0")) + 511 & ~511
    for end in range(0, last + 1, 256):
        (tmp_path / "a.tar").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"a\.tar"):
            read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[:last + 1024])
    assert len(read(tmp_path / "a.tar")) == 6
    for broken in range(0, last, 512):  # a damaged header ends the library's reading in silence
        if whole[broken + 257:broken + 262] == b"ustar":
            (tmp_path / "a.tar").write_bytes(whole[:broken + 100] + b"\xff" * 60 + whole[broken + 160:])
            with pytest.raises(DataError, match="damaged"):
                read(tmp_path / "a.tar")


def test_more_behind_the_end_is_noticed(tmp_path: Path) -> None:
    one = tar([("1.txt", b"a")])
    (tmp_path / "a.tar").write_bytes(one + tar([("2.txt", b"b")]))
    with pytest.raises(DataError, match="there is more after the end of the tar"):
        read(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(one + bytes(100_000))
    assert read(tmp_path / "a.tar") == ["a"]


def test_commands_are_read_and_their_failure_is_an_error(tmp_path: Path, home: str, tokenizer: Tokenizer) -> None:
    for number in range(3):
        members = [(f"{number}-{place}.txt", text.encode()) for place, text in enumerate(TEXTS[number::3])]
        (tmp_path / f"p-{number}.tar").write_bytes(tar(members))
    built = tokenize([f"pipe:cat {tmp_path}/p-{{0..1}}.tar", f"pipe:gzip < {tmp_path}/p-2.tar"], tmp_path / "out",
                     Recipe("s", "d"), tokenizer_folder=home, workers=2, log=say_nothing)
    assert built is not None and built.account["documents"] == len(TEXTS)
    assert built.account["read"]["files"] == {"webdataset": 3}
    assert len({path.name[:6] for path in (tmp_path / "out/s").glob("*/*.tar")}) == 3, "each is a task of its own"
    tokenize([f"pipe:cat {tmp_path}/p-{{0..1}}.tar", f"pipe:gzip < {tmp_path}/p-2.tar"], tmp_path / "out",
             Recipe("s", "d"), log=say_nothing)
    for command in (f"pipe:cat {tmp_path}/p-0.tar; exit 3", f"pipe:head -c 3000 {tmp_path}/p-0.tar; exit 3"):
        with pytest.raises(DataError, match="exit 3"):
            tokenize([command], tmp_path / "out", Recipe("t", "d"), log=say_nothing)
    (tmp_path / "x.jsonl").write_text('{"text": "from a command"}\n')
    file, = list_inputs([f"pipe:cat {tmp_path}/x.jsonl"], reading="jsonl").files
    assert list(read_texts(file, "text")) == ["from a command"]
