"""What a folder of shards says about itself.

A source and split is a folder: `manifest.json`, shards `00000.tar`, `00001.tar`, ... and beside each its index
`00000.index`. The manifest is written last and atomically, so a folder without one is an unfinished build and a
folder with one is whole. It states counts, sizes and sha256 of every shard, which tokenizer made the ids, and their
width; opening compares all of it with what lies on disk.

A shard is a plain tar as webdataset writes and reads it. A sample is a *block* of whole documents:
`00000007.tokens.u16` (or `.u32`), their ids end to end, little-endian, and `00000007.lengths.u32`, the tokens of each
document. The index is raw little-endian int64 (blocks, 4): byte offset of the tokens, tokens, byte offset of the
lengths, documents. It only repeats what the tar's headers say, so that any token is found without reading them.
Nothing is compressed and nothing is pickled: reading a shard is arithmetic on offsets.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.data.errors import DataError
from dlcm_lightning.durable import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
INDEX_COLUMNS = 4
WIDTHS = {"uint16": ("u16", "<u2"), "uint32": ("u32", "<u4")}
"""Suffix of the member and numpy type, by the manifest's dtype."""


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
    shards: list[ShardEntry]
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.dtype not in WIDTHS:
            raise DataError(f"source {self.source!r}: dtype = {self.dtype!r}; known are {', '.join(WIDTHS)}")
        for name in ("documents", "tokens", "text_bytes"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if total != getattr(self, name):
                raise DataError(f"source {self.source!r}, split {self.split!r}: {MANIFEST} states {name} = "
                                f"{getattr(self, name)}, its shards sum to {total}; rebuild the source")
        for shard in self.shards:
            if not shard.name.endswith(".tar") or Path(shard.name).name != shard.name:
                raise DataError(f"source {self.source!r}: shard name {shard.name!r} must be a plain name.tar")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json by a temporary name, fsync and rename: whole or not at all."""
    write_atomically(folder / MANIFEST, (json.dumps(asdict(manifest), ensure_ascii=False, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """DataError: missing (an unfinished build), not JSON, another format, fields missing, sums that disagree."""
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        if found.get("format") != FORMAT:
            raise DataError(f"{path}: format {found.get('format')!r}; this version reads {FORMAT}; "
                            "build the shards again")
        return Manifest(**{**found, "shards": [ShardEntry(**shard) for shard in found["shards"]]})
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: missing, so the folder holds no finished source; "
                        "build it (dlcm tokenize) or correct data.root and the source's name") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); build the source again") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def index_name(shard: str) -> str:
    """Name of the index of a shard."""
    return f"{shard.removesuffix('.tar')}.index"


def build_index(shard: Path) -> np.ndarray:
    """(blocks, 4) little-endian int64, read from the tar's headers. DataError: not a shard of this format."""
    rows: dict[str, list[int]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                block, _, kind = member.name.partition(".")
                row = rows.setdefault(block, [-1, 0, -1, 0])
                if kind == "lengths.u32":
                    row[2:] = [member.offset_data, member.size // 4]
                elif kind in ("tokens.u16", "tokens.u32"):
                    row[:2] = [member.offset_data, member.size // (2 if kind.endswith("16") else 4)]
    except tarfile.TarError as error:
        raise DataError(f"{shard}: not a readable tar ({error})") from error
    index = np.array(list(rows.values()), dtype="<i8").reshape(-1, 4)
    if (index < 0).any():
        raise DataError(f"{shard}: a block lacks its tokens or its lengths; build the shard again")
    return index
