"""What a folder of shards says about itself.

A source and split is a folder: `manifest.json`, shards `NAME.tar`, and beside each shard small sidecars. The manifest
is written last and atomically, so a folder without one is an unfinished build and a folder with one is whole. It
states counts, sizes and sha256 of every shard, which tokenizer made the ids, and their width. It is written as
columns, one list a property: a corpus of 100,000 shards opens in a fraction of a second.

A shard is a plain tar as webdataset writes and reads it. A sample is a *block* of whole documents:
`00000007.tokens.u16` (or `.u32`), their ids end to end, little-endian, and `00000007.lengths.u32`, the tokens of each
document. Sidecars, raw and little-endian:

    NAME.index   int64 (blocks, 4): byte offset of the tokens, tokens, byte offset of the lengths, documents. It only
                 repeats what the tar's headers say, so that any token is found without reading them
    NAME.hashes  16 bytes a document: the md5 of its text, by which duplicates and single documents are found
    NAME.skip    int64 (n, 4), only where documents are left out: block, place of the document in its block, its first
                 token in the block, its tokens; in the order of the stream. Duplicates are left out this way, so no
                 shard is ever written twice

Counts in a manifest are those of the stream, what is skipped left out; `skipped_documents` and `skipped_tokens` are
what the tar holds besides. Nothing is compressed and nothing is pickled: reading a shard is arithmetic on offsets.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.errors import DataError

FORMAT = 3
FORMATS = (2, 3)
"""That can be read. Format 2 had other headers in its tars, and said nothing of lossless and validation_share."""
MANIFEST = "manifest.json"
INDEX_COLUMNS = SKIP_COLUMNS = 4
WIDTHS = {"uint16": ("u16", "<u2"), "uint32": ("u32", "<u4")}
"""Suffix of the member and numpy type, by the manifest's dtype."""
LARGEST = 2**48
"""No count, size or offset of a sound shard comes near it, and sums of products below it stay in 64 bits."""


def dtype_of(vocab_size: int) -> str:
    """The manifest's name for the width of a token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a manifest."""

    name: str
    documents: int
    tokens: int
    blocks: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    size: int
    """Bytes of the tar."""
    sha256: str
    skipped_documents: int = 0
    skipped_tokens: int = 0
    skip_sha256: str = ""
    """Of NAME.skip; empty where there is none."""


TEXTS = ("name", "sha256", "skip_sha256")
COUNTS = tuple(one.name for one in fields(ShardEntry) if one.name not in TEXTS)


class Shards:
    """The shards of a manifest as columns. `shards.of("tokens")` is (n,) int64, `shards[i]` a ShardEntry."""

    def __init__(self, columns: dict[str, Any]) -> None:
        """columns: a list per field of ShardEntry. ValueError: missing, of unequal lengths, no natural numbers."""
        names = [one.name for one in fields(ShardEntry)]
        if sorted(columns) != sorted(names):
            raise ValueError(f"shards have the columns {', '.join(sorted(columns))}, not {', '.join(sorted(names))}")
        if len({len(column) for column in columns.values()}) > 1:
            raise ValueError("the columns of shards are of unequal lengths")
        for name in TEXTS:
            if not all(isinstance(text, str) for text in columns[name]):
                raise ValueError(f"shards: {name} holds what is no text")
        self._texts: dict[str, list[str]] = {name: list(columns[name]) for name in TEXTS}
        self._counts = {name: _natural(columns[name], name) for name in COUNTS}
        for name in self._texts["name"]:
            if not name.endswith(".tar") or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f"shard name {name!r} must be a plain name.tar")
        if len(set(self._texts["name"])) != len(self):
            raise ValueError("two shards have the same name")

    @staticmethod
    def from_entries(entries: Iterable[ShardEntry]) -> Shards:
        rows = [asdict(entry) for entry in entries]
        return Shards({one.name: [row[one.name] for row in rows] for one in fields(ShardEntry)})

    def __len__(self) -> int:
        return len(self._texts["name"])

    def __getitem__(self, number: int) -> ShardEntry:
        counts = {name: int(column[number]) for name, column in self._counts.items()}
        texts = {name: column[number] for name, column in self._texts.items()}
        return ShardEntry(**counts, **texts)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self[number] for number in range(len(self)))

    def of(self, name: str) -> np.ndarray:
        """(n,) int64: one count of every shard."""
        return self._counts[name]

    def total(self, name: str) -> int:
        return int(self._counts[name].sum())

    def texts(self, name: str) -> list[str]:
        return self._texts[name]

    def columns(self) -> dict[str, list[Any]]:
        """As they stand in the manifest."""
        found = {**self._texts, **{name: column.tolist() for name, column in self._counts.items()}}
        return {one.name: found[one.name] for one in fields(ShardEntry)}


