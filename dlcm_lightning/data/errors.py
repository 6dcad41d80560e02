"""The one error of the data side."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used. The message names the file or source, what was found and the remedy."""
