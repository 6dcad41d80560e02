"""From finished shards to a source: duplicates left out, manifests written, the folder given its name.

A build lies in `.SOURCE.unfinished` beside the place it will have:

    recipe.json  inputs.json        what is built from what (plan.py, continuing.py)
    tasks/TTTTTT.done  .lock        which tasks are done; who is at work
    train/  validation/             shards with their sidecars and records (writer.py)

Merging needs every task done. Copies of a text have one md5 and so one split; in each split all but the first of the
stream are left out by a NAME.skip beside the shard, and a shard of nothing but copies is left out of the manifest. No
shard is read but for the lengths of its documents, and none is written.

Every step can be done again: sidecars and manifests are a function of the shards, and once both manifests are there
nothing remains but to remove what they do not name and to rename the folder. A merge that is killed is merged again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.atomic_io import flush, write_atomically
from dlcm_lightning.data.manifest import MANIFEST, Manifest, ShardEntry, parse_manifest, sidecar
from dlcm_lightning.data.preprocessing.account import ACCOUNT, Account, read_account, write_account
from dlcm_lightning.data.preprocessing.continuing import INPUTS, read_inputs, write_inputs
from dlcm_lightning.data.preprocessing.documents import SPLITS
from dlcm_lightning.data.preprocessing.duplicates import CHUNK_DOCUMENTS, Marks, find_duplicates
from dlcm_lightning.data.preprocessing.locks import exclusive
from dlcm_lightning.data.preprocessing.plan import PLAN, Plan
from dlcm_lightning.data.preprocessing.records import Record, done_tasks, read_record, record_path
from dlcm_lightning.data.preprocessing.writer import finish_split, finished_shards
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log, progress_bar

LISTED = 20
"""Unfinished tasks named in a message."""


@dataclass(frozen=True)
class Built:
    """A finished source."""

    folder: Path
    train: Manifest
    validation: Manifest
    account: dict[str, Any]
    """account.json: what became of everything that was read."""

    @property
    def duplicates(self) -> int:
        """Documents left out because an earlier one has the same text."""
        return int(self.account["copies"])


def unfinished(folder: Path) -> Path:
    """Where a source is built."""
    return folder.with_name(f".{folder.name}.unfinished")


def is_merged(working: Path) -> bool:
    """Whether nothing remains but to clear away and rename."""
    return (working / ACCOUNT).is_file()


def read_built(folder: Path) -> Built:
    """DataError: no finished source."""
    manifests: list[Manifest] = []
    for split in SPLITS:
        path = folder / split / MANIFEST
        try:
            manifests.append(parse_manifest(path.read_bytes(), str(path)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); remove {folder} and build the source again") from error
    train, validation = manifests
    return Built(folder, train, validation, read_account(folder))


def merge(out: str | Path, source: str, log: Log = print) -> Built:
    """`dlcm data merge`. Returns at once if the source is finished. DataError: no such build, unfinished tasks."""
    folder = Path(out) / source
    if not unfinished(folder).is_dir():
        if (folder / PLAN).is_file():
            log(f"data: {folder} is finished")
            return read_built(folder)
        raise DataError(f"{unfinished(folder)}: no build of {source!r} below {out}; run `dlcm tokenize` first, and "
                        "name its --out and --source")
    return merge_build(folder)


def merge_build(folder: Path, chunk_documents: int = CHUNK_DOCUMENTS) -> Built:
    """Finishes the build of the source at `folder`; waits for another process that is at it.

    chunk_documents: see duplicates.py. DataError: unfinished tasks, no document at all, shards gone, no room.
    """
    working = unfinished(folder)
    try:
        with exclusive(working / "merge.lock"):
            if not working.is_dir():  # another process has finished it
                return read_built(folder)
            if not is_merged(working):
                _merge(working, Plan.load(working), chunk_documents)
            _clear(working)
            working.replace(folder)
            flush(folder.parent)
    except OSError as error:
        if folder.is_dir() and not working.is_dir():
            return read_built(folder)
        raise DataError(f"{working}: cannot be merged ({error}); what is done is kept, mend this and merge "
                        "again") from error
    return read_built(folder)


def _merge(working: Path, plan: Plan, chunk_documents: int) -> None:
    tasks, done = len(plan.tasks()), done_tasks(working)
    if len(done) < tasks:
        missing = [number for number in range(tasks) if number not in done]
        shown = ", ".join(map(str, missing[:LISTED])) + (", ..." if len(missing) > LISTED else "")
        raise DataError(f"{working}: {len(missing)} of {tasks} tasks are unfinished: {shown}; run `dlcm tokenize` "
                        "with the same arguments to the end (task t belongs to --array i/n where t % n = i)")
    records = [_record(working, plan, number, places) for number, places in enumerate(plan.tasks())]
    shards = {split: list(_shards(working, split, records)) for split in SPLITS}
    total = sum(shard.documents for entries in shards.values() for shard in entries)
    if not total:
        shutil.rmtree(working)
        read = _account(records)
        raise DataError(f"source {plan.source!r}: no document with text in it ({read.nulls:,d} texts are null, "
                        f"{read.blanks:,d} blank); check the inputs and their text field")
    with progress_bar(total=2 * total, desc=f"merge {plan.source}", unit=" documents", unit_scale=True) as bar:
        kept = {split: _without_copies(working, split, entries, chunk_documents, bar.update)
                for split, entries in shards.items()}
    seen = read_inputs(working)
    write_inputs(working, {**seen, "sha256": [digest for record in records for digest in record.digests]})
    manifests = [finish_split(working / split, kept[split], source=plan.source, domain=plan.domain, split=split,
                              tokenizer=plan.tokenizer, vocab_size=plan.vocab_size, about=plan.about, lossless=True,
                              validation_share=plan.validation_share) for split in SPLITS]
    write_account(working, _account(records), seen["left_out"], *manifests)


def _record(working: Path, plan: Plan, number: int, places: range) -> Record:
    """DataError: a task was done by a process that was given other inputs."""
    record = read_record(working, number)
    if plan.names and record.names != plan.names[places.start:places.stop]:
        raise DataError(f"{working}: task {number} was done with other inputs than the build has now; remove "
                        f"{record_path(working, number)} and its shards {number:06d}-*, run `dlcm tokenize` again")
    return record


def _account(records: list[Record]) -> Account:
    found = Account()
    for record in records:
        found.add(record.account)
    return found


def _shards(working: Path, split: str, records: list[Record]) -> Iterator[ShardEntry]:
    """Finished shards in the order of the stream. DataError: fewer than their task has written, or one is damaged."""
    for task, about in enumerate(records):
        record = record_path(working, task)
        wanted, found = about.shards.get(split), finished_shards(working / split, task)
        if len(found) != wanted:
            raise DataError(f"{working / split}: task {task} wrote {wanted} shards and {len(found)} are there; remove "
                            f"{record} and run `dlcm tokenize` again")
        for shard in found:
            size = (working / split / shard.name).stat().st_size
            if size != shard.size:
                raise DataError(f"{working / split / shard.name}: {size} bytes, {shard.size} were written; remove "
                                f"{sidecar(shard.name, 'entry')} beside it and {record}, run `dlcm tokenize` again")
            yield shard


def _without_copies(working: Path, split: str, shards: list[ShardEntry], chunk_documents: int,
                    advance: Callable[[int], object]) -> list[ShardEntry]:
    """Writes NAME.skip where a shard holds copies; returns the entries of what stays."""
    folder = working / split

    def hashes() -> Iterator[np.ndarray]:
        for shard in shards:
            yield np.fromfile(folder / sidecar(shard.name, "hashes"), dtype="<u8").reshape(-1, 2)

    documents = sum(shard.documents for shard in shards)
    marks = find_duplicates(hashes(), documents, working / "buckets", chunk_documents=chunk_documents,
                            advance=advance)
    kept: list[ShardEntry] = []
    first = 0
    for shard in shards:
        entry = _skipping(folder, shard, marks, first)
        first += shard.documents
        if entry.documents:
            kept.append(entry)
        advance(shard.documents)
    return kept


def _skipping(folder: Path, shard: ShardEntry, marks: Marks, first: int) -> ShardEntry:
    """The shard's entry without its copies. first: place of its first document in the stream."""
    copies = np.flatnonzero(marks.of(first, shard.documents))
    if not len(copies):
        return shard
    sizes = np.fromfile(folder / sidecar(shard.name, "sizes"), dtype="<i8")
    index = np.fromfile(folder / sidecar(shard.name, "index"), dtype="<i8").reshape(-1, 4)
    with (folder / shard.name).open("rb") as file:
        lengths = []
        for at, count in index[:, 2:].tolist():
            file.seek(at)
            lengths.append(np.frombuffer(file.read(4 * count), dtype="<u4").astype(np.int64))
    begins = np.concatenate([np.cumsum(block) - block for block in lengths])
    blocks = np.repeat(np.arange(len(index)), index[:, 3])
    places = np.concatenate([np.arange(len(block)) for block in lengths])
    tokens = np.concatenate(lengths)
    skip = np.stack([blocks, places, begins, tokens], axis=1)[copies].astype("<i8")
    write_atomically(folder / sidecar(shard.name, "skip"), skip.tobytes())
    skipped = int(skip[:, 3].sum())
    return replace(shard, documents=shard.documents - len(copies), tokens=shard.tokens - skipped,
                   text_bytes=shard.text_bytes - int(sizes[copies].sum()), skipped_documents=len(copies),
                   skipped_tokens=skipped, skip_sha256=sha256(skip.tobytes()).hexdigest())


def _clear(working: Path) -> None:
    """Removes everything that the manifests do not name."""
    for split in SPLITS:
        path = working / split / MANIFEST
        manifest = parse_manifest(path.read_bytes(), str(path))
        wanted = {MANIFEST}
        for shard in manifest.shards:
            kinds = ("index", "hashes", "skip") if shard.skip_sha256 else ("index", "hashes")
            wanted |= {shard.name, *(sidecar(shard.name, kind) for kind in kinds)}
        for found in (working / split).iterdir():
            if found.name not in wanted:
                found.unlink()
    for found in working.iterdir():
        if found.name in (*SPLITS, PLAN, INPUTS, ACCOUNT):
            continue
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink()