@dataclass(frozen=True)
class Manifest:
    """One source and split."""

    source: str
    domain: str
    split: str
    tokenizer: str
    """Fingerprint: sha256 of tokenizer.json."""
    vocab_size: int
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    shards: Shards
    about: dict[str, str] = field(default_factory=dict)
    """Where the text comes from, for readers: licence, home page."""
    lossless: bool = False
    """Whether the tokens of every document were seen to stand for exactly the bytes of its text."""
    validation_share: float | None = None
    """By which documents were parted into splits; sources of one corpus need the same, or copies of a validation
    document in one would be trained on in another. None: not known."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.dtype not in WIDTHS:
            raise DataError(f"source {self.source!r}: dtype = {self.dtype!r}; known are {', '.join(WIDTHS)}")
        share = self.validation_share
        if not isinstance(self.lossless, bool) or not (share is None or isinstance(share, int | float)):
            raise DataError(f"source {self.source!r}: lossless = {self.lossless!r}, validation_share = {share!r}: no "
                            "truth value, no number; rebuild the source")
        for name in ("documents", "tokens", "text_bytes"):
            total = self.shards.total(name)
            if total != getattr(self, name):
                raise DataError(f"source {self.source!r}, split {self.split!r}: {MANIFEST} states {name} = "
                                f"{getattr(self, name)}, its shards sum to {total}; rebuild the source")

    @property
    def width(self) -> int:
        """Bytes of a token id."""
        return np.dtype(WIDTHS[self.dtype][1]).itemsize


def _natural(column: Any, name: str) -> np.ndarray:
    counts = np.array(column if len(column) else np.empty(0, np.int64))
    if counts.dtype != np.int64 or counts.ndim != 1 or (counts < 0).any() or (counts > LARGEST).any():
        raise ValueError(f"shards: {name} holds what is no count")
    return counts


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json by a temporary name, fsync and rename: whole or not at all."""
    content = {one.name: getattr(manifest, one.name) for one in fields(manifest)}
    content["shards"] = manifest.shards.columns()
    lines = [f'"{name}": {_lines(value)}' for name, value in content.items()]
    write_atomically(folder / MANIFEST, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _lines(value: Any) -> str:
    """JSON with a line for every column."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {_lines(inner)}" for name, inner in value.items()) + "\n}"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """where: for messages. DataError: not JSON, another format, fields missing, sums that disagree."""
    try:
        found: dict[str, Any] = json.loads(content)
        if found.get("format") not in FORMATS:
            raise DataError(f"format {found.get('format')!r}; this version reads {' and '.join(map(str, FORMATS))}; "
                            "build the shards again")
        return Manifest(**{**found, "shards": Shards(found["shards"])})
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{where}: not a manifest ({error}); build the source again") from error


def sidecar(shard: str, kind: str) -> str:
    """Name of a shard's sidecar; kind: index, hashes, skip."""
    return f"{shard.removesuffix('.tar')}.{kind}"


def build_index(shard: Path) -> np.ndarray:
    """index_of a file."""
    with shard.open("rb") as file:
        return index_of(file, str(shard))


def index_of(file: BinaryIO, where: str) -> np.ndarray:
    """(blocks, 4) little-endian int64, read from a tar's headers. DataError: not a shard of this format."""
    rows: dict[str, list[int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                block, _, kind = member.name.partition(".")
                row = rows.setdefault(block, [-1, 0, -1, 0])
                if kind == "lengths.u32":
                    row[2:] = [member.offset_data, member.size // 4]
                elif kind in ("tokens.u16", "tokens.u32"):
                    row[:2] = [member.offset_data, member.size // (2 if kind.endswith("16") else 4)]
    except tarfile.TarError as error:
        raise DataError(f"{where}: not a readable tar ({error})") from error
    index = np.array(list(rows.values()), dtype="<i8").reshape(-1, INDEX_COLUMNS)
    if (index < 0).any():
        raise DataError(f"{where}: a block lacks its tokens or its lengths; build the shard again")
    return index
