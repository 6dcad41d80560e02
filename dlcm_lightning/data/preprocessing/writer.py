"""Writes documents of token ids as shards (see manifest.py for the format), and continues where it was interrupted.

A writer fills the shards `TTTTTT-SSSSS.tar` of one task and split. Deterministic: the same documents give the same
bytes, whoever writes them, whenever, and however often the writing was interrupted. A shard is *finished* once its
record `NAME.entry` is there: tar, index, hashes and sizes are flushed before it, and it appears whole or not at all. A
finished shard is never written again; everything else that lies there is an accident and is written over.

Beside the sidecars of the format a shard has two more until its source is merged: `NAME.entry`, its line of the
manifest as JSON, and `NAME.sizes`, int64, the UTF-8 bytes of each document's text.

The library that the format is named after writes the tar; a stream below it counts and hashes, so that sha256 and index
fall out on the way and nothing is read twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, BinaryIO

import numpy as np

from dlcm_lightning.atomic_io import flush, write_atomically
from dlcm_lightning.data.manifest import (
    INDEX_COLUMNS,
    WIDTHS,
    Manifest,
    ShardEntry,
    Shards,
    dtype_of,
    sidecar,
    write_manifest,
)
from dlcm_lightning.data.webdataset_library import webdataset
from dlcm_lightning.errors import DataError

SHARD_BYTES = 256 * 1024**2
BLOCK_TOKENS = 256 * 1024
IDENTITY_BYTES = 16


def shard_name(task: int, number: int) -> str:
    """Names sort in the order of the stream: up to a million tasks, and 100,000 shards in each."""
    return f"{task:06d}-{number:05d}.tar"


def finished_shards(folder: Path, task: int) -> list[ShardEntry]:
    """The finished shards of a task, in order. DataError: a record that this writer did not write."""
    found: list[ShardEntry] = []
    while (record := folder / sidecar(shard_name(task, len(found)), "entry")).is_file():
        try:
            found.append(ShardEntry(**json.loads(record.read_bytes())))
        except (ValueError, TypeError) as error:
            raise DataError(f"{record}: not the record of a shard ({error}); remove it, and its shard is written "
                            "again") from error
    return found


class _Hashed:
    """A file to write to, its bytes counted and hashed. Once it is closed, what a tar still holds goes nowhere."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.hashed = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.hashed.update(content)
        self.size += len(content)
        return len(content) if self.file.closed else self.file.write(content)


