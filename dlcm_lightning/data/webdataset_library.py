"""The webdataset library, loaded where it is needed.

It imports torch if it finds it, for its datasets. Writing and reading tars needs none of that, and for a process that
tokenises it would be seconds of its start and hundreds of megabytes: there torch is hidden first.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any


def webdataset(module: str) -> Any:
    """A module of it: writer, gopen, tariterators, ..."""
    return importlib.import_module(f"webdataset.{module}")


def hide_torch() -> None:
    """For a process that will never need torch: its import fails from now on."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
