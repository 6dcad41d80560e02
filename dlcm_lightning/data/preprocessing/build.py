"""Texts into a source of shards: `dlcm tokenize`, and the same for texts in memory.

    inputs -> plan (plan.py) -> tasks (tasks.py), by a worker_pool of processes (worker_pool.py) -> merge (merge.py)

Everything happens in `out/.SOURCE.unfinished`, which is renamed to `out/SOURCE` last: a build that was killed at any
moment is never taken for a whole one, and the same command continues it. The result depends on the inputs and the
options alone, byte for byte: not on the number of processes, nor on which of several machines did which tasks, nor on
how often it was interrupted.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.data.preprocessing.continuing import check_finished, continue_build, save_inputs
from dlcm_lightning.data.preprocessing.documents import VALIDATION_SHARE
from dlcm_lightning.data.preprocessing.inputs import CARD, CIRCLES, DANGLING, SUM, Listing, list_inputs
from dlcm_lightning.data.preprocessing.kinds import RECORDS
from dlcm_lightning.data.preprocessing.locks import exclusive
from dlcm_lightning.data.preprocessing.merge import Built, is_merged, merge_build, read_built, unfinished
from dlcm_lightning.data.preprocessing.plan import PLAN, TASK_BYTES, Input, Plan
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.preprocessing.records import done_tasks
from dlcm_lightning.data.preprocessing.tasks import Task
from dlcm_lightning.data.preprocessing.worker_pool import (
    Job,
    Progress,
    default_workers,
    do_tasks,
    not_written,
    threads_of,
)
from dlcm_lightning.data.preprocessing.writer import BLOCK_TOKENS, SHARD_BYTES
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from dlcm_lightning.paths import is_address
from dlcm_lightning.progress import Log

BLOCKS_PER_SHARD = 16
"""At the least, where shards are small."""


def tokenize(inputs: Sequence[str | Path], out: str | Path, recipe: Recipe, *,
             tokenizer_folder: str | Path | None = None, workers: int | None = None,
             array: tuple[int, int] | None = None, validation_share: float = VALIDATION_SHARE,
             shard_bytes: int = SHARD_BYTES, task_bytes: int = TASK_BYTES,
             log: Log = print) -> Built | None:
    """`dlcm tokenize`: files, folders, addresses (inputs.py, formats.py) into out/NAME/{train,validation}.

    out becomes a `data.root`: it also receives the tokenizer, and refuses a second one. workers: processes
    of up to four threads; None: for all cores. array: (i, n) does the tasks t with t % n = i and does not merge;
    returns None. A source that is finished and was made of the same is returned at once.

    DataError: nothing to read, a file that cannot be read (named with its line or row), another tokenizer or another
    validation share than out holds, the source built or begun from other inputs or options, a disk that cannot be
    written.
    """
    if is_address(str(out)):
        raise DataError(f"out = {out}: give a folder of this machine's file systems, and copy it to the store "
                        "afterwards")
    out = Path(out)
    if workers is not None and workers < 1:
        raise DataError(f"workers = {workers}: must be at least 1")
    if array is not None and not 0 <= array[0] < array[1]:
        raise DataError(f"array = {array[0]}/{array[1]}: i/n needs 0 <= i < n")
    tokenizer = _tokenizer(out, tokenizer_folder)
    listing = list_inputs(inputs, recipe.glob, recipe.format, out)
    files = listing.files
    plan = Plan(source=recipe.name, domain=recipe.domain, tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, text_field=recipe.text_field, validation_share=validation_share,
                shard_bytes=shard_bytes, block_tokens=min(BLOCK_TOKENS, max(1, shard_bytes // BLOCKS_PER_SHARD)),
                task_bytes=task_bytes, about=recipe.about, reading=recipe.format,
                names=tuple(file.name for file in files), sizes=tuple(file.size for file in files))
    folder = out / plan.source
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out / ".lock"):
            if not (out / "tokenizer.json").is_file():
                tokenizer.save(out)
            _check_share(out, plan)
            encoder = copy(tokenizer.encoder)
            del tokenizer  # its memory is the workers'
            finished = _begin(plan, listing, folder, log)
        if finished:
            log(f"data: {folder} is finished, nothing to do")
            return read_built(folder)
        _say(listing, log)
        if not is_merged(unfinished(folder)):
            _work(Job(plan, unfinished(folder), encoder), files, workers or default_workers(), array, log)
        if array is not None:
            log(f"data: the tasks of {array[0]}/{array[1]} are done; once all are, dlcm data merge {out} --source "
                   f"{plan.source}")
            return None
        return merge_build(folder)
    except OSError as error:
        raise DataError(not_written(out, error)) from error


def tokenize_documents(
    texts: Iterable[str], tokenizer: Tokenizer, folder: str | Path, *, source: str, domain: str,
    validation_share: float = VALIDATION_SHARE, shard_bytes: int = SHARD_BYTES, block_tokens: int = BLOCK_TOKENS,
    total_bytes: int = 0, about: dict[str, str] | None = None,
) -> Built:
    """Builds a source from texts in memory, in this process and from the beginning.

    total_bytes: length of the texts in UTF-8, for the progress bar. DataError: the folder exists; no document at all.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it to build the source again")
    plan = Plan(source=source, domain=domain, tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                text_field="", validation_share=validation_share, shard_bytes=shard_bytes, block_tokens=block_tokens,
                about=about or {})
    working = unfinished(folder)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    save_inputs(working, Listing())
    plan.save(working)
    progress = Progress(source, total_bytes)
    try:
        Task(plan, working, 0).write(texts, tokenizer.encoder, progress, threads=threads_of(1))
    finally:
        progress.close()
    return merge_build(folder)


