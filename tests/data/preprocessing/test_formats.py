"""Formats: every one gives its texts, says how much of the file it read, and names what is damaged."""

from __future__ import annotations

import gzip
import importlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dlcm_lightning.data.preprocessing.compressed import CHUNK_BYTES
from dlcm_lightning.data.preprocessing.documents import LongText
from dlcm_lightning.data.preprocessing.formats import Reading
from dlcm_lightning.data.preprocessing.formats import read_texts as read_some
from dlcm_lightning.data.preprocessing.plan import Input
from dlcm_lightning.errors import DataError
from tests.synthetic import make_texts

TEXTS = [*make_texts("english", 300), "naïve\r\n天地玄黄 🙂", "x" * 3_000_000]
LINES = "\n".join([*(json.dumps({"text": text, "other": 1}) for text in TEXTS), "", "  "]).encode()


def read_texts(file: Input | Path, field: str, advance: Callable[[int], object] = lambda _: None,
               reading: Reading | None = None) -> Iterator[str]:
    """Long texts as any other."""
    for text in read_some(file, field, advance, reading):
        yield bytes(text.content).decode("utf-8", "surrogatepass") if isinstance(text, LongText) else text


def frames(content: bytes) -> bytes:
    """Two frames, the second without its size in the header."""
    half = len(content) // 2
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    return zstandard.compress(content[:half]) + stream.compress(content[half:]) + stream.flush()


def parquet(path: Path, texts: list[str | None], **columns: list[object]) -> None:
    table = pyarrow.table({"other": list(range(len(texts))), "text": texts, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=100, use_dictionary=False, write_page_checksum=True)


LINE_FORMATS: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes, "a.ndjson": bytes, "A.JSONL": bytes, "a.jsonl.gz": gzip.compress, "a.json.gz": gzip.compress,
    "a.jsonl.zst": frames, "a.jsonl.zstd": frames, "a.json.zst": frames,
    "two.jsonl.gz": lambda content: gzip.compress(content[:999]) + gzip.compress(content[999:]),
}


@pytest.mark.parametrize("name", [*LINE_FORMATS, "a.parquet"])
def test_a_file_of_many_documents_gives_its_texts_and_its_size(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, list(TEXTS))
    else:
        path.write_bytes(LINE_FORMATS[name](LINES))
    read: list[int] = []
    assert list(read_texts(path, "text", read.append)) == TEXTS
    assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.json", "Makefile", "a.txt.gz", "a.md.zst"])
def test_any_other_file_is_one_document(tmp_path: Path, name: str) -> None:
    text = '{"text": 1}\r\nnaïve\n天地\n'
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(text.encode())
    (tmp_path / name).write_bytes(packed)
    read: list[int] = []
    assert list(read_texts(tmp_path / name, "text", read.append)) == [text]
    assert sum(read) == len(packed)


def test_a_byte_order_mark_is_no_text_and_null_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "one"}\n')
    parquet(tmp_path / "a.parquet", [None, "one"])
    assert list(read_texts(tmp_path / "a.txt", "text")) == ["text"]
    assert list(read_texts(tmp_path / "a.jsonl", "text")) == list(read_texts(tmp_path / "a.parquet", "text")) == ["one"]


def test_an_empty_file_holds_nothing_and_is_no_compressed_one(tmp_path: Path) -> None:
    empty = (("a.jsonl", b""), ("a.jsonl.zst", zstandard.compress(b"")), ("b.jsonl.gz", gzip.compress(b"")))
    for name, content in empty:
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(tmp_path / name, "text")) == []
    for name in ("c.jsonl.zst", "c.jsonl.gz", "c.txt.gz"):  # as after a failed download; gzip -t refuses it
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=rf"{name}.*damaged .*the file is empty"):
            list(read_texts(tmp_path / name, "text"))
    parquet(tmp_path / "a.parquet", [])
    assert list(read_texts(tmp_path / "a.parquet", "text")) == []


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": 5}', "field 'text' holds a int and no text"), ('{"txt": "a"}', "KeyError: 'text'"),
    ('"a"', "holds a str and no object"), ('{"text": "a"', "JSONDecodeError"), ("[1]", "holds a list"),
    ("7", "holds a int"), ("[" * 100_000, "holds no object"), ('{"text": "\xff"}', "UnicodeDecodeError"),
    ('{"a": ' + "[" * 100_000, "ValueError"), ('{"text": "' + "x" * 2**20 + '", "b": "\\x"}', "unknown escape"),
    ('{"a": "' + "\xff" * 2**20 + '"}', "UnicodeDecodeError")])
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "good"}\n\n' + line.encode("latin-1")))
    texts = read_texts(tmp_path / "x.jsonl.zst", "text")
    assert next(texts) == "good"
    with pytest.raises(DataError, match=rf"x\.jsonl\.zst, line 3: no JSON object .*{message}"):
        next(texts)


@pytest.mark.parametrize(("name", "cut", "error"), [
    ("x.jsonl.gz", -5, "EOFError"), ("x.jsonl.zst", -5, "EOFError"), ("x.jsonl.zst", CHUNK_BYTES, "EOFError"),
    ("x.txt.gz", -5, "EOFError"), ("x.txt.zst", -5, "EOFError")])
def test_truncated_compression_is_named(tmp_path: Path, name: str, cut: int, error: str) -> None:
    noise = random.Random(0).randbytes(400_000).hex()
    packed = (gzip.compress if name.endswith(".gz") else frames)(LINES + json.dumps({"text": noise}).encode())
    (tmp_path / name).write_bytes(packed[:cut])
    with pytest.raises(DataError, match=rf"{name}.*: damaged \({error}"):
        list(read_texts(tmp_path / name, "text"))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.txt.gz", "x.parquet"])
def test_what_is_not_what_its_name_says_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such thing at all" * 10)
    with pytest.raises(DataError, match=rf"{name}.*damaged"):
        list(read_texts(tmp_path / name, "text"))


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        list(read_texts(tmp_path / "latin.txt", "text"))


def test_a_damaged_row_group_is_named_after_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet(path, list(TEXTS[:300]))
    with pyarrow.parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(1)
        at = column.data_page_offset + column.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    texts = read_texts(path, "text")
    assert [next(texts) for _ in range(100)] == TEXTS[:100]
    with pytest.raises(DataError, match=r"x\.parquet, row group 1, after row 100: damaged"):
        next(texts)


def test_a_column_that_is_not_there_or_holds_no_text_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", ["a", "b"])
    with pytest.raises(DataError, match=r"x\.parquet: has the columns other, text and no 'body'"):
        list(read_texts(tmp_path / "x.parquet", "body"))
    with pytest.raises(DataError, match=r"x\.parquet, row 1: column 'other' holds int"):
        list(read_texts(tmp_path / "x.parquet", "other"))


def test_without_pyarrow_parquet_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, package)

    parquet(tmp_path / "x.parquet", ["a"])
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(DataError, match=r"x\.parquet: .*pip install 'dlcm-lightning\[parquet\]'"):
        list(read_texts(tmp_path / "x.parquet", "text"))


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.txt", "x.parquet"):
        with pytest.raises(DataError, match=rf"{name}: cannot be read"):
            list(read_texts(tmp_path / name, "text"))
