"""Words, sentences, lines and signs of a text, as places in its bytes.

A unit has a *last* byte, and something begins after it, the *next* unit. Both are what a boundary could fall on: the
token that closes a concept is pooled into it and seen from there on, so a model may end concepts with units (boundary
on the token that holds the last byte), or wait for the surprise that begins the next one (boundary on the token that
holds its first byte).

    words       runs of letters, digits and underscores; scripts without spaces (Han, Kana, Thai) have none
    sentences   end with . ! ? and closing quotes or brackets before white space, or with their full-width forms
    lines       end with a line feed, and begin after it
    signs       runs of punctuation and operators: ; next is the first byte after them that is no white space

Units that touch the end of a text that goes on elsewhere are left out: where they end is not known.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

KINDS = ("words", "sentences", "lines", "signs")
_NO_SPACES = "\u0e00-\u0eff\u2e80-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_MARKS = "".join(one for one in map(chr, range(0x10000)) if unicodedata.category(one)[0] == "M")
"""Accents and vowel signs, which Python's word characters leave out."""
_WORD = re.compile(rf"(?:[^\W{_NO_SPACES}][{_MARKS}]*)+")
_CLOSERS = "\"'\u2019\u201d)\\]\u300d\u300f\uff09\u300b"
_SENTENCE = re.compile(rf"(?:[.!?\u2026]+[{_CLOSERS}]*(?=\s|$)|[\u3002\uff01\uff1f\uff0e]+[{_CLOSERS}]*)")
_SIGNS = re.compile(r"[^\w\s]+")
_INK = re.compile(r"\S")


@dataclass(frozen=True)
class Units:
    """Of one kind in one text."""

    last: list[int]
    """The last byte of each unit."""
    next: list[int]
    """The first byte of what comes after each; fewer where nothing does."""


def decode(content: bytes) -> tuple[str, list[int]]:
    """The text, bytes that are no characters standing as one lone surrogate each; and where each character begins in
    the bytes, the end of the last one after them."""
    text = content.decode("utf-8", errors="surrogateescape")
    begins, at = [], 0
    for one in text:
        begins.append(at)
        code = ord(one)
        at += 1 if code < 0x80 or 0xDC80 <= code <= 0xDCFF else 2 if code < 0x800 else 3 if code < 0x10000 else 4
    return text, [*begins, at]


def units_of(content: bytes, ended: bool) -> dict[str, Units]:
    """By kind. ended: whether the text ends here, and does not go on in another row."""
    text, begins = decode(content)
    spans = {"words": [match.span() for match in _WORD.finditer(text)],
             "sentences": [match.span() for match in _SENTENCE.finditer(text)],
             "lines": [(place, place + 1) for place, one in enumerate(text) if one == "\n"],
             "signs": [match.span() for match in _SIGNS.finditer(text) if not _odd(match.group())]}
    found = {}
    for kind, places in spans.items():
        whole = [span for span in places if ended or kind == "lines" or span[1] < len(text)]
        last = [begins[end] - 1 for _, end in whole]
        if kind == "words":
            following = [begin for begin, _ in places[1:]]
        elif kind == "lines":
            following = [end for _, end in whole if end < len(text)]
        else:
            after = (_INK.search(text, end) for _, end in whole)
            following = [match.start() for match in after if match]
        found[kind] = Units(last, [begins[place] for place in following])
    return found


def _odd(run: str) -> bool:
    """Whether a run holds what is neither punctuation nor an operator: marks, controls, broken bytes."""
    return any(unicodedata.category(one)[0] not in "PS" for one in run)
