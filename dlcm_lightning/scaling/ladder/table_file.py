"""The table of a study as csv: columns in the order of first use, numbers to the last digit, empty cells for none."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically

LOCK = ".table.lock"


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """In the order of first use."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes of one study must not overwrite a newer table by an older one: who collects holds a lock. A file
    system that knows no locks gives none."""
    with (folder / LOCK).open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
