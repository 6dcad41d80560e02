"""Files that only one process holds at a time, on a disk that several machines may share.

flock: the kernel lets a lock go when its process ends, however it ends. NFS and Lustre (mounted with flock, their
default) pass it on to the other machines.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlcm_lightning.errors import DataError


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether the lock was had; without `wait` it may not be. DataError: the file system has no locks."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise DataError(f"{path}: cannot be locked ({error}); build on a file system with flock and copy the "
                            "source") from error
        yield True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits for the lock and holds it."""
    with locked(path, wait=True):
        yield
