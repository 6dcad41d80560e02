"""A part of the report that a model cannot have, and why."""

from __future__ import annotations

from typing import Any

DENSE = "a dense model does not cut texts into concepts"


def absent(reason: str) -> dict[str, Any]:
    """Stands where the part would."""
    return {"absent": reason}
