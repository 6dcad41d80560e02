"""Random access to the tokens of one source and split.

A source is one long stream of tokens: its documents end to end, shard after shard. `read` takes any window of it by
two binary searches (which shard, which block) and a copy out of mapped memory; no tar is parsed and nothing is
decoded. What a manifest claims is compared with the disk when a shard is first touched (present, size, index) and in
full by `verify` (sha256, counts, range of the ids).

Open shards are kept mapped, the least recently used let go, so that a source of thousands of shards does not run out
of file handles. A `Source` can be pickled to a loader process; mappings are not carried along but opened again there.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.manifest import (
    INDEX_COLUMNS,
    WIDTHS,
    ShardEntry,
    build_index,
    index_name,
    read_manifest,
)
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.durable import sha256_of

MAPPED_SHARDS = 64
REBUILD = "the shard is damaged or was replaced: copy it again or rebuild the source"


@dataclass(frozen=True)
class _Mapped:
    """An open shard: its bytes, its index and where each block begins, in tokens."""

    content: np.ndarray
    index: np.ndarray
    begins: np.ndarray


class Source:
    """The token stream of one folder of shards."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        """DataError: no manifest, or made with another tokenizer than `tokenizer`, or its ids do not fit."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest.tokenizer != tokenizer.fingerprint:
            raise DataError(f"{self.folder}: made with tokenizer {self.manifest.tokenizer[:12]}, but the corpus' "
                            f"tokenizer.json is {tokenizer.fingerprint[:12]}; tokenise this source again with it")
        if self.manifest.vocab_size != tokenizer.vocab_size:
            raise DataError(f"{self.folder}: states vocab_size = {self.manifest.vocab_size}, its tokenizer has "
                            f"{tokenizer.vocab_size} ids; rebuild the source")
        self.tokens = self.manifest.tokens
        self._type = np.dtype(WIDTHS[self.manifest.dtype][1])
        counts = np.array([shard.tokens for shard in self.manifest.shards], dtype=np.int64)
        self._begins = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
        self._mapped: OrderedDict[int, _Mapped] = OrderedDict()
        for shard in self.manifest.shards:
            self._check_size(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}

    def rows(self, row_tokens: int) -> int:
        """Full rows in the stream: each feeds row_tokens tokens and looks one further for its last target."""
        return max(0, (self.tokens - 1) // row_tokens)

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [first, first + count): (count,) int64, and the offsets among them where documents start, int64."""
        if first < 0 or count < 1 or first + count > self.tokens:
            raise IndexError(f"{self.folder}: tokens [{first}, {first + count}) of {self.tokens}")
        tokens = np.empty(count, dtype=np.int64)
        starts = []
        done = 0
        while done < count:
            number = int(np.searchsorted(self._begins, first + done, side="right")) - 1
            shard = self._open(number)
            inside = first + done - int(self._begins[number])
            block = int(np.searchsorted(shard.begins, inside, side="right")) - 1
            offset = inside - int(shard.begins[block])
            ids, lengths = self._block(shard, block)
            taken = min(count - done, len(ids) - offset)
            tokens[done:done + taken] = ids[offset:offset + taken]
            begins = np.cumsum(lengths, dtype=np.int64) - lengths
            low, high = np.searchsorted(begins, [offset, offset + taken])
            starts.append(begins[low:high] - offset + done)
            if int(begins[-1] + lengths[-1]) != len(ids) or int(lengths.min()) < 1:
                raise DataError(f"{self._path(number)}: block {block} holds {len(ids)} tokens, its documents "
                                f"sum to {int(begins[-1] + lengths[-1])}; {REBUILD}")
            done += taken
        if int(tokens.max()) >= self.manifest.vocab_size:
            raise DataError(f"{self._path(number)}: token id {int(tokens.max())} beyond the vocabulary of "
                            f"{self.manifest.vocab_size}; {REBUILD}")
        return tokens, np.concatenate(starts)

    def documents(self, limit: int) -> list[np.ndarray]:
        """The first documents of the stream, at most `limit`: their ids, int64, with BOS and EOS."""
        found: list[np.ndarray] = []
        for number in range(len(self.manifest.shards)):
            shard = self._open(number)
            for block in range(len(shard.index)):
                ids, lengths = self._block(shard, block)
                pieces = np.split(ids.astype(np.int64), np.cumsum(lengths, dtype=np.int64)[:-1])
                found += pieces[:limit - len(found)]
                if len(found) >= limit:
                    return found
        return found

    def verify(self) -> None:
        """Reads every shard in full. DataError names the first whose sha256, counts or ids are not as stated."""
        for number, shard in enumerate(self.manifest.shards):
            path = self._path(number)
            mapped = self._open(number)
            digest = sha256_of(path)
            if digest != shard.sha256:
                raise DataError(f"{path}: sha256 {digest[:12]}..., the manifest states {shard.sha256[:12]}...; "
                                f"{REBUILD}")
            if not np.array_equal(build_index(path), mapped.index):
                raise DataError(f"{path.parent / index_name(shard.name)}: not the index of its shard; {REBUILD}")
            documents = 0
            for block in range(len(mapped.index)):
                ids, lengths = self._block(mapped, block)
                documents += len(lengths)
                if int(lengths.min()) < 1 or int(lengths.sum(dtype=np.int64)) != len(ids):
                    raise DataError(f"{path}: block {block} holds {len(ids)} tokens, its documents sum to "
                                    f"{int(lengths.sum(dtype=np.int64))}; {REBUILD}")
                if int(ids.max()) >= self.manifest.vocab_size:
                    raise DataError(f"{path}: token id {int(ids.max())} beyond the vocabulary of "
                                    f"{self.manifest.vocab_size}; {REBUILD}")
            if documents != shard.documents:
                raise DataError(f"{path}: holds {documents} documents, the manifest states {shard.documents}; "
                                f"{REBUILD}")

    def _path(self, number: int) -> Path:
        return self.folder / self.manifest.shards[number].name

    def _check_size(self, shard: ShardEntry) -> None:
        path = self.folder / shard.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path}: missing, though the manifest lists it; copy it there or rebuild the "
                            "source") from None
        if size != shard.size:
            raise DataError(f"{path}: {size} bytes, the manifest states {shard.size}; {REBUILD}")

    def _open(self, number: int) -> _Mapped:
        if number in self._mapped:
            self._mapped.move_to_end(number)
            return self._mapped[number]
        shard = self.manifest.shards[number]
        self._check_size(shard)
        path = self._path(number)
        index_path = path.parent / index_name(shard.name)
        try:
            raw = index_path.read_bytes()
            content = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); copy it there or rebuild the source") from error
        if len(raw) != shard.blocks * INDEX_COLUMNS * 8:
            raise DataError(f"{index_path}: {len(raw)} bytes, {shard.blocks} blocks need "
                            f"{shard.blocks * INDEX_COLUMNS * 8}; {REBUILD}")
        index = np.frombuffer(raw, dtype="<i8").reshape(-1, INDEX_COLUMNS)
        ends = np.cumsum(index[:, 1])
        whole = (index > 0).all() and ends[-1] == shard.tokens and index[:, 3].sum() == shard.documents
        inside = (index[:, 0] + index[:, 1] * self._type.itemsize <= shard.size).all() and (
            index[:, 2] + index[:, 3] * 4 <= shard.size).all()
        if not (whole and inside):
            raise DataError(f"{index_path}: does not fit the shard and its manifest; {REBUILD}")
        self._mapped[number] = _Mapped(content, index, ends - index[:, 1])
        while len(self._mapped) > MAPPED_SHARDS:
            self._mapped.popitem(last=False)
        return self._mapped[number]

    def _block(self, shard: _Mapped, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and document lengths of a block, as stored."""
        at, tokens, lengths_at, documents = shard.index[block].tolist()
        ids = shard.content[at:at + tokens * self._type.itemsize].view(self._type)
        return ids, shard.content[lengths_at:lengths_at + documents * 4].view("<u4")


