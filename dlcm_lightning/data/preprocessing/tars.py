"""The samples of a WebDataset tar, as the library groups them: members of one name, known by their endings.

The members themselves are taken out here, for the library ends in silence where a header is damaged or the file broke
off between two members. A tar that does not end with its end mark, or goes on after it (tars that were appended to
one another), is refused.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from dlcm_lightning.data.preprocessing.account import Account
from dlcm_lightning.data.webdataset_library import webdataset
from dlcm_lightning.errors import DataError

KEPT_BYTES = 64 * 1024
"""More than tarfile reads beyond what it has looked at."""
READ_BYTES = 1024**2


def samples(stream: BinaryIO, place: str, account: Account) -> Iterator[dict[str, Any]]:
    """Samples by the library's rule: `__key__`, and the bytes of every member by its ending in small letters.

    DataError: no tar, damaged, broken off, two members of a name.
    """
    library = webdataset("tariterators")
    try:
        yield from library.group_by_keys(_members(stream, place, account, library.base_plus_ext))
    except tarfile.TarError as error:
        raise DataError(f"{place}: damaged or no tar ({error}); fetch or write the file again") from error
    except ValueError as error:
        raise DataError(f"{place}: {error.args[0]}; give samples names of their own") from error


def _members(stream: BinaryIO, place: str, account: Account, split: Any) -> Iterator[dict[str, Any]]:
    passed = _Passed(stream)
    with tarfile.open(fileobj=passed, mode="r|") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # it keeps them all
            file = tar.extractfile(member) if member.isreg() else None
            if file is None:
                if not member.isdir():
                    account.other_member("(a link)", 0)
                continue
            if split(member.name)[0] is None:
                account.other_member("(no ending)", member.size)
                continue
            yield {"fname": member.name, "data": file.read(), "__url__": place}
        passed.check_end(tar.offset, place)


class _Passed(io.RawIOBase):
    """A stream, and the last of what was read of it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._last, self._count = stream, b"", 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._last = (self._last + found)[-KEPT_BYTES:]
        self._count += len(found)
        return found

    def check_end(self, at: int, place: str) -> None:
        """DataError: no end mark lies `at` this byte, or more than zeros after it."""
        mark = self._last[len(self._last) - (self._count - at):] if self._count > at else b""
        mark += self._stream.read(tarfile.BLOCKSIZE)
        if len(mark) < tarfile.BLOCKSIZE or mark[:tarfile.BLOCKSIZE].strip(b"\0"):
            raise DataError(f"{place}: the tar is damaged or broke off at byte {at:,}, where its end mark should be; "
                            "fetch or write the file again")
        while mark:
            if mark.strip(b"\0"):
                raise DataError(f"{place}: there is more after the end of the tar, at byte {at:,}; write tars that "
                                "were appended to one another as files of their own")
            mark = self._stream.read(READ_BYTES)