class ShardWriter:
    """Writes the shards of one task and split. `close` finishes the last one; without it that one never was."""

    def __init__(self, folder: str | Path, *, vocab_size: int, task: int = 0, shard_bytes: int = SHARD_BYTES,
                 block_tokens: int = BLOCK_TOKENS) -> None:
        """A block closes once it holds block_tokens, a shard once its tokens fill shard_bytes."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vocab_size, self.task, self.shard_bytes, self.block_tokens = vocab_size, task, shard_bytes, block_tokens
        self.shards = finished_shards(self.folder, task)
        self._suffix, self._type = WIDTHS[dtype_of(vocab_size)]
        self._width = np.dtype(self._type).itemsize
        self._written = self._identities_written([shard.name for shard in self.shards])
        self._block: list[np.ndarray] = []
        self._block_tokens = 0
        self._file: _Hashed | None = None
        self._tar: Any = None
        self._begin_shard()

    def has(self, identity: bytes) -> bool:
        """Whether the next document lies in a finished shard. Ask this of every document, in order, before writing.

        identity: the md5 of its text. DataError: another document lies in its place.
        """
        expected = next(self._written, None)
        if expected is not None and expected != identity:
            raise DataError(f"{self.folder}: the finished shards of task {self.task} hold other documents than its "
                            "inputs do now; restore the inputs, or remove the folder of the unfinished build and begin "
                            "anew")
        return expected is not None

    def write(self, ids: np.ndarray, identity: bytes, text_bytes: int) -> None:
        """Appends one document: ids (n,) with BOS and EOS, the md5 and the UTF-8 bytes of its text."""
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise DataError(f"{self.folder}: a document of {len(ids)} tokens is empty or holds ids outside "
                            f"[0, {self.vocab_size})")
        if self._block and len(ids) >= self.block_tokens:  # a block of its own, which is not copied
            self._close_block()
        self._block.append(ids.astype(self._type, copy=False))
        self._block_tokens += len(ids)
        self._identities += identity
        self._sizes.append(text_bytes)
        if self._block_tokens >= self.block_tokens:
            self._close_block()

    def close(self) -> list[ShardEntry]:
        """Finishes the last shard. Returns all of the task. DataError: finished shards hold more than was asked for."""
        if next(self._written, None) is not None:
            raise DataError(f"{self.folder}: the finished shards of task {self.task} hold more documents than its "
                            "inputs do now; restore the inputs, or remove the folder of the unfinished build and begin "
                            "anew")
        self._close_block()
        self._close_shard()
        return self.shards

    def abandon(self) -> None:
        """Lets go of the file of an unfinished shard."""
        if self._file is not None:
            self._file.file.close()
            self._file = None

    def _identities_written(self, names: list[str]) -> Iterator[bytes]:
        for name in names:
            found = (self.folder / sidecar(name, "hashes")).read_bytes()
            yield from (found[at:at + IDENTITY_BYTES] for at in range(0, len(found), IDENTITY_BYTES))

    def _begin_shard(self) -> None:
        self._identities = bytearray()
        self._sizes: list[int] = []
        self._index: list[tuple[int, int, int, int]] = []

    def _close_block(self) -> None:
        if not self._block:
            return
        if self._file is None:
            self._temporary = self.folder / f".{shard_name(self.task, len(self.shards))}"
            self._file = _Hashed(self._temporary.open("wb"))
            self._tar = webdataset("writer").TarWriter(self._file, encoder=False, mtime=0, mode=0o444, user="dlcm",
                                                       group="dlcm")
        lengths = np.array([len(document) for document in self._block], dtype="<u4").tobytes()
        documents, count = len(self._block), self._block_tokens
        tokens = (self._block[0] if documents == 1 else np.concatenate(self._block)).tobytes()
        self._block, self._block_tokens = [], 0
        lengths_at = self._tar.tarstream.offset + BLOCKSIZE  # after its header; members come in order of their names
        tokens_at = lengths_at + -(-len(lengths) // BLOCKSIZE) * BLOCKSIZE + BLOCKSIZE
        key = f"{len(self._index):08d}"
        self._tar.write({"__key__": key, "lengths.u32": lengths, f"tokens.{self._suffix}": tokens})
        self._index.append((tokens_at, count, lengths_at, documents))
        if sum(row[1] for row in self._index) * self._width >= self.shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._tar.close()
        self._file.file.flush()
        os.fsync(self._file.file.fileno())
        self._file.file.close()
        size, digest, self._file = self._file.size, self._file.hashed.hexdigest(), None
        name = shard_name(self.task, len(self.shards))
        index = np.array(self._index, dtype="<i8").reshape(-1, INDEX_COLUMNS)
        entry = ShardEntry(name=name, documents=len(self._sizes), tokens=int(index[:, 1].sum()), blocks=len(index),
                           text_bytes=sum(self._sizes), size=size, sha256=digest)
        for kind, content in (("index", index.tobytes()), ("hashes", bytes(self._identities)),
                              ("sizes", np.array(self._sizes, dtype="<i8").tobytes())):
            write_atomically(self.folder / sidecar(name, kind), content)
        self._temporary.replace(self.folder / name)
        flush(self.folder)
        write_atomically(self.folder / sidecar(name, "entry"), (json.dumps(asdict(entry), indent=1) + "\n").encode())
        self.shards.append(entry)
        self._begin_shard()


def finish_split(folder: Path, shards: Iterable[ShardEntry], *, source: str, domain: str, split: str, tokenizer: str,
                 vocab_size: int, about: dict[str, str] | None = None, lossless: bool = False,
                 validation_share: float | None = None) -> Manifest:
    """Writes the manifest of a split, by which its shards become readable. tokenizer: fingerprint; lossless and
    validation_share: see Manifest."""
    columns = Shards.from_entries(shards)
    manifest = Manifest(
        source=source, domain=domain, split=split, tokenizer=tokenizer, vocab_size=vocab_size,
        dtype=dtype_of(vocab_size), documents=columns.total("documents"), tokens=columns.total("tokens"),
        text_bytes=columns.total("text_bytes"), shards=columns, about=about or {}, lossless=lossless,
        validation_share=validation_share)
    write_manifest(folder, manifest)
    return manifest
