"""Where shards lie: a folder of this machine, or anything fsspec can reach (s3://, gs://, memory://, ...).

Both read any range of any file and answer with bytes or an OSError; nothing else of them is needed. Local files are
read in place by offset, out of the kernel's page cache, rather than through a mapping: it costs a microsecond more a
row, and a file that is cut short, replaced, or on a disk that fails is an error with a name instead of a SIGBUS that
kills the process.

Remote files are fetched in chunks of 4 MiB, kept in memory up to a bound, the least recently used let go. A chunk is
fetched once however many rows wait for it, and tried again a few times when the store fails. The order of samples is
known in advance, so `prefetch` asks for exactly the chunks that will be read: threads fetch them while the model
computes. Threads and connections are made anew in every process.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

CHUNK_BYTES = 4 * 1024**2
THREADS = 8
TRIES = 4
FIRST_PAUSE_SECONDS = 0.25
PATIENCE_SECONDS = 120.0
"""How long a read waits for a chunk before it is an error."""


class Store(Protocol):
    """A folder of files."""

    remote: bool

    def below(self, name: str) -> Store:
        """A folder in it."""

    def where(self, name: str = "") -> str:
        """Path or address of a file, for messages."""

    def exists(self, name: str = "") -> bool:
        """Whether a file, or with no name the folder, is there."""

    def size(self, name: str) -> int:
        """Bytes of a file. OSError."""

    def whole(self, name: str) -> bytes:
        """A small file. OSError."""

    def stream(self, name: str) -> BinaryIO:
        """A file to read from its beginning. OSError."""

    def open(self, name: str, size: int) -> Content:
        """A file of `size` bytes to read ranges of. OSError."""


class Content(Protocol):
    """An open file."""

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). OSError: not there, or fewer."""

    def read_into(self, target: np.ndarray, start: int) -> None:
        """The same into a contiguous array, as many bytes as it has."""

    def prefetch(self, start: int, stop: int) -> None:
        """Says that these bytes will be read soon; returns at once."""


