"""What a document is: its text as valid UTF-8, the md5 by which it is known, and the split it goes to.

A document goes to the validation split where its md5 falls into the lowest 2 % of all md5 values: the split depends
on the text alone, so it stays the same when files are renamed, reordered or added, and copies of a text never stand
on both sides.

A long text is UTF-8 rather than a `str`, which takes up to four times as much, and can be let go of by whoever has
used it, though others still hold the object.
"""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.02
LONG_BYTES = 2**20
"""A text from here on is long."""
PIECE_BYTES = 2**18
PAIR = re.compile(rb"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
LONE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")


@dataclass
class LongText:
    """UTF-8, perhaps with surrogates in it."""

    content: bytes | bytearray

    def release(self) -> None:
        self.content = b""


Text = str | LongText


class Document(NamedTuple):
    """A text that is not blank."""

    text: Text
    identity: bytes
    """16 bytes: md5 of the text in UTF-8."""
    size: int
    """Bytes of the text in UTF-8."""
    replaced: int = 0
    """Characters that were lone surrogates."""


def clean(text: str) -> str:
    """The text as valid UTF-8: pairs of surrogates become their character, lone ones, which JSON can spell, U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def digest(text: str) -> bytes:
    """md5 of the text: its identity for duplicates, order and split."""
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def split_of(identity: bytes, share: float = VALIDATION_SHARE) -> str:
    """The split of a document by its md5."""
    return "validation" if int.from_bytes(identity[:4], "big") < share * 2**32 else "train"


def check_utf8(content: bytes | bytearray, errors: str = "strict") -> None:
    """UnicodeDecodeError: it is not UTF-8; `surrogatepass` allows surrogates."""
    for _ in _pieces(content, errors):
        pass


def document_of(text: Text) -> Document | None:
    """The document of a text, cleaned and hashed; None: it is blank."""
    if isinstance(text, str):
        return _short(text)
    text.content, replaced = _clean_bytes(text.content)
    if all(piece.isspace() or not piece for piece in _pieces(text.content, "strict")):
        return None
    return Document(text, hashlib.md5(text.content, usedforsecurity=False).digest(), len(text.content), replaced)


def documents_of(texts: Iterable[Text]) -> Iterator[Document]:
    """Documents of texts, blank ones left out."""
    return (document for text in texts if (document := document_of(text)) is not None)


def _short(text: str) -> Document | None:
    if not text or text.isspace():
        return None
    replaced = 0
    try:
        content = text.encode()
    except UnicodeEncodeError:
        cleaned = clean(text)
        replaced = cleaned.count("\ufffd") - text.count("\ufffd")
        text, content = cleaned, cleaned.encode()
    return Document(text, hashlib.md5(content, usedforsecurity=False).digest(), len(content), replaced)


def _clean_bytes(content: bytes | bytearray) -> tuple[bytes | bytearray, int]:
    """`clean` for bytes, and how many lone surrogates there were."""
    if not LONE.search(content):
        return content, 0

    def joined(pair: re.Match[bytes]) -> bytes:
        return clean(pair[0].decode("utf-8", "surrogatepass")).encode()

    return LONE.subn("\ufffd".encode(), PAIR.sub(joined, content))


def _pieces(content: bytes | bytearray, errors: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    for begin in range(0, len(content), PIECE_BYTES):
        yield decoder.decode(content[begin:begin + PIECE_BYTES])
    yield decoder.decode(b"", True)
