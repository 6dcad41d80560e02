"""What a finished task says of itself: `tasks/TTTTTT.done`, written last, when its shards are whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import flush, write_atomically
from dlcm_lightning.data.preprocessing.account import Account
from dlcm_lightning.data.preprocessing.documents import SPLITS
from dlcm_lightning.errors import DataError

TASKS = "tasks"


@dataclass(frozen=True)
class Record:
    """Of a task."""

    shards: dict[str, int]
    """Their number by split."""
    names: tuple[str, ...]
    """Of its inputs."""
    digests: tuple[str, ...]
    """Their sha256."""
    account: Account


def record_path(working: Path, number: int) -> Path:
    return working / TASKS / f"{number:06d}.done"


def done_tasks(working: Path) -> set[int]:
    """The tasks that are done."""
    return {int(path.stem) for path in (working / TASKS).glob("*.done")}


def write_record(working: Path, number: int, record: Record) -> None:
    content = json.dumps(asdict(record), ensure_ascii=False) + "\n"
    write_atomically(record_path(working, number), content.encode("utf-8", "surrogateescape"))


def read_record(working: Path, number: int) -> Record:
    """DataError: missing, or not what `write_record` writes."""
    path = record_path(working, number)
    try:
        found: dict[str, Any] = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        return Record(found["shards"], tuple(found["names"]), tuple(found["digests"]), Account(**found["account"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not the record of a task ({error!r}); remove it, and run `dlcm tokenize` again"
                        ) from error


def forget_task(working: Path, number: int) -> None:
    """Removes a task's record and its shards, the record first. The caller holds the task's lock."""
    record_path(working, number).unlink(missing_ok=True)
    if (working / TASKS).is_dir():
        flush(working / TASKS)
    for split in SPLITS:
        for path in [*(working / split).glob(f"{number:06d}-*"), *(working / split).glob(f".{number:06d}-*")]:
            path.unlink()
    (working / TASKS / f"{number:06d}.lock").unlink(missing_ok=True)
