"""The texts of one input, in bounded memory, whatever its format (kinds.py).

Blank lines, and texts that are null, are passed over and counted. Whatever is not as it should be is named by file and
line, row or sample, truncated compression too; nothing is guessed and nothing is left out in silence. A document is at
most a gibibyte long, wherever it comes from.
"""

from __future__ import annotations

import codecs
import importlib
import io
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dlcm_lightning.data.preprocessing.account import Account
from dlcm_lightning.data.preprocessing.compressed import DAMAGED, decompressed
from dlcm_lightning.data.preprocessing.documents import LONG_BYTES, LongText, Text, check_utf8
from dlcm_lightning.data.preprocessing.inputs import PIPE
from dlcm_lightning.data.preprocessing.json_line import text_of
from dlcm_lightning.data.preprocessing.kinds import LOOKED_AT, kind_of, uncompressed_name, why_no_text
from dlcm_lightning.data.preprocessing.plan import Input
from dlcm_lightning.data.preprocessing.raw_bytes import Advance, measured, raw_bytes
from dlcm_lightning.data.preprocessing.tars import samples
from dlcm_lightning.errors import DataError

MOST_BYTES = 2**30
"""Of a document, and of a line that holds one."""
READ_BYTES = 1024**2
SAMPLE_ENDINGS = (("txt", "text"), ("jsonl", "ndjson"), ("json",))
"""Of the members that hold the text of a sample, the first that is there."""
PARQUET_BYTES = 16 * 1024**2
"""Of text held in memory at once, by the average length of a row."""
AGAIN = "fetch or write the file again"


@dataclass
class Reading:
    """Where a reader is, what it has passed over, and what the files were that it has read to their end."""

    account: Account = field(default_factory=Account)
    digests: list[str] = field(default_factory=list)
    """sha256 of each file."""
    file: str = ""
    """Its path or address."""
    name: str = ""
    """The same below the folder that was named."""
    kind: str = ""
    unit: str = ""
    number: int | str = 0
    """Of the line or row that was given last; name of the sample."""

    @property
    def place(self) -> str:
        """For messages."""
        return self.file + self._inside()

    @property
    def named(self) -> str:
        """The same wherever the inputs lie."""
        return self.name + self._inside()

    def _inside(self) -> str:
        return f", {self.unit} {self.number}" if self.unit else ""


def read_texts(file: Input | Path, text_field: str, advance: Advance = lambda _: None, reading: Reading | None = None
               ) -> Iterator[Text]:
    """The texts of an input. advance: told of its bytes as they are read, in all its size.

    DataError: damaged or truncated (named with line, row or sample), not UTF-8, no such field, pyarrow missing,
    unreadable, changed while it was read.
    """
    if isinstance(file, Path):
        file = Input(str(file), file.name, -1, "", kind_of(file.name) or "text")
    reading = reading or Reading()
    reading.file, reading.name, reading.kind, reading.unit, reading.number = file.place, file.name, file.kind, "", 0
    reading.account.begin_file(file.kind)
    try:
        with measured(file, advance if file.kind != "parquet" else lambda _: None) as (stream, meter):
            if file.kind == "parquet":
                yield from _rows(file, text_field, advance, reading)
            else:
                piped = file.place.startswith(PIPE)
                content = decompressed("" if piped else file.name, stream, None if piped else lambda: raw_bytes(file),
                                       stream.peek(8) if piped else b"")  # type: ignore[attr-defined]
                yield from _READERS[file.kind](file, content, text_field, reading)
    except OSError as error:
        raise DataError(f"{reading.place}: cannot be read ({error})") from error
    except DAMAGED as error:
        number = reading.number
        where = f", {reading.unit} {number + 1}" if isinstance(number, int) and reading.unit else (
            f", after {reading.unit} {number}" if reading.unit else "")
        raise DataError(f"{file.place}{where}: damaged ({type(error).__name__}: {error}); {AGAIN}") from error
    reading.account.end_file(file.kind, meter.count)
    reading.digests.append(meter.hashed.hexdigest())


def _whole(file: Input, stream: BinaryIO, _: str, __: Reading) -> Iterator[Text]:
    content = bytearray()
    while piece := stream.read(READ_BYTES):
        content += piece
        if len(content) > MOST_BYTES:
            raise _too_long(file.place)
    text = whole_text(content, file.place)
    del content
    yield text


def whole_text(content: bytes | bytearray, place: str) -> Text:
    """A file or member that is a document. DataError: it is no text in UTF-8."""
    if reason := why_no_text(content[:LOOKED_AT]):
        raise DataError(f"{place}: {reason}")
    if (at := content.find(b"\0")) >= 0:
        raise DataError(f"{place}: not text, there is a zero byte at {at:,}; leave it out with --glob")
    try:
        if len(content) < LONG_BYTES:
            return content.decode("utf-8-sig")
        check_utf8(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error}); convert it or leave it out with --glob") from error
    if not content.startswith(codecs.BOM_UTF8):
        return LongText(content)
    without = bytearray(content)
    del without[:len(codecs.BOM_UTF8)]
    return LongText(without)


def _lines(file: Input, stream: BinaryIO, text_field: str, reading: Reading) -> Iterator[Text]:
    reading.unit = "line"
    while line := _next_line(stream, file.place, reading):
        if reading.number == 1 and (reason := why_no_text(line[:LOOKED_AT])):
            raise DataError(f"{file.place}: {reason}")
        text = line_text(line, text_field, reading)
        line = b""  # a long one is not needed beside its text
        if text is not None:
            yield text


