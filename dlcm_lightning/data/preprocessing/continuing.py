"""Whether the inputs of a build that goes on are those that it began with, and what is to be done anew if not.

A name and a size do not make the same file. `inputs.json` in the folder of a build holds a stamp of every input (inode
and times of change): where that is what it was, nothing is read. Where it is not, the sha256 decides that was taken
while the input was read: another mount and a fresh copy are the same inputs, an edited file of equal size is not.

Inputs may be left out on the way, such as a damaged one. Tasks are cut by the list of inputs, so some of them become
others: those are done anew, and the rest is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.data.preprocessing.inputs import Listing
from dlcm_lightning.data.preprocessing.locks import locked
from dlcm_lightning.data.preprocessing.plan import Input, Plan
from dlcm_lightning.data.preprocessing.raw_bytes import raw_bytes
from dlcm_lightning.data.preprocessing.records import TASKS, done_tasks, forget_task, read_record
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log, progress_bar

INPUTS = "inputs.json"
PIECE_BYTES = 1024**2


def save_inputs(folder: Path, listing: Listing, digests: Sequence[str] = ()) -> None:
    """inputs.json: a stamp of every input, what was left out; once all are read, their sha256."""
    left_out = {reason: {"count": found.count, "bytes": found.size, "names": found.names}
                for reason, found in sorted(listing.left_out.items())}
    write_inputs(folder, {"stamps": [file.stamp for file in listing.files], "sha256": list(digests),
                          "left_out": left_out})


def write_inputs(folder: Path, found: dict[str, Any]) -> None:
    write_atomically(folder / INPUTS, (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode(
        "utf-8", "surrogateescape"))


def read_inputs(folder: Path) -> dict[str, Any]:
    """DataError: missing, or not what `save_inputs` writes."""
    path = folder / INPUTS
    try:
        found: dict[str, Any] = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        if sorted(found) != ["left_out", "sha256", "stamps"]:
            raise ValueError(f"holds {', '.join(found)}")
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not the list of inputs of a build ({error}); remove {folder} and build again"
                        ) from error
    return found


def check_finished(plan: Plan, listing: Listing, folder: Path) -> None:
    """DataError: a finished source was made of something else."""
    made = Plan.load(folder)
    against = plan.differences(made)
    if plan.names != made.names:
        against += _other_names(plan.names, made.names) or ["the inputs come in another order"]
    elif not against:
        seen = read_inputs(folder)
        changed = _changed(listing.files, made.sizes, seen["stamps"], seen["sha256"])
        against += _other_content(changed)
    if against:
        raise DataError(f"{folder}: exists already and was built from something else: {'; '.join(against)}. Remove it "
                        "to build the source again, or choose another --source")


def continue_build(plan: Plan, listing: Listing, working: Path, log: Log) -> None:
    """Goes on with these inputs: forgets the tasks that are other ones now, says so, and notes the new plan.

    DataError: begun with something else, an input that was read has changed, another process is at such a task.
    """
    begun, seen = Plan.load(working), read_inputs(working)
    against = plan.differences(begun)
    if plan.names != begun.names and not against:
        against = _other_names(plan.names, begun.names)
        if not Counter(plan.names) - Counter(begun.names):
            against = [] if _in_order(plan.names, begun.names) else ["the inputs come in another order"]
    old, new = begun.tasks(), plan.tasks()
    done = done_tasks(working)
    others = [number for number in range(len(old)) if number >= len(new) or
              [begun.names[place] for place in old[number]] != [plan.names[place] for place in new[number]]]
    if not against:
        kept = sorted(done.difference(others))
        files = [listing.files[place] for number in kept for place in new[number]]
        before = [place for number in kept for place in old[number]]
        digests = [digest for number in kept for digest in read_record(working, number).digests]
        changed = _changed(files, [begun.sizes[place] for place in before],
                           [seen["stamps"][place] for place in before], digests)
        against = _other_content(changed)
    if against:
        raise DataError(f"{working}: begun with something else: {'; '.join(against)}. Give what was given then, or "
                        "remove that folder to begin anew")
    if len(plan.names) < len(begun.names):
        gone = next(iter(Counter(begun.names) - Counter(plan.names)))
        log(f"data: {len(begun.names) - len(plan.names)} inputs are left out now, such as {gone}; "
               f"{len(done.intersection(others))} finished tasks are done anew, {len(done.difference(others))} kept")
    for number in others:
        with locked(working / TASKS / f"{number:06d}.lock", wait=False) as mine:
            if not mine:
                raise DataError(f"{working}: another process is at task {number}, whose inputs are others now; end it "
                                "and run the same command again")
            forget_task(working, number)
    if plan != begun:
        plan.save(working)
    save_inputs(working, listing)


def _other_names(now: Sequence[str], then: Sequence[str]) -> list[str]:
    fewer, more = Counter(then) - Counter(now), Counter(now) - Counter(then)
    return [f"{names.total()} inputs {word}, such as {min(names)}"
            for names, word in ((fewer, "are gone"), (more, "are new")) if names]


def _in_order(now: Sequence[str], then: Sequence[str]) -> bool:
    """Whether one list is the other with some left out."""
    rest = iter(then)
    return all(name in rest for name in now)


def _changed(files: Sequence[Input], sizes: Sequence[int], stamps: Sequence[str], digests: Sequence[str]
             ) -> list[Input]:
    """The files that are not what they were when they were read. What has another stamp is read once more."""
    found: list[Input] = []
    unsure: list[tuple[Input, str]] = []
    for file, size, stamp, digest in zip(files, sizes, stamps, digests, strict=True):
        if file.size < 0 or (file.size == size and file.stamp and file.stamp == stamp):
            continue
        if file.size == size:
            unsure.append((file, digest))
        else:
            found.append(file)
    total = sum(file.size for file, _ in unsure)
    with progress_bar(total=total, desc="compare inputs", unit="B", unit_scale=True) as bar:
        found += [file for file, digest in unsure if _digest(file, bar.update) != digest]
    return found


def _digest(file: Input, advance: Callable[[int], object]) -> str:
    hashed = hashlib.sha256()
    try:
        with raw_bytes(file) as content:
            while piece := content.read(PIECE_BYTES):
                hashed.update(piece)
                advance(len(piece))
    except OSError as error:
        raise DataError(f"{file.place}: cannot be read ({error})") from error
    return hashed.hexdigest()


def _other_content(changed: Sequence[Input]) -> list[str]:
    if not changed:
        return []
    return [f"{len(changed)} inputs have another content than when they were read, such as {changed[0].name} with "
            f"{changed[0].size} bytes now"]
