"""Numbers and foreign texts as people read them on the page; an en dash where there is no number."""

from __future__ import annotations

import html
from typing import Any

from dlcm_lightning.data.inspection.table import escape_control_characters

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
JOINERS = "\u200c\u200d"
"""Of letters and signs; they change how neighbours look and nothing else."""


def fixed(value: Any, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", MINUS)


def signed(value: Any, digits: int = 3) -> str:
    """With its sign."""
    return NONE if value is None else f"{value:+,.{digits}f}".replace("-", MINUS)


def whole(value: Any) -> str:
    return NONE if value is None else f"{value:,d}"


def percent(value: Any, digits: int = 1) -> str:
    """A share of 1."""
    return NONE if value is None else f"{100 * value:.{digits}f} %".replace("-", MINUS)


def plus_minus(value: Any, error: Any, digits: int = 3, *, sign: bool = False) -> str:
    """A number and its standard error."""
    shown = signed(value, digits) if sign else fixed(value, digits)
    return shown if error is None or value is None else f"{shown} \N{PLUS-MINUS SIGN} {error:.{digits}f}"


def large(value: Any) -> str:
    """With three digits and a word."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def visible(text: str) -> str:
    """Foreign text as HTML: what would not print, or would turn the direction of writing, is spelled out."""
    return html.escape(escape_control_characters(text, keep="\n\t" + JOINERS))


def inline(text: str) -> str:
    """The same in one line, as for names."""
    return html.escape(escape_control_characters(text))
