"""Every byte of a source compared with what its manifest states: sha256, index, counts, range of the ids.

Opening a corpus checks only what is cheap; this reads all of it. Small corpora are verified whenever they are opened,
large ones by `dlcm data verify`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from dlcm_lightning.data.manifest import index_of, sidecar
from dlcm_lightning.data.source import REBUILD, Source
from dlcm_lightning.errors import DataError

PIECE_BYTES = 1024**2


def verify(source: Source) -> None:
    """DataError names the first shard that is not as stated."""
    for number in range(len(source.manifest.shards)):
        verify_shard(source, number)


def damages(source: Source) -> Iterator[tuple[int, str]]:
    """After every shard: its bytes, and what is wrong with it or nothing."""
    for number, size in enumerate(source.manifest.shards.of("size").tolist()):
        try:
            verify_shard(source, number)
            yield size, ""
        except DataError as error:
            yield size, str(error)


def verify_shard(source: Source, number: int) -> None:
    """DataError: missing, other bytes, an index or counts that are not the shard's, ids beyond the vocabulary."""
    entry, where = source.manifest.shards[number], source.where(number)
    shard = source.shard(number)
    try:
        _check_sum(source, entry.name, entry.sha256)
        if entry.skip_sha256:
            _check_sum(source, sidecar(entry.name, "skip"), entry.skip_sha256)
        with source.store.stream(entry.name) as file:
            found = index_of(file, where)
        if found.tolist() != shard.index:
            raise DataError(f"{source.store.where(sidecar(entry.name, 'index'))}: not the index of its shard; "
                            f"{REBUILD}")
        first = int(source.manifest.shards.of("tokens")[:number].sum())
        documents, tokens = 0, 0
        for block, row in enumerate(shard.index):
            documents += len(source.lengths(number, shard, block))
            raw = shard.content.read(row[0], row[0] + row[1] * source.manifest.width)
            largest = int(np.frombuffer(raw, f"<u{source.manifest.width}").max())
            tokens += row[1]
            if largest >= source.manifest.vocab_size:
                raise DataError(f"{where}: token id {largest} beyond the vocabulary of "
                                f"{source.manifest.vocab_size}; {REBUILD}")
        if entry.tokens:
            source.read(first, 1)  # which also compares the skipped documents of its block with their lengths
        stated = entry.documents + entry.skipped_documents
        if documents != stated or tokens != entry.tokens + entry.skipped_tokens:
            raise DataError(f"{where}: holds {documents} documents and {tokens} tokens, the manifest states {stated} "
                            f"and {entry.tokens + entry.skipped_tokens}; {REBUILD}")
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error}); copy it there or rebuild the source") from error


def _check_sum(source: Source, name: str, stated: str) -> None:
    hashed = hashlib.sha256()
    with source.store.stream(name) as file:
        while piece := file.read(PIECE_BYTES):
            hashed.update(piece)
    digest = hashed.hexdigest()
    if digest != stated:
        raise DataError(f"{source.store.where(name)}: sha256 {digest[:12]}..., the manifest states {stated[:12]}...; "
                        f"{REBUILD}")
