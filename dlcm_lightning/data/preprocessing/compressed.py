"""Compressed files as streams whose damage is found at its place.

A decoder reads compressed bytes in chunks and gives back what they become. When a chunk is damaged, its libraries raise
an error and drop what they had decoded of it, megabytes before the damage perhaps; so the chunk is decoded once more in
small steps, everything before the damage is handed out first, and the error comes in its turn. Whoever counts lines
then knows the line.

A stream that ends too early is an error (a download that broke off), and so is a file of no bytes at all, which is no
gzip and no Zstandard file though the libraries let it pass.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, Protocol

import zstandard

CHUNK_BYTES, FIRST_BYTES = 64 * 1024, 1024
"""Compressed bytes decoded at once, at most and to begin with; what they become is held in memory."""
MANY_BYTES = 4 * 1024**2
"""Where a chunk becomes more, the next one is shorter: a gigabyte of blanks fits into some kilobytes."""
ZSTD_WINDOW = 2**31
"""Largest window of a frame: `zstd --long=31` writes it."""
DAMAGED = (EOFError, zlib.error, zstandard.ZstdError)
GZIP, ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
Reopen = Callable[[], AbstractContextManager[BinaryIO]]
"""The file once more from its beginning."""


class _Decoder(Protocol):
    """Of one member (gzip) or frame (Zstandard)."""

    eof: bool
    unused_data: bytes

    def decompress(self, content: bytes, /) -> bytes: ...


def decompressed(name: str, file: BinaryIO, reopen: Reopen | None, begins: bytes = b"") -> BinaryIO:
    """The content of a file whose name ends like a compressed one's, or which begins so; the file itself, if neither.

    reopen: needed to tell where it is damaged, should it be. begins: its first bytes, where it has no name.
    """
    lower = name.lower()
    if lower.endswith((".gz", ".tgz")) or begins.startswith(GZIP):
        return io.BufferedReader(_Decoded(file, reopen, lambda: zlib.decompressobj(31)), CHUNK_BYTES)
    if lower.endswith((".zst", ".zstd")) or begins.startswith(ZSTANDARD):
        library = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
        return io.BufferedReader(_Decoded(file, reopen, library.decompressobj), CHUNK_BYTES)
    return file


class _Decoded(io.RawIOBase):
    """Members or frames, one after another."""

    def __init__(self, file: BinaryIO, reopen: Reopen | None, decoder: Callable[[], Any], single_from: int = -1
                 ) -> None:
        """single_from: offset in the file from which it is decoded byte by byte; negative: nowhere."""
        self._file, self._reopen, self._make = file, reopen, decoder
        self._single_from, self._step = single_from, FIRST_BYTES
        self._decoder: _Decoder | None = None
        self._waiting = self._decoded = b""
        self._taken = self._read = self._given = 0
        self._error: BaseException | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while self._taken == len(self._decoded):
            if self._error is not None:
                raise self._error
            if not self._next():
                return 0
        count = min(len(target), len(self._decoded) - self._taken)
        target[:count] = self._decoded[self._taken:self._taken + count]
        self._taken += count
        return count

    def _next(self) -> bool:
        """Decodes some more; False at the end of the file."""
        content = self._waiting
        if not content:
            content = self._file.read(1 if 0 <= self._single_from <= self._read else self._step)
            self._read += len(content)
        if not content:
            if self._decoder is not None or self._read == 0:
                self._error = EOFError("the file ends inside its compressed data" if self._read else
                                       "the file is empty, as after a failed download")
                raise self._error
            return False
        if self._decoder is None and not content.strip(b"\0"):  # what fills up a tape after the last member
            self._waiting = b""
            return True
        decoder: _Decoder = self._decoder or self._make()
        self._decoder = decoder
        try:
            self._decoded, self._taken, self._waiting = decoder.decompress(content), 0, b""
        except DAMAGED as error:
            self._error = error
            self._decoded, self._taken = self._salvaged(), 0
        else:
            if decoder.eof:
                self._waiting, self._decoder = decoder.unused_data, None
            if len(self._decoded) > MANY_BYTES:
                self._step = max(1, self._step // 4)
            elif len(self._decoded) < MANY_BYTES // 8:
                self._step = min(CHUNK_BYTES, self._step * 2)
        self._given += len(self._decoded)
        return True

    def _salvaged(self) -> bytes:
        """What can be decoded of the chunk that is damaged: from the beginning of the file, and there byte by byte."""
        if self._reopen is None:
            return b""
        with self._reopen() as file:
            again = _Decoded(file, None, self._make, max(0, self._read - CHUNK_BYTES))
            skipped, found = 0, bytearray()
            buffer = bytearray(CHUNK_BYTES)
            try:
                while count := again.readinto(buffer):
                    found += buffer[max(0, min(count, self._given - skipped)):count]
                    skipped += count
            except DAMAGED:
                pass
            return bytes(found)
