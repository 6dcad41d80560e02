"""Where in a corpus a document lies: by its text, its md5, or its number in the stream of its source.

Every document of a shard is found, copies that the manifest skips too, for `NAME.hashes` has the md5 of all of them:
16 bytes a document are read, and no text. Only the same text, byte for byte, has the same md5. Shards that held
nothing but copies are gone, and these copies with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dlcm_lightning.data.manifest import sidecar
from dlcm_lightning.data.preprocessing.writer import IDENTITY_BYTES
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.source import REBUILD, Source
from dlcm_lightning.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where one copy of a document lies."""

    source: Source
    shard: int
    """Its number in the manifest."""
    block: int
    place: int
    """Among all documents of the block."""
    tokens: int
    """With BOS and EOS."""
    skipped: bool
    """Left out of the stream, as a copy of an earlier document."""
    first: int
    """Its first token in the stream; if it is skipped, that of the document after it."""
    number: int
    """Its number among the documents of the stream; the same."""

    def ids(self) -> np.ndarray:
        """(tokens,) int64 of a document that is not skipped."""
        return self.source.read(self.first, self.tokens)[0]


def streams_of(reader: Reader, split: str) -> list[Source]:
    """The streams of a run's sources, in the order of `reader.sources`; split: train or validation."""
    by_domain = {domain: iter(reader.training_stream(domain) if split == "train" else
                              [stream for stream, _ in reader.validation_stream(domain)])
                 for domain in reader.domains}
    return [next(by_domain[source.domain]) for source in reader.sources]


def with_md5(source: Source, identity: bytes, advance: Callable[[int], object] = lambda _: None) -> Iterator[Place]:
    """Every copy, in the order of the stream. advance: told of the bytes of hashes as they are searched.

    DataError: a sidecar is missing or of another size than its shard needs.
    """
    high, low = np.frombuffer(identity, "<u8").tolist()
    for shard in range(len(source.manifest.shards)):
        found = hashes(source, shard)
        for document in np.flatnonzero((found[:, 1] == low) & (found[:, 0] == high)).tolist():
            yield _stored(source, shard, document)
        advance(found.nbytes)


def hashes(source: Source, shard: int) -> np.ndarray:
    """(documents, 2) uint64: both halves of the md5 of every document of a shard, skipped ones too.

    DataError: the sidecar is missing or of another size.
    """
    entry = source.manifest.shards[shard]
    where = source.store.where(sidecar(entry.name, "hashes"))
    try:
        content = source.store.whole(sidecar(entry.name, "hashes"))
    except FileNotFoundError:
        raise DataError(f"{where}: missing; {REBUILD}") from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error}); copy it there or rebuild the source") from error
    documents = entry.documents + entry.skipped_documents
    if len(content) != documents * IDENTITY_BYTES:
        raise DataError(f"{where}: {len(content)} bytes, {documents} documents need {documents * IDENTITY_BYTES}; "
                        f"{REBUILD}")
    return np.frombuffer(content, "<u8").reshape(-1, 2)


def at_number(source: Source, number: int) -> Place:
    """Document `number` of the stream, from 0. DataError: there are fewer."""
    counts = source.manifest.shards.of("documents")
    if not 0 <= number < source.manifest.documents:
        raise DataError(f"{source.place}: no document {number}; its stream has {source.manifest.documents}, from 0")
    shard = int(np.searchsorted(np.cumsum(counts), number, side="right"))
    left, stored = number - int(counts[:shard].sum()), 0
    for block, row in enumerate(source.shard(shard).index):
        kept = np.flatnonzero(_kept(source, shard, block))
        if left < len(kept):
            return _stored(source, shard, stored + int(kept[left]))
        left, stored = left - len(kept), stored + row[3]
    raise DataError(f"{source.where(shard)}: holds fewer documents than its manifest states; {REBUILD}")


def _kept(source: Source, shard: int, block: int) -> np.ndarray:
    """(documents,) bool: which documents of a block are in the stream."""
    opened = source.shard(shard)
    kept = np.ones(opened.index[block][3], dtype=bool)
    if block in opened.skips:
        places = opened.skips[block][:, 0]
        if (places >= len(kept)).any():
            raise DataError(f"{source.where(shard)}: block {block} is not as its list of skipped documents says; "
                            f"{REBUILD}")
        kept[places] = False
    return kept


def _stored(source: Source, shard: int, document: int) -> Place:
    """A document by its place among all of its shard, skipped ones too."""
    opened, shards = source.shard(shard), source.manifest.shards
    ends = np.cumsum([row[3] for row in opened.index])
    block = int(np.searchsorted(ends, document, side="right"))
    place = document - (int(ends[block - 1]) if block else 0)
    lengths, kept = source.lengths(shard, opened, block), _kept(source, shard, block)
    skipped = int((~kept[:place]).sum()) + sum(len(places) for other, places in opened.skips.items() if other < block)
    return Place(
        source, shard, block, place, int(lengths[place]), not kept[place],
        first=int(shards.of("tokens")[:shard].sum()) + opened.begins[block] + int(lengths[:place][kept[:place]].sum()),
        number=int(shards.of("documents")[:shard].sum()) + document - skipped)