def line_text(line: bytes | bytearray, text_field: str, reading: Reading) -> Text | None:
    """The text of a line, or none. DataError: no JSON object, or without such a text."""
    if len(line) < LONG_BYTES and not line.strip():
        reading.account.blanks += 1
        return None
    try:
        text = text_of(line, text_field)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{reading.place}: no JSON object with a text field {text_field!r} ({type(error).__name__}: "
                        f"{error}); correct the file, name the field, or leave the file out with --glob") from error
    if text is None:
        reading.account.nulls += 1
    return text


def _next_line(stream: BinaryIO, place: str, reading: Reading) -> bytes | bytearray:
    """A line, its number counted; empty at the end. A long one is gathered in pieces, so that it is in memory once."""
    line: bytes | bytearray = stream.readline(READ_BYTES)
    if len(line) == READ_BYTES and not line.endswith(b"\n"):
        line = bytearray(line)
        while not line.endswith(b"\n") and (piece := stream.readline(READ_BYTES)):
            line += piece
            if len(line) > MOST_BYTES:
                raise _too_long(f"{place}, line {reading.number + 1}")  # type: ignore[operator]
    if line:
        reading.number += 1  # type: ignore[operator]
    return line


def _samples(file: Input, stream: BinaryIO, text_field: str, reading: Reading) -> Iterator[Text]:
    """Of a tar: a sample is its text member, or the lines of its .jsonl member, or the text in its .json member."""
    reading.unit, found = "sample", False
    for sample in samples(stream, file.place, reading.account):
        reading.unit, reading.number = "sample", sample["__key__"]
        members = {name: content for name, content in sample.items() if not name.startswith("__")}
        name = next((name for wanted in SAMPLE_ENDINGS for name in members
                     if uncompressed_name(name).rpartition(".")[2] in wanted), None)
        if name is not None:
            found, content = True, members.pop(name)
            yield from _member_texts(name, content, text_field, reading)
        for other, content in members.items():
            reading.account.other_member("." + other, len(content))
    if not found:
        raise DataError(f"{file.place}: no sample holds a text (members .txt, .json or .jsonl); leave it out with "
                        "--glob, or unpack it and give --format text")


def _member_texts(name: str, content: bytes, text_field: str, reading: Reading) -> Iterator[Text]:
    stream = decompressed(name, io.BytesIO(content), lambda: nullcontext(io.BytesIO(content)))
    inner = uncompressed_name(name)
    if inner.endswith(("jsonl", "ndjson")):
        key = reading.number
        for number, line in enumerate(stream, start=1):
            reading.unit, reading.number = f"sample {key}, line", number
            text = line_text(line, text_field, reading)
            if text is not None:
                yield text
    elif inner.endswith("json"):
        text = line_text(stream.read(), text_field, reading)
        if text is not None:
            yield text
    else:
        yield whole_text(stream.read(), reading.place)


def _rows(file: Input, text_field: str, advance: Advance, reading: Reading) -> Iterator[Text]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{file.place}: parquet is read with pyarrow, which is not installed; "
                        "pip install 'dlcm-lightning[parquet]'") from None
    row, group = 0, -1
    try:
        with raw_bytes(file) as raw:
            size = raw.seek(0, io.SEEK_END)
            raw.seek(0)
            opened = parquet.ParquetFile(raw, buffer_size=READ_BYTES, page_checksum_verification=True)
            columns, rows = opened.schema_arrow.names, opened.metadata.num_rows
            if text_field not in columns:
                raise DataError(f"{file.place}: has the columns {', '.join(columns)} and no {text_field!r}; name the "
                                "one that holds the text")
            advance(0 if rows else size)
            reading.unit = "row"
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                held = max(1, min(1024, PARQUET_BYTES * about.num_rows // max(1, about.total_byte_size)))
                for batch in opened.iter_batches(held, row_groups=[group], columns=[text_field], use_threads=False):
                    advance(size * (row + len(batch)) // rows - size * row // rows)
                    for text in _texts_of(batch.column(0), text_field, reading):
                        row += 1
                        reading.number = row
                        yield from _row_text(text, reading)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        place = f", row group {group}, after row {row}" if group >= 0 else ""
        raise DataError(f"{file.place}{place}: damaged or no parquet file ({type(error).__name__}: {error}); {AGAIN}"
                        ) from error


def _texts_of(column: Any, text_field: str, reading: Reading) -> Any:
    """The column, its dictionary looked up. DataError: it holds no text."""
    types = importlib.import_module("pyarrow").types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (types.is_string(column.type) or types.is_large_string(column.type) or types.is_null(column.type)):
        reading.number = 1
        raise DataError(f"{reading.place}: column {text_field!r} holds {column.type}, no text; name the column that "
                        "holds the text")
    return column


def _row_text(text: Any, reading: Reading) -> Iterator[Text]:
    if not text.is_valid:
        reading.account.nulls += 1
        return
    content = text.as_buffer()
    if content.size > MOST_BYTES:
        raise _too_long(reading.place)
    if content.size < LONG_BYTES:
        yield text.as_py()
    else:
        long = LongText(bytearray(content))
        check_utf8(long.content)
        yield long


def _too_long(place: str) -> DataError:
    return DataError(f"{place}: a document longer than {MOST_BYTES:,} bytes; split it, or leave it out with --glob")


_READERS = {"text": _whole, "jsonl": _lines, "webdataset": _samples}