def _tokenizer(out: Path, folder: str | Path | None) -> Tokenizer:
    """The tokenizer to use. DataError: none is named nor held, or the two are not the same."""
    held = out / "tokenizer.json"
    if folder is None and not held.is_file():
        raise DataError(f"{held}: missing; name the folder of a tokenizer for the first source of {out}")
    tokenizer = Tokenizer.load(out if folder is None else folder)
    if held.is_file() and sha256_of(held) != tokenizer.fingerprint:
        raise DataError(f"{held}: another tokenizer than {folder}; all sources of a corpus share one, write elsewhere "
                        "or use that one")
    return tokenizer


def _check_share(out: Path, plan: Plan) -> None:
    """DataError: another source of the corpus was parted into splits in another way. The caller holds the lock."""
    for path in sorted([*out.glob(f"*/{PLAN}"), *out.glob(f".*.unfinished/{PLAN}")]):
        try:
            other = json.loads(path.read_bytes())
            name, share = other["source"], other["validation_share"]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # no source of a build
        if name != plan.source and share != plan.validation_share:
            raise DataError(f"validation_share = {plan.validation_share}: source {name!r} of {out} has {share}, and a "
                            "text that both hold would be trained on in one and validated on in the other; give "
                            f"--validation-share {share}, or write elsewhere")


def _begin(plan: Plan, listing: Listing, folder: Path, log: Log) -> bool:
    """Makes the working folder, or goes on with the one there. True: the source is finished.

    DataError: built or begun from something else. The caller holds the lock of the corpus.
    """
    working = unfinished(folder)
    if working.is_dir() and (working / PLAN).is_file():
        continue_build(plan, listing, working, log)
        return False
    if folder.exists():
        check_finished(plan, listing, folder)
        return True
    working.mkdir(exist_ok=True)
    save_inputs(working, listing)
    plan.save(working)
    return False


def _say(listing: Listing, log: Log) -> None:
    """What is not obvious of the inputs: files left out by their names, whole documents beside records."""
    for reason, found in sorted(listing.left_out.items()):
        if reason in (CARD, SUM, DANGLING, CIRCLES):
            log(f"data: left out: {found.count:,d} {reason}, such as {found.names[0]}")
    kinds = Counter(file.kind for file in listing.files)
    if kinds["text"] and any(kinds[kind] for kind in RECORDS):
        first = next(file.name for file in listing.files if file.kind == "text")
        log(f"data: of {kinds.total():,d} files {kinds['text']:,d} are one document each, such as {first}, and the "
               "others hold records; --glob leaves files out")


def _work(job: Job, files: list[Input], workers: int, array: tuple[int, int] | None,
          log: Log) -> None:
    """Does the unfinished tasks, or those of them that are this job's."""
    plan, (number, jobs) = job.plan, array or (0, 1)
    mine = [(task, places) for task, places in enumerate(plan.tasks()) if task % jobs == number]
    done = done_tasks(job.working)
    sizes = {task: sum(max(0, plan.sizes[place]) for place in places) for task, places in mine}
    unfinished_tasks = [(task, files[places.start:places.stop]) for task, places in mine if task not in done]
    if unfinished_tasks:
        progress = Progress(plan.source, sum(sizes.values()), sum(sizes[task] for task, _ in mine if task in done))
        try:
            do_tasks(job, unfinished_tasks, workers, progress, log)
        finally:
            progress.close()
