"""Random access to the tokens of one source and split.

A source is one long stream of tokens: its documents end to end, shard after shard, those left out that the manifest
skips. `read_into` takes any window of it: two bisections (which shard, which block), one read of the tokens at their
offset straight to where they are wanted; where the documents of a block begin is computed once and kept. No tar is
parsed and nothing is decoded. What a manifest claims is compared with the store when a shard is first touched (present,
size, index) and in full by `verify` (sha256, counts, range of the ids).

A shard is arbitrary bytes until shown otherwise: every number in a sidecar is bounded before it is computed with, and
numbers are all there is, so that a hostile shard can be wrong but can neither run code nor lead out of its folder.

Open shards are kept, the least recently used let go, so that a source of thousands of shards does not run out of file
handles. A `Source` can be pickled to a loader process; open files are not carried along but opened again there.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.data.manifest import (
    INDEX_COLUMNS,
    MANIFEST,
    SKIP_COLUMNS,
    WIDTHS,
    Manifest,
    dtype_of,
    parse_manifest,
    sidecar,
)
from dlcm_lightning.data.store import Content, Store, store_at
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError

OPEN_SHARDS = 64
KEPT_BLOCKS = 4096
NO_STARTS = np.empty(0, dtype=np.int64)
REBUILD = "the shard is damaged or was replaced: copy it again or rebuild the source"


@dataclass(frozen=True)
class _Shard:
    """An open shard."""

    content: Content
    index: list[list[int]]
    begins: list[int]
    """Where each block begins, in tokens of the stream within the shard."""
    skips: dict[int, np.ndarray]
    """By block: places, first tokens and tokens of the documents left out, (n, 3)."""


@dataclass(frozen=True)
class _Block:
    """The documents of a block that are in the stream."""

    tokens: int
    """Of all of them."""
    starts: np.ndarray
    """(n,) int64 first token of each, counted in the stream within the block."""
    bounds: memoryview
    """The same; one number of it is had faster."""
    pieces: list[int]
    """First token in the stream of each run of neighbouring documents, ascending."""
    stored: list[int]
    """Where each run begins in the shard, in bytes."""


class Source:
    """The token stream of one folder of shards."""

    def __init__(self, place: str | Path | Store, tokenizer: Tokenizer) -> None:
        """place: a folder, an address or a store. DataError: no manifest, or made with another tokenizer than
        `tokenizer`, or its ids do not fit."""
        self.store = store_at(place) if isinstance(place, str | Path) else place
        self.place = self.store.where()
        self.manifest = read_manifest(self.store)
        if self.manifest.tokenizer != tokenizer.fingerprint:
            raise DataError(f"{self.place}: made with tokenizer {self.manifest.tokenizer[:12]}, but the corpus' "
                            f"tokenizer.json is {tokenizer.fingerprint[:12]}; tokenise this source again with it")
        if self.manifest.vocab_size != tokenizer.vocab_size or self.manifest.dtype != dtype_of(tokenizer.vocab_size):
            raise DataError(f"{self.place}: states vocab_size = {self.manifest.vocab_size} and dtype = "
                            f"{self.manifest.dtype}, its tokenizer has {tokenizer.vocab_size} ids, which are "
                            f"{dtype_of(tokenizer.vocab_size)}; rebuild the source")
        self.tokens = self.manifest.tokens
        self._width = self.manifest.width
        self.dtype = np.dtype(WIDTHS[self.manifest.dtype][1])
        self._begins: list[int] = [0, *np.cumsum(self.manifest.shards.of("tokens")).tolist()]
        self._forget()

    def _forget(self) -> None:
        self._open_shards: OrderedDict[int, _Shard] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items()
                if name not in ("_open_shards", "_blocks", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def rows(self, sequence_length: int) -> int:
        """Full rows in the stream: each feeds sequence_length tokens and looks one further for its last target."""
        return max(0, (self.tokens - 1) // sequence_length)

    def first_rows(self, sequence_length: int) -> np.ndarray:
        """(shards + 1,) int64: the first row that begins in each shard, and the number of rows."""
        return np.minimum(-(-np.array(self._begins) // sequence_length), self.rows(sequence_length))

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [first, first + count): (count,) int64, and the offsets among them where documents start, int64.

        IndexError: beyond the stream. DataError: the shard, named, cannot be read or holds what it must not.
        """
        tokens = np.empty(count, dtype=self.dtype)
        starts = self.read_into(tokens, first)
        self.check_ids(tokens, first)
        return tokens.astype(np.int64), starts

    def check_ids(self, tokens: np.ndarray, first: int) -> None:
        """DataError: ids beyond the vocabulary among `tokens`, which were read from `first` on."""
        largest = int(tokens.max())
        if largest >= self.manifest.vocab_size:
            raise DataError(f"{self.where(self._shard_of(first))}: token id {largest} beyond the vocabulary of "
                            f"{self.manifest.vocab_size}; {REBUILD}")

    def read_into(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """`read` into tokens (n,) of `dtype`, without check_ids. Returns the offsets where documents start."""
        count = len(tokens)
        if first < 0 or count < 1 or first + count > self.tokens:
            raise IndexError(f"{self.place}: tokens [{first}, {first + count}) of {self.tokens}")
        number = self._shard_of(first)
        try:
            return self._fill(tokens, number, first - self._begins[number])
        except OSError as error:
            raise DataError(f"{self.where(number)}: cannot be read ({error}); copy it there or rebuild the source"
                            ) from error

    def _shard_of(self, token: int) -> int:
        return bisect_right(self._begins, token) - 1

    def _fill(self, tokens: np.ndarray, number: int, inside: int) -> np.ndarray:
        """Fills tokens from a shard on, starting `inside` its part of the stream."""
        count, done = len(tokens), 0
        found = []
        while done < count:
            shard = self._open_shards.get(number) or self.shard(number)
            block = bisect_right(shard.begins, inside) - 1
            while done < count and block < len(shard.index):
                documents = self._blocks.get((number, block)) or self._block(number, shard, block)
                at = inside - shard.begins[block]
                taken = min(count - done, documents.tokens - at)
                self._fill_from(documents, shard.content, tokens[done:done + taken], at)
                first = bisect_left(documents.bounds, at)
                last = bisect_left(documents.bounds, at + taken, first)
                if first < last:
                    found.append(documents.starts[first:last] + (done - at))
                done += taken
                block += 1
                inside = shard.begins[block] if block < len(shard.begins) else 0
            number, inside = number + 1, 0
        return found[0] if len(found) == 1 else np.concatenate([NO_STARTS, *found])

    def _fill_from(self, documents: _Block, content: Content, tokens: np.ndarray, at: int) -> None:
        """Fills tokens from a block on, starting `at` its part of the stream."""
        pieces, count, done = documents.pieces, len(tokens), 0
        number = bisect_right(pieces, at) - 1
        while done < count:
            passed = at + done - pieces[number]
            end = pieces[number + 1] if number + 1 < len(pieces) else documents.tokens
            taken = min(end - pieces[number] - passed, count - done)
            content.read_into(tokens[done:done + taken], documents.stored[number] + passed * self._width)
            done, number = done + taken, number + 1

    def prefetch(self, first: int, count: int) -> None:
        """Says that these tokens will be read soon. For remote stores, from a fetching thread: it may wait for an
        index, never for tokens."""
        number = self._shard_of(first)
        while count > 0 and number < len(self.manifest.shards):
            shard = self.shard(number)
            inside = first - self._begins[number]
            taken = min(count, self._begins[number + 1] - first)
            block = bisect_right(shard.begins, inside) - 1
            while block < len(shard.index) and shard.begins[block] < inside + taken:
                at, size, lengths_at, documents = shard.index[block]
                low = max(0, inside - shard.begins[block]) if block not in shard.skips else 0
                high = min(size, inside + taken - shard.begins[block]) if block not in shard.skips else size
                shard.content.prefetch(at + low * self._width, at + high * self._width)
                shard.content.prefetch(lengths_at, lengths_at + 4 * documents)
                block += 1
            first, count, number = first + taken, count - taken, number + 1

    def documents(self, first: int = 0) -> Iterator[np.ndarray]:
        """The documents of the stream from document `first` on: their ids, (n,) int64, with BOS and EOS."""
        counts = self.manifest.shards.of("documents")
        for number in range(len(counts)):
            if first >= counts[number]:
                first -= int(counts[number])
                continue
            shard = self.shard(number)
            for block in range(len(shard.index)):
                starts = self._block(number, shard, block).starts
                if first >= len(starts):
                    first -= len(starts)
                    continue
                ends = [*starts[1:].tolist(), self._sizes(shard)[block]]
                for start, end in zip(starts[first:].tolist(), ends[first:], strict=True):
                    yield self.read(self._begins[number] + shard.begins[block] + start, end - start)[0]
                first = 0

    def _sizes(self, shard: _Shard) -> list[int]:
        """Tokens of every block in the stream."""
        return [row[1] - int(shard.skips[block][:, 2].sum()) if block in shard.skips else row[1]
                for block, row in enumerate(shard.index)]

    def where(self, number: int) -> str:
        """Path or address of a shard."""
        return self.store.where(self.manifest.shards.texts("name")[number])

    def shard(self, number: int) -> _Shard:
        """An open shard. DataError: missing, of another size, or with sidecars that do not fit it."""
        with self._lock:
            if number not in self._open_shards:
                try:
                    self._open_shards[number] = self._open(number)
                except OSError as error:
                    raise DataError(f"{self.where(number)}: cannot be read ({error}); copy it there or rebuild the "
                                    "source") from error
                while len(self._open_shards) > OPEN_SHARDS:
                    self._open_shards.popitem(last=False)
            self._open_shards.move_to_end(number)
            return self._open_shards[number]

    def check_size(self, number: int) -> None:
        """DataError: a shard is not there, or has another size than the manifest states."""
        stated = int(self.manifest.shards.of("size")[number])
        try:
            size = self.store.size(self.manifest.shards.texts("name")[number])
        except FileNotFoundError:
            raise DataError(f"{self.where(number)}: missing, though the manifest lists it; copy it there or rebuild "
                            "the source") from None
        except OSError as error:
            raise DataError(f"{self.where(number)}: cannot be read ({error}); copy it there or rebuild the source"
                            ) from error
        if size != stated:
            raise DataError(f"{self.where(number)}: {size} bytes, the manifest states {stated}; {REBUILD}")

    def _open(self, number: int) -> _Shard:
        entry = self.manifest.shards[number]
        self.check_size(number)
        index = self._sidecar(entry.name, "index", entry.blocks, INDEX_COLUMNS)
        bounded = (index >= 0).all() and (index <= entry.size).all()
        if not bounded or not (
            (index[:, 1] > 0).all() and (index[:, 3] > 0).all()
            and (index[:, 0] + index[:, 1] * self._width <= entry.size).all()
            and (index[:, 2] + index[:, 3] * 4 <= entry.size).all()
            and index[:, 1].sum() == entry.tokens + entry.skipped_tokens
            and index[:, 3].sum() == entry.documents + entry.skipped_documents
        ):
            raise DataError(f"{self.store.where(sidecar(entry.name, 'index'))}: does not fit the shard and its "
                            f"manifest; {REBUILD}")
        skips: dict[int, np.ndarray] = {}
        sizes = index[:, 1].copy()
        if entry.skipped_documents:
            skip = self._sidecar(entry.name, "skip", entry.skipped_documents, SKIP_COLUMNS)
            if (skip < 0).any() or (skip > entry.size).any() or (skip[:, 0] >= entry.blocks).any() or (
                    skip[:, 3].sum() != entry.skipped_tokens):
                raise DataError(f"{self.store.where(sidecar(entry.name, 'skip'))}: does not fit the shard and its "
                                f"manifest; {REBUILD}")
            skips = {block: skip[skip[:, 0] == block, 1:] for block in np.unique(skip[:, 0]).tolist()}
            np.subtract.at(sizes, skip[:, 0], skip[:, 3])
        begins = np.cumsum(sizes) - sizes
        return _Shard(self.store.open(entry.name, entry.size), index.tolist(), begins.tolist(), skips)

    def _sidecar(self, shard: str, kind: str, rows: int, columns: int) -> np.ndarray:
        name = sidecar(shard, kind)
        raw = self.store.whole(name)
        if len(raw) != rows * columns * 8:
            raise DataError(f"{self.store.where(name)}: {len(raw)} bytes, {rows} rows need {rows * columns * 8}; "
                            f"{REBUILD}")
        return np.frombuffer(raw, dtype="<i8").reshape(-1, columns).astype(np.int64)

    def _block(self, number: int, shard: _Shard, block: int) -> _Block:
        """Where the documents of a block are; computed once."""
        found = self._blocks.get((number, block))
        if found is None:
            lengths = self.lengths(number, shard, block)
            starts = np.cumsum(lengths) - lengths
            tokens, pieces, stored = int(lengths.sum()), [0], np.zeros(1, dtype=np.int64)
            if block in shard.skips:
                tokens, starts, pieces, stored = self._without(number, block, lengths, starts, shard.skips[block])
            stored = shard.index[block][0] + stored * self._width
            found = self._blocks[number, block] = _Block(tokens, starts, memoryview(starts), pieces, stored.tolist())
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return found

    def lengths(self, number: int, shard: _Shard, block: int) -> np.ndarray:
        """(documents,) int64 tokens of every document of a block, as stored. DataError: they do not fit the block."""
        _, tokens, at, documents = shard.index[block]
        lengths = np.frombuffer(shard.content.read(at, at + 4 * documents), "<u4").astype(np.int64)
        if int(lengths.sum()) != tokens or int(lengths.min()) < 1:
            raise DataError(f"{self.where(number)}: block {block} holds {tokens} tokens, its documents sum to "
                            f"{int(lengths.sum())}; {REBUILD}")
        return lengths

    def _without(self, number: int, block: int, lengths: np.ndarray, starts: np.ndarray, skip: np.ndarray
                 ) -> tuple[int, np.ndarray, list[int], np.ndarray]:
        """Of the documents that stay, given (n, 3) places, first tokens, tokens of the others: their tokens and starts
        in the stream; where runs of neighbours begin in the stream and as stored."""
        kept = np.ones(len(lengths), dtype=bool)
        places = skip[:, 0]
        if (places >= len(lengths)).any() or not (
                np.array_equal(starts[places], skip[:, 1]) and np.array_equal(lengths[places], skip[:, 2])
                and (np.diff(places) > 0).all()):
            raise DataError(f"{self.where(number)}: block {block} is not as its list of skipped documents says; "
                            f"{REBUILD}")
        kept[places] = False
        here = np.cumsum(lengths * kept) - lengths * kept
        firsts = np.flatnonzero(kept & ~np.concatenate([[False], kept[:-1]]))
        return int(lengths[kept].sum()), here[kept], here[firsts].tolist(), starts[firsts]


def read_manifest(store: Store) -> Manifest:
    """DataError: missing (an unfinished build), unreadable, or not a manifest."""
    where = store.where(MANIFEST)
    try:
        return parse_manifest(store.whole(MANIFEST), where)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{where}: missing, so the folder holds no finished source; "
                        "build it (dlcm tokenize) or correct data.root and the source's name") from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error}); correct data.root or the permissions") from error
