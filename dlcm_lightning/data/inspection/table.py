"""Plain text for a terminal: columns that line up, and foreign text that cannot drive the terminal.

Whatever comes out of a corpus (documents, licences, names of files) may hold escape sequences, characters that reverse
the direction of writing, or line ends that imitate other output. `escape_control_characters` spells out every character
that is not printed as itself. Chinese and other wide characters take two columns.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence


def escape_control_characters(text: str, keep: str = "") -> str:
    """The text with every character spelled out (`\\x1b`, `\\u202e`) that a terminal would not simply print, but for
    those to keep."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep or unicodedata.category(one) == "Zs"
                   else one.encode("unicode_escape").decode() for one in text)


def width(text: str) -> int:
    """Columns of a terminal that printable text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1
               for one in text)


def folded(text: str, columns: int) -> Iterator[str]:
    """Printable text in lines of at most so many columns, 2 or more; an empty text is one empty line."""
    begin, taken = 0, 0
    for place, one in enumerate(text):
        if taken + width(one) > columns:
            yield text[begin:place]
            begin, taken = place, 0
        taken += width(one)
    yield text[begin:]


def table(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """One line a row; sides: `<` or `>` for every column. Columns that are empty but for the first row vanish."""
    kept = [column for column in range(len(sides)) if column == 0 or any(row[column] for row in rows[1:])]
    widths = {column: max(width(row[column]) for row in rows) for column in kept}
    for row in rows:
        cells = []
        for column in kept:
            gap = " " * (widths[column] - width(row[column]))
            cells.append(row[column] + gap if sides[column] == "<" else gap + row[column])
        yield "  ".join(cells).rstrip()


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
