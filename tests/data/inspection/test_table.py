"""What is printed to a terminal: lines that line up, and nothing that drives it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlcm_lightning.data.inspection.table import escape_control_characters, folded, table, width


@pytest.mark.parametrize(("text", "shown"), [
    ("plain, é, 天地　玄黄, 🙂", "plain, é, 天地　玄黄, 🙂"),
    ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
    ("\x9b31m", "\\x9b31m"),
    ("a\u202eb\u2066c\u200d", "a\\u202eb\\u2066c\\u200d"),
    ("line\nother\r\u2028\x85\0", "line\\nother\\r\\u2028\\x85\\x00"),
    ("\udc80\U000e0041", "\\udc80\\U000e0041"),
])
def test_what_a_terminal_would_obey_is_spelled_out(text: str, shown: str) -> None:
    assert escape_control_characters(text) == shown


@given(st.text())
def test_nothing_but_printable_characters_is_left(text: str) -> None:
    shown = escape_control_characters(text)
    assert all(one.isprintable() or one in "\u3000\xa0\u1680\u202f\u205f" or "\u2000" <= one <= "\u200a"
               for one in shown)
    shown.encode()
    assert not set(shown) & {chr(code) for code in (*range(32), *range(127, 160))}


def test_columns_line_up_for_wide_characters_too_and_empty_ones_vanish() -> None:
    rows = [("", "tokens", "left out", "licence"), ("web", "1,000", "", "CC BY"), ("天地", "10", "", "宇宙"),
            ("e\u0301", "7", "", "")]
    assert list(table(rows, "<>><")) == ["      tokens  licence", "web    1,000  CC BY", "天地      10  宇宙",
                                         "e\u0301          7"]


@given(st.text(alphabet="ab 天地e\u0301"), st.integers(2, 9))
def test_folding_loses_nothing_and_fits(text: str, columns: int) -> None:
    lines = list(folded(text, columns))
    assert "".join(lines) == text and all(width(line) <= columns for line in lines)
    assert len(lines) <= 1 + 2 * width(text) / columns + text.count("\u0301")
