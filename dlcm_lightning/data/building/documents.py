"""What a document is: its text as valid UTF-8, the md5 by which it is known, and the split it goes to.

A document goes to the validation split where its md5 falls into the lowest 2 % of all md5 values: the split depends
on the text alone, so it stays the same when files are renamed, reordered or added, and copies of a text never stand
on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.02


class Document(NamedTuple):
    """A text that is not blank."""

    text: str
    identity: bytes
    """16 bytes: md5 of the text in UTF-8."""
    size: int
    """Bytes of the text in UTF-8."""


def clean(text: str) -> str:
    """The text as valid UTF-8: lone surrogates, which JSON can spell, become U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def digest(text: str) -> bytes:
    """md5 of the text: its identity for duplicates, order and split."""
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def split_of(identity: bytes, share: float = VALIDATION_SHARE) -> str:
    """The split of a document by its md5."""
    return "validation" if int.from_bytes(identity[:4], "big") < share * 2**32 else "train"


def documents_of(texts: Iterable[str]) -> Iterator[Document]:
    """Documents of texts, cleaned, blank ones left out. Each is encoded once."""
    for text in texts:
        if not text or text.isspace():
            continue
        try:
            content = text.encode()
        except UnicodeEncodeError:
            text = clean(text)
            content = text.encode()
        yield Document(text, hashlib.md5(content, usedforsecurity=False).digest(), len(content))
