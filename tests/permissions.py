"""Permissions as any user meets them: root, as which tests may run, is asked for none."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_OVERRIDE, _READ_SEARCH = 1, 2  # capabilities(7)
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def of_any_user() -> Iterator[None]:
    """Meanwhile the modes of files count for this thread, whoever runs it. Linux."""
    if os.geteuid():
        yield
        return
    library = ctypes.CDLL(None, use_errno=True)
    header, held = _Header(_VERSION_3, 0), (_Set * 2)()
    assert not library.capget(ctypes.byref(header), held), os.strerror(ctypes.get_errno())
    before = held[0].effective
    held[0].effective = before & ~(1 << _OVERRIDE | 1 << _READ_SEARCH)
    assert not library.capset(ctypes.byref(header), held), os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        held[0].effective = before
        assert not library.capset(ctypes.byref(header), held), os.strerror(ctypes.get_errno())