class LocalStore:
    """A folder of a file system."""

    remote = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def below(self, name: str) -> LocalStore:
        return LocalStore(self.folder / name)

    def where(self, name: str = "") -> str:
        return str(self.folder / name)

    def exists(self, name: str = "") -> bool:
        return (self.folder / name).exists()

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def whole(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def stream(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    def open(self, name: str, size: int) -> LocalContent:
        return LocalContent(self.folder / name)


class LocalContent:
    """A file, read by offset."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, start: int, stop: int) -> bytes:
        found = os.pread(self._handle, stop - start, start)
        self._check(len(found), stop - start, start)
        return found

    def read_into(self, target: np.ndarray, start: int) -> None:
        self._check(os.preadv(self._handle, [target.data], start), target.nbytes, start)

    @staticmethod
    def _check(got: int, wanted: int, start: int) -> None:
        if got != wanted:
            raise OSError(f"the file ends at byte {start + got}, bytes up to {start + wanted} were asked for")

    def prefetch(self, start: int, stop: int) -> None:
        os.posix_fadvise(self._handle, start, stop - start, os.POSIX_FADV_WILLNEED)


class RemoteStore:
    """A folder below an fsspec address."""

    remote = True

    def __init__(self, address: str, chunks: Chunks) -> None:
        self.address, self.chunks = address.rstrip("/"), chunks

    def below(self, name: str) -> RemoteStore:
        return RemoteStore(f"{self.address}/{name}", self.chunks)

    def where(self, name: str = "") -> str:
        return f"{self.address}/{name}" if name else self.address

    def exists(self, name: str = "") -> bool:
        return bool(self._patiently(lambda system, path: system.exists(path), name))

    def size(self, name: str) -> int:
        return int(self._patiently(lambda system, path: system.size(path), name))

    def whole(self, name: str) -> bytes:
        content: bytes = self._patiently(lambda system, path: system.cat_file(path), name)
        return content

    def stream(self, name: str) -> BinaryIO:
        file: BinaryIO = self._patiently(lambda system, path: system.open(path, "rb"), name)
        return file

    def open(self, name: str, size: int) -> RemoteContent:
        return RemoteContent(self.where(name), size, self.chunks)

    def _patiently(self, ask: Callable[[Any, str], Any], name: str) -> Any:
        import fsspec

        return patiently(lambda: ask(*fsspec.url_to_fs(self.where(name))))


class RemoteContent:
    """A remote file, read through the chunks."""

    def __init__(self, address: str, size: int, chunks: Chunks) -> None:
        self.address, self.file_size, self.chunks = address, size, chunks

    def read(self, start: int, stop: int) -> bytes:
        if stop > self.file_size:
            raise OSError(f"the file has {self.file_size} bytes, bytes up to {stop} were asked for")
        first, last = start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        parts = [self.chunks.get(self.address, number, self.file_size) for number in range(first, last)]
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        return content[start - first * CHUNK_BYTES:stop - first * CHUNK_BYTES]

    def read_into(self, target: np.ndarray, start: int) -> None:
        target.view(np.uint8)[:] = np.frombuffer(self.read(start, start + target.nbytes), np.uint8)

    def prefetch(self, start: int, stop: int) -> None:
        for number in range(start // CHUNK_BYTES, -(-min(stop, self.file_size) // CHUNK_BYTES)):
            self.chunks.request(self.address, number, self.file_size)


class Chunks:
    """The chunks of remote files that a process holds, at most `limit` bytes of them, and those on their way."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "_process": -1}

    def request(self, address: str, number: int, size: int) -> Future[bytes]:
        """The chunk, perhaps still on its way."""
        self._begin()
        with self._lock:
            future = self._held.get((address, number))
            if future is None or (future.done() and future.exception() is not None):
                future = self._held[address, number] = Future()
                self._wanted.put((future, address, number * CHUNK_BYTES, min(size, (number + 1) * CHUNK_BYTES)))
                while len(self._held) > max(2, self.limit // CHUNK_BYTES):
                    self._held.popitem(last=False)
            self._held.move_to_end((address, number))
        return future

    def get(self, address: str, number: int, size: int) -> bytes:
        """The chunk. OSError: the store does not give it."""
        future = self.request(address, number, size)
        try:
            return future.result(PATIENCE_SECONDS)
        except TimeoutError as error:
            if future.done():
                raise
            raise OSError(f"no answer within {PATIENCE_SECONDS:g} s") from error

    def submit(self, task: Callable[[], object]) -> None:
        """Runs something on a fetching thread; what it raises is dropped."""
        self._begin()
        self._wanted.put(task)

    def _begin(self) -> None:
        """Threads, lock and cache of this process; a fork inherits none of them."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._wanted: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=_fetch, args=(self._wanted,), daemon=True, name="fetch").start()


def _fetch(wanted: queue.SimpleQueue[Any]) -> None:
    """One fetching thread: chunks into their futures, until the process ends."""
    while True:
        task = wanted.get()
        if callable(task):
            try:
                task()
            except Exception:  # the read that follows meets the same error and reports it
                continue
            continue
        future, address, start, stop = task
        try:
            future.set_result(patiently(partial(_range, address, start, stop)))
        except Exception as error:
            future.set_exception(error)


def _range(address: str, start: int, stop: int) -> bytes:
    import fsspec

    system, path = fsspec.url_to_fs(address)
    content: bytes = system.cat_file(path, start=start, end=stop)
    if len(content) != stop - start:
        raise OSError(f"bytes {start} to {stop} were asked for, {len(content)} came")
    return content


def patiently(ask: Callable[[], Any]) -> Any:
    """What `ask` answers, tried again after pauses. OSError whatever the store raised; a file that is not there, or
    not allowed, is not asked for again."""
    for attempt in range(TRIES):
        try:
            return ask()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            raise
        except Exception as error:  # stores raise errors of their own libraries
            if attempt == TRIES - 1:
                raise OSError(f"{type(error).__name__}: {error}") from error
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def store_at(place: str | Path, chunks: Chunks | None = None) -> Store:
    """The store of a path or an address; chunks: shared by all remote stores of a reader."""
    if "://" in str(place):
        return RemoteStore(str(place), chunks or Chunks(64 * CHUNK_BYTES))
    return LocalStore(place)
