"""Every file of a corpus against its manifests: what is damaged, what is missing, what nobody lists.

`verify.py` knows what a sound shard is; this goes through all shards of both splits of every source, in several
threads (sums and reading do without Python's lock), and does not stop at the first that is not. Besides, every
document is decoded, and the md5 of what comes out must be the one that `NAME.hashes` has for the text that went in: a
tokenizer that changed texts is found by what it did. Files that no manifest lists do no harm and are said.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import fsspec

from dlcm_lightning.config import Config
from dlcm_lightning.data.inspection.table import escape_control_characters
from dlcm_lightning.data.inspection.texts import Texts
from dlcm_lightning.data.manifest import MANIFEST, Shards, sidecar
from dlcm_lightning.data.preprocessing.account import ACCOUNT
from dlcm_lightning.data.preprocessing.continuing import INPUTS
from dlcm_lightning.data.preprocessing.documents import SPLITS
from dlcm_lightning.data.preprocessing.plan import PLAN
from dlcm_lightning.data.reader import corpus_folder
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.store import Store, store_at
from dlcm_lightning.data.tokenizer import TOKENIZER, Tokenizer
from dlcm_lightning.data.verify import verify_shard
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log, progress_bar

LISTED = 5
"""Files named of those that no manifest lists."""
AHEAD = 4
"""Shards that wait for each thread."""


@dataclass
class Found:
    """What a verification came to."""

    sources: int = 0
    shards: int = 0
    bytes: int = 0
    damaged: int = 0
    """Shards and manifests."""


def verify_run(config: Config, workers: int, log: Log) -> Found:
    """The sources that a run reads; a sample corpus may lack some."""
    data = config.data
    later = {name for change in data.weight_changes for name, weight in change.weights.items() if weight}
    names = [source.name for source in data.sources if source.weight or source.name in later]
    store = store_at(data.root if data.corpus == "shards" else corpus_folder(data, config.model.vocab_size))
    if data.corpus == "sample":
        for name in names:
            if store.exists() and not store.exists(name):
                log(f"note: the sample corpus lacks {name}; its weight goes to the other sources")
        names = [name for name in names if store.exists(name)] or names
    return _verify(store, names, workers, log)


def verify_folder(place: str, workers: int, log: Log) -> Found:
    """All sources below a folder or an address, or the one that it is. DataError: there is none."""
    store = store_at(place.rstrip("/") or "/")
    if not store.exists(TOKENIZER) and any(store.exists(f"{split}/{MANIFEST}") for split in SPLITS):
        whole = os.path.abspath(place) if not store.remote else store.where()
        parent, _, name = whole.rstrip("/").rpartition("/")
        return _verify(store_at(parent), [name], workers, log)
    names = []
    for name in sorted(_names(store)):
        if name.endswith(".unfinished"):
            log(f"note: {escape_control_characters(store.where(name))}: a build that is not finished; not looked at")
        elif any(store.below(name).exists(split) for split in SPLITS):
            names.append(name)
    if not names:
        raise DataError(f"{store.where()}: holds no source; name a data.root, which `dlcm tokenize` writes, a source "
                        "in it, or a run file")
    return _verify(store, names, workers, log)


def _verify(store: Store, names: list[str], workers: int, log: Log) -> Found:
    """report: told of every damage and every note, one line each. DataError: no tokenizer."""
    if workers < 1:
        raise DataError(f"--workers {workers}: must be at least 1")
    try:
        tokenizer = Tokenizer.load(store)
    except DataError as error:
        raise DataError(f"{error}; whatever was built with it is to be built again") from error
    texts = Texts(tokenizer)
    found, streams = Found(sources=len(names)), []
    for name in names:
        for split in SPLITS:
            try:
                stream = Source(store.below(name).below(split), tokenizer)
                streams.append(stream)
                for note in _notes(stream, name, split):
                    log(f"note: {escape_control_characters(note)}")
            except DataError as error:
                found.damaged += 1
                log(f"damaged: {escape_control_characters(str(error))}")
        if store.exists(name):
            for note in _unlisted(store.below(name), {*SPLITS, PLAN, INPUTS, ACCOUNT}):
                log(f"note: {escape_control_characters(note)}")
    shards = [(stream, number) for stream in streams for number in range(len(stream.manifest.shards))]
    found.shards, found.bytes = len(shards), sum(stream.manifest.shards.total("size") for stream in streams)
    with progress_bar(total=found.bytes, desc="verify", unit="B", unit_scale=True) as bar:
        for size, damages in _checked(shards, texts, workers):
            found.damaged += bool(damages)
            for damage in damages:
                if bar.last_print_n:  # it is shown
                    bar.clear()
                log(f"damaged: {escape_control_characters(damage)}")
            bar.update(size)
    return found


def _checked(shards: Iterable[tuple[Source, int]], texts: Texts, workers: int) -> Iterator[tuple[int, list[str]]]:
    """After every shard, in order: its bytes, and what is wrong with it."""
    waiting: list[Future[tuple[int, list[str]]]] = []
    threads = ThreadPoolExecutor(workers)
    try:
        for source, number in shards:
            waiting.append(threads.submit(_damages, source, number, texts))
            if len(waiting) > AHEAD * workers:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _damages(source: Source, number: int, texts: Texts) -> tuple[int, list[str]]:
    """Documents of a shard that is damaged are not decoded."""
    found: list[str] = []
    for check in (verify_shard, texts.check):
        if found:
            break
        try:
            check(source, number)
        except DataError as error:
            found.append(str(error))
    return int(source.manifest.shards.of("size")[number]), found


def _notes(stream: Source, name: str, split: str) -> Iterator[str]:
    manifest = stream.manifest
    if (manifest.source, manifest.split) != (name, split):
        yield f"{stream.place}: its manifest is that of {manifest.source!r}, {manifest.split}; was the folder renamed?"
    yield from _unlisted(stream.store, _listed(manifest.shards))


def _listed(shards: Shards) -> set[str]:
    """Files that a split consists of."""
    names = shards.texts("name")
    skipping = [name for name, sum_ in zip(names, shards.texts("skip_sha256"), strict=True) if sum_]
    return {MANIFEST, *names, *(sidecar(name, kind) for name in names for kind in ("index", "hashes")),
            *(sidecar(name, "skip") for name in skipping)}


def _unlisted(store: Store, listed: set[str]) -> Iterator[str]:
    others = sorted(_names(store) - listed)
    if others:
        more = f" and {len(others) - LISTED:,d} more" if len(others) > LISTED else ""
        yield (f"{store.where()}: {', '.join(others[:LISTED])}{more} belong{'s' * (len(others) == 1)} to no manifest; "
               "nothing reads it, remove it if you know what it is")


def _names(store: Store) -> set[str]:
    """Of all files and folders in a folder."""
    try:
        if not store.remote:
            return set(os.listdir(store.where()))
        system, path = fsspec.url_to_fs(store.where())
        return {str(one).rstrip("/").rpartition("/")[2] for one in system.ls(path, detail=False)}
    except OSError as error:
        raise DataError(f"{store.where()}: cannot be listed ({error}); correct the path or the permissions") from error
