"""Our shards for people who live in webdataset: a pipeline of the library that yields documents as token arrays.

    from dlcm_lightning.data.pipeline import documents
    for ids in documents("/corpus", "web-en").shuffle(1000): ...

Shards are split over nodes and workers by the library's own stages, and any other stage can follow. What a manifest
leaves out, copies of earlier documents, does not come. Training here does not use it: the library splits by shard, so
the order depends on how many processes there are, a part of a shard cannot be skipped, and an epoch can only be resumed
by reading it again. The reader of this package (reader.py) gives the same row of the same step to any number of
processes, and begins at any step at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from dlcm_lightning.data.manifest import SKIP_COLUMNS, WIDTHS, Manifest, sidecar
from dlcm_lightning.data.source import read_manifest
from dlcm_lightning.data.store import Store, store_at
from dlcm_lightning.errors import DataError


def documents(root: str | Path, source: str, split: str = "train") -> webdataset.DataPipeline:
    """(n,) uint16 or uint32 arrays, one a document, BOS and EOS included, in the order of the shards.

    root: a data.root, a folder or an address. Each node (torch.distributed, or RANK and WORLD_SIZE) and each worker of
    a DataLoader gets shards of its own; some get none where there are fewer. DataError: no such source, or it holds
    nothing; while reading: a shard is damaged.
    """
    store = store_at(root).below(source).below(split)
    manifest = read_manifest(store)
    if not manifest.documents:
        raise DataError(f"{store.where()}: holds no documents")
    shards = [shard.name for shard in manifest.shards if shard.documents]
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(shards), webdataset.split_by_node, webdataset.split_by_worker,
        partial(_opened, store), webdataset.tariterators.tar_file_expander, webdataset.tariterators.group_by_keys,
        partial(_documents, store, manifest))


def _opened(store: Store, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Streams of any store, where the library would know fewer."""
    for shard in shards:
        with store.stream(shard["url"]) as stream:
            yield {**shard, "stream": stream}


def _documents(store: Store, manifest: Manifest, blocks: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
    suffix, width = WIDTHS[manifest.dtype]
    entries = {shard.name: shard for shard in manifest.shards}
    name, skips, seen = "", {}, 0
    for block in blocks:
        if block["__url__"] != name:
            _check_whole(store, entries, name, seen)
            name, seen = block["__url__"], 0
            skips = _skips(store, name) if entries[name].skip_sha256 else {}
        lengths = np.frombuffer(block["lengths.u32"], "<u4").astype(np.int64)
        tokens = np.frombuffer(block[f"tokens.{suffix}"], width)
        ends, skipped = np.cumsum(lengths), skips.get(int(block["__key__"]), frozenset())
        for place, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            if place not in skipped:
                yield tokens[end - length:end].copy()  # writable, and it does not hold the whole block
        seen += 1
    _check_whole(store, entries, name, seen)


def _check_whole(store: Store, entries: dict[str, Any], name: str, seen: int) -> None:
    """The library ends in silence where a header is damaged."""
    if name and entries[name].blocks != seen:
        raise DataError(f"{store.where(name)}: {seen} blocks, the manifest states {entries[name].blocks}; the shard is "
                        "damaged, copy it again or rebuild the source")


def _skips(store: Store, shard: str) -> dict[int, frozenset[int]]:
    """By block, the places of the documents that are left out."""
    rows = np.frombuffer(store.whole(sidecar(shard, "skip")), "<i8").reshape(-1, SKIP_COLUMNS)
    return {block: frozenset(rows[rows[:, 0] == block, 1].tolist()) for block in np.unique(rows[:, 0]).tolist()}
