"""What the page is made of: sections, figures with a sentence on how to read them, tables that scroll in their box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dlcm_lightning.evaluation.analysis.formatting import inline

MOST_ROWS = 8
"""Of a table that is open when the page is."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str
    """Its name in the JSON, and in addresses."""
    title: str
    lead: str
    """HTML: what it is, in a sentence or two."""
    body: str
    """HTML."""

    def render(self) -> str:
        return (f'<section id="{self.key}"><h2>{inline(self.title)}</h2><p class="lead">{self.lead}</p>'
                f"{self.body}</section>")


def figure(title: str, chart: str, reading: str, key: str = "") -> str:
    """title, reading: texts. chart, key: HTML."""
    return (f"<figure><h3>{inline(title)}</h3>{key}{chart}"
            f"<figcaption>{inline(reading)}</figcaption></figure>")


def grid(*figures: str) -> str:
    """Beside each other where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], reading: str = "", *, words: int = 1,
          title: str = "All numbers") -> str:
    """Cells are HTML already. words: how many of the first columns hold words; the others hold numbers. One of many
    rows is folded, under its title."""
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f'<{tag} class="{"w" if number < words else "n"}">{cell}</{tag}>'
                       for number, cell in enumerate(row))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    note = f"<figcaption>{inline(reading)}</figcaption>" if reading else ""
    found = (f'<figure class="wide"><div class="scroll" tabindex="0"><table><thead><tr>{cells("th", header)}</tr>'
             f"</thead><tbody>{body}</tbody></table></div>{note}</figure>")
    if len(rows) <= MOST_ROWS:
        return found
    return f"<details><summary>{inline(title)}</summary>{found}</details>"


def missing(reason: str) -> str:
    """In place of a part that there is not."""
    return f'<p class="missing">{inline(reason)}</p>'
