"""The texts of one input file, in bounded memory, whatever its format.

    *.parquet                                  one document a row; only the column of the text is read
    *.jsonl *.ndjson, *.json.gz and such       one document a line, an object whose field holds the text
    anything else                              the file is the document: text or code, UTF-8

All but parquet may be compressed, by the end of the name: .gz, .zst, .zstd. A plain *.json is a document: it is code.
Blank lines, and texts that are null, are passed over. Whatever is not as it should be is named by file and line or
row, truncated compression too; nothing is guessed and nothing is left out in silence.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from dlcm_lightning.errors import DataError

Advance = Callable[[int], None]
"""Told how many bytes of the input file were consumed."""

READ_BYTES = 1024**2
ZSTD_BYTES = 64 * 1024
"""Compressed bytes decoded at once; what they become is held in memory."""
ZSTD_WINDOW = 2**31
"""Largest window of a frame: `zstd --long=31` writes it."""
PARQUET_ROWS = 64
"""Rows held in memory at once."""
COMPRESSED = (".gz", ".zst", ".zstd")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)


def read_texts(path: Path, text_field: str, advance: Advance = lambda _: None) -> Iterator[str]:
    """The texts of a file. advance: told of the bytes of the file as they are read, in all its size.

    DataError: damaged or truncated (named with line or row), not UTF-8, no such field, pyarrow missing, unreadable.
    """
    try:
        if path.name.lower().endswith(".parquet"):
            yield from _rows(path, text_field, advance)
        else:
            with path.open("rb", buffering=0) as raw:
                file = _decompressed(path, _Counted(raw, advance))
                yield from _lines(path, file, text_field) if _holds_lines(path) else _whole(path, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _holds_lines(path: Path) -> bool:
    name = path.name.lower()
    stem = name
    for ending in COMPRESSED:
        stem = stem.removesuffix(ending)
    return stem.endswith((".jsonl", ".ndjson")) or (stem != name and stem.endswith(".json"))


def _decompressed(path: Path, raw: io.RawIOBase) -> BinaryIO:
    file: BinaryIO = io.BufferedReader(raw, READ_BYTES)
    name = path.name.lower()
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), READ_BYTES)
    return io.BufferedReader(_Zstandard(file), READ_BYTES) if name.endswith(COMPRESSED) else file


def _whole(path: Path, file: BinaryIO) -> Iterator[str]:
    try:
        yield file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert it or leave it out") from error
    except DAMAGED as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); fetch or write the file again") from error


def _lines(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    number = 0
    try:
        for line in file:
            number += 1
            if line.isspace():
                continue
            try:
                text = json.loads(line)[field]
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise TypeError(f"field {field!r} is no text")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: no JSON object with a text field {field!r} "
                                f"({type(error).__name__}: {error}); correct the file or name the field") from error
            yield text
    except DAMAGED as error:
        raise DataError(f"{path}, line {number + 1}: damaged ({type(error).__name__}: {error}); fetch or write the "
                        "file again") from error


def _rows(path: Path, field: str, advance: Advance) -> Iterator[str]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: parquet is read with pyarrow, which is not installed; "
                        "pip install 'dlcm-lightning[parquet]'") from None
    size, row, group = path.stat().st_size, 0, -1
    try:
        with parquet.ParquetFile(path, buffer_size=READ_BYTES, page_checksum_verification=True) as file:
            columns, rows = file.schema_arrow.names, file.metadata.num_rows
            if field not in columns:
                raise DataError(f"{path}: has the columns {', '.join(columns)} and no {field!r}; name the one that "
                                "holds the text")
            advance(0 if rows else size)
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field], use_threads=False):
                    texts: list[Any] = batch.column(0).to_pylist()
                    advance(size * (row + len(texts)) // rows - size * row // rows)
                    for text in texts:
                        row += 1
                        if isinstance(text, str):
                            yield text
                        elif text is not None:
                            raise DataError(f"{path}, row {row}: column {field!r} holds {type(text).__name__}, no "
                                            "text; name the column that holds the text")
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        place = f", row group {group}, after row {row}" if group >= 0 else ""
        raise DataError(f"{path}{place}: damaged or no parquet file ({type(error).__name__}: {error}); fetch or write "
                        "the file again") from error


class _Counted(io.RawIOBase):
    """A file that tells of every byte read."""

    def __init__(self, raw: io.RawIOBase, advance: Advance) -> None:
        self._raw, self._advance = raw, advance

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int | None:
        count = self._raw.readinto(target)
        self._advance(count or 0)
        return count


class _Zstandard(io.RawIOBase):
    """Decoded Zstandard frames. EOFError where the file ends inside one, which the library's own reader lets pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._library = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._waiting = self._decoded = b""
        self._taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while self._taken == len(self._decoded):
            content = self._waiting or self._file.read(ZSTD_BYTES)
            if not content:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            frame = self._frame = self._frame or self._library.decompressobj()
            self._decoded, self._taken, self._waiting = frame.decompress(content), 0, b""
            if frame.eof:
                self._waiting, self._frame = frame.unused_data, None
        count = min(len(target), len(self._decoded) - self._taken)
        target[:count] = self._decoded[self._taken:self._taken + count]
        self._taken += count
        return count
