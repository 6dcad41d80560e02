"""Writes documents of token ids as shards (see manifest.py for the format).

Deterministic: the same documents give the same bytes, whoever writes them and whenever. Each file is complete under
its name or not there, and the manifest comes last: a build killed at any moment is never taken for a whole one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import webdataset

from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.manifest import (
    WIDTHS,
    Manifest,
    ShardEntry,
    build_index,
    index_name,
    write_manifest,
)
from dlcm_lightning.durable import flush, sha256_of, write_atomically

SHARD_BYTES = 256 * 1024**2
BLOCK_TOKENS = 256 * 1024


class ShardWriter:
    """Writes one source and split. A context manager: the manifest is written on leaving without an exception."""

    def __init__(self, folder: str | Path, *, source: str, domain: str, split: str, tokenizer: str, vocab_size: int,
                 shard_bytes: int = SHARD_BYTES, block_tokens: int = BLOCK_TOKENS) -> None:
        """tokenizer: fingerprint. A block closes once it holds block_tokens, a shard once its tokens fill
        shard_bytes. DataError where the folder already holds files: nothing is ever overwritten."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise DataError(f"{self.folder}: not empty; remove it or write elsewhere")
        self.source, self.domain, self.split = source, domain, split
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.dtype = "uint16" if vocab_size <= 2**16 else "uint32"
        self.shard_bytes, self.block_tokens = shard_bytes, block_tokens
        self._suffix, self._type = WIDTHS[self.dtype]
        self._shards: list[ShardEntry] = []
        self._block: list[np.ndarray] = []
        self._block_size = 0
        self._blocks = 0
        self._counts = {"documents": 0, "tokens": 0, "text_bytes": 0, "blocks": 0}
        self._tar: webdataset.TarWriter | None = None

    def write(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends one document: ids (n,) including BOS and EOS, and the UTF-8 bytes of its text."""
        if not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise DataError(f"source {self.source!r}: a document of {len(ids)} tokens is empty or holds ids outside "
                            f"[0, {self.vocab_size})")
        self._block.append(ids.astype(self._type))
        self._block_size += len(ids)
        self._counts["text_bytes"] += text_bytes
        if self._block_size >= self.block_tokens:
            self._close_block()

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return sum(shard.documents for shard in self._shards) + self._counts["documents"] + len(self._block)

    def close(self) -> Manifest:
        """Finishes the last shard and writes the manifest."""
        self._close_block()
        self._close_shard()
        manifest = Manifest(
            source=self.source, domain=self.domain, split=self.split, tokenizer=self.tokenizer,
            vocab_size=self.vocab_size, dtype=self.dtype, documents=sum(shard.documents for shard in self._shards),
            tokens=sum(shard.tokens for shard in self._shards),
            text_bytes=sum(shard.text_bytes for shard in self._shards), shards=self._shards)
        write_manifest(self.folder, manifest)
        return manifest

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            tar, self._tar = self._tar, None
            with self._file, suppress(OSError):
                tar.close()

    def _close_block(self) -> None:
        if not self._block:
            return
        if self._tar is None:
            self._temporary = self.folder / f".{len(self._shards):05d}.tar"
            self._file = self._temporary.open("wb")
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0, user="dlcm", group="dlcm")
        lengths = np.array([len(document) for document in self._block], dtype="<u4")
        self._tar.write({"__key__": f"{self._blocks:08d}", f"tokens.{self._suffix}": b"".join(
            document.tobytes() for document in self._block), "lengths.u32": lengths.tobytes()})
        self._counts["documents"] += len(lengths)
        self._counts["tokens"] += self._block_size
        self._counts["blocks"] += 1
        self._blocks += 1
        self._block, self._block_size = [], 0
        if self._counts["tokens"] * np.dtype(self._type).itemsize >= self.shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = f"{len(self._shards):05d}.tar"
        write_atomically(self.folder / index_name(name), build_index(self._temporary).tobytes())
        digest, size = sha256_of(self._temporary), self._temporary.stat().st_size
        self._temporary.replace(self.folder / name)
        flush(self.folder)
        self._shards.append(ShardEntry(name=name, size=size, sha256=digest, **self._counts))
        self._counts = dict.fromkeys(self._counts, 0)
