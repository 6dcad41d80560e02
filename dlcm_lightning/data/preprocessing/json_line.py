"""The text in one line of JSON, whatever else the line holds.

`json.loads` is fast and refuses some good JSON: whole numbers of more than 4,300 digits, structures nested more than
some thousand levels deep. A line that it refuses, and a line of many megabytes, is walked through here without
recursion: every value is checked and passed over but the one that is wanted. That one is unescaped in pieces, so that a
long document needs little more memory than its own bytes.
"""

from __future__ import annotations

import codecs
import json
import re

from dlcm_lightning.data.preprocessing.documents import LONG_BYTES, LongText, Text, check_utf8

PIECE_BYTES = 2**18
SPACE = re.compile(rb"[ \t\r\n]*")
SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity")
INSIDE = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})){0,4096}+')
"""Some of the inside of a string."""
HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
MISSING = object()


def text_of(line: bytes | bytearray, field: str) -> Text | None:
    """The value of a field of the object in a line; None where it is null.

    ValueError: no JSON object, or the field holds something else. KeyError: there is no such field.
    """
    if len(line) >= LONG_BYTES:
        return _walked(line, field)
    try:
        found = json.loads(line)
    except RecursionError:
        return _walked(line, field)
    except ValueError as error:
        if "Exceeds the limit" not in str(error):
            raise
        return _walked(line, field)
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__} and no object")
    text = found[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"field {field!r} holds a {type(text).__name__} and no text")
    return text


def _walked(line: bytes | bytearray, field: str) -> Text | None:
    found = _Walk(line, field).result()
    if found is None:
        return None
    return LongText(found) if len(found) >= LONG_BYTES else found.decode("utf-8", "surrogatepass")


class _Walk:
    """Through one line."""

    def __init__(self, line: bytes | bytearray, field: str) -> None:
        self.line, self.at = line, 0
        self.field = field
        self.found: object = MISSING

    def result(self) -> bytes | bytearray | None:
        check_utf8(self.line, "surrogatepass")
        self.at = 3 if self.line.startswith(codecs.BOM_UTF8) else 0
        self._space()
        if self.line[self.at:self.at + 1] != b"{":
            raise ValueError("holds no object")
        self._object()
        self._space()
        if self.at != len(self.line):
            raise ValueError(f"has something after the object, at byte {self.at}")
        if self.found is MISSING:
            raise KeyError(self.field)
        if self.found is not None and not isinstance(self.found, bytes | bytearray):
            raise ValueError(f"field {self.field!r} holds no text")
        return self.found

    def _object(self) -> None:
        """The outermost one; its values that are not wanted are passed over. Of two fields of a name the last holds."""
        self.at += 1
        self._space()
        if self._accept(b"}"):
            return
        while True:
            begin, end = self._string()
            name = _unescaped(self.line, begin, end)
            self._space()
            self._expect(b":")
            self._space()
            if name != self.field.encode("utf-8", "surrogatepass"):
                self._pass_over()
            elif self.line[self.at:self.at + 1] == b'"':
                self.found = _unescaped(self.line, *self._string())
            else:
                begin = self.at
                self._pass_over()
                self.found = None if self.line[begin:self.at] == b"null" else False
            self._space()
            if self._accept(b"}"):
                return
            self._expect(b",")
            self._space()

    def _pass_over(self) -> None:
        """One value, nested as deep as it may be."""
        open_ones = bytearray()  # the brackets that are to be closed
        while True:
            self._space()
            sign = self.line[self.at:self.at + 1]
            if sign in (b"{", b"["):
                self.at += 1
                self._space()
                closing = b"}" if sign == b"{" else b"]"
                if not self._accept(closing):
                    open_ones += closing
                    if sign == b"{":
                        self._name()
                    continue
            elif sign == b'"':
                self._string()
            else:
                scalar = SCALAR.match(self.line, self.at)
                if scalar is None:
                    raise ValueError(f"is no JSON at byte {self.at}")
                self.at = scalar.end()
            while True:  # what closes with this value
                if not open_ones:
                    return
                self._space()
                if self._accept(b","):
                    if open_ones[-1:] == b"}":
                        self._space()
                        self._name()
                    break
                self._expect(bytes(open_ones[-1:]))
                del open_ones[-1]

    def _name(self) -> None:
        self._string()
        self._space()
        self._expect(b":")

    def _string(self) -> tuple[int, int]:
        """Where the inside of a string begins and ends; it is passed."""
        self._expect(b'"')
        begin = self.at
        while (piece := INSIDE.match(self.line, self.at)) and piece.end() > self.at:
            self.at = piece.end()
        if not self._accept(b'"'):
            raise ValueError(f"has a string that begins at byte {begin} and is not closed, or holds a control "
                             f"character or an unknown escape at byte {self.at}")
        return begin, self.at - 1

    def _space(self) -> None:
        space = SPACE.match(self.line, self.at)
        assert space is not None
        self.at = space.end()

    def _accept(self, sign: bytes) -> bool:
        if self.line[self.at:self.at + 1] == sign:
            self.at += 1
            return True
        return False

    def _expect(self, sign: bytes) -> None:
        if not self._accept(sign):
            raise ValueError(f"is no JSON at byte {self.at}: {sign.decode()} was expected")


def _unescaped(line: bytes | bytearray, begin: int, end: int) -> bytes | bytearray:
    """The inside of a string as UTF-8. Lone surrogates stay what they are, for whoever cleans texts."""
    if line.find(b"\\", begin, end) < 0:
        return line[begin:end]
    found = bytearray()
    while begin < end:
        cut = _piece_end(line, begin, end)
        text = json.loads(b'"' + line[begin:cut] + b'"')
        found += text.encode("utf-8", "surrogatepass")
        begin = cut
    return found


def _piece_end(line: bytes | bytearray, begin: int, end: int) -> int:
    """The end of a piece: in no character, in no escape, and between no two escapes that make one character."""
    cut = begin + PIECE_BYTES
    while cut < end and line[cut] & 0xC0 == 0x80:
        cut += 1
    if cut >= end:
        return end
    slash = line.rfind(b"\\", max(begin, cut - 5), cut)
    if slash >= 0 and _starts_escape(line, begin, slash):
        cut = max(cut, slash + (6 if line[slash + 1:slash + 2] == b"u" else 2))
    while cut - 6 >= begin and HIGH_SURROGATE.match(line, cut - 6) and _starts_escape(line, begin, cut - 6) and (
            line[cut:cut + 2] == b"\\u"):
        cut += 6
    return min(cut, end)


def _starts_escape(line: bytes | bytearray, begin: int, slash: int) -> bool:
    """Whether a backslash is none that another one escapes."""
    first = slash
    while first > begin and line[first - 1] == 0x5C:
        first -= 1
    return (slash - first) % 2 == 0
