"""The page: one file that fetches nothing, runs nothing foreign, and shows no number that is not in the JSON."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from dlcm_lightning.evaluation.analysis.formatting import visible
from dlcm_lightning.evaluation.analysis.page import page
from tests.evaluation.analysis.conftest import Analysed

HOSTILE = "</script><img src=x onerror=alert(1)><b>\u202e\x1b[2J\x00\u2066"
VOID = {"meta", "br"}
HARMLESS_ADDRESSES = {"http://www.w3.org/2000/svg"}


class Reader(HTMLParser):
    """Tags with their attributes, texts by the tag that they stand in, and whether tags match."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def test_nothing_is_fetched_and_only_its_own_script_may_run(report: Analysed) -> None:
    read = Reader(report.page)
    names = {tag for tag, _ in read.tags}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "audio", "video", "form"}
    for _, attributes in read.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert "src" not in attributes and (attributes.get("href") or "#").startswith("#")
    assert "url(" not in report.page and "@import" not in report.page
    assert set(re.findall(r"https?://[^\s\"'<]+", report.page)) <= HARMLESS_ADDRESSES
    (script,) = [text for tag, text in read.texts if tag == "script"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attributes["content"] for tag, attributes in read.tags
                 if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_it_is_made_from_the_json_alone(report: Analysed) -> None:
    assert page(report.found) == report.page
    other = copy.deepcopy(report.found)
    other["bits_per_byte"]["all"]["bits_per_byte"] = 7.654321
    assert "7.654" in page(other) and "7.654" not in report.page


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from numbers_in(one)
            if re.fullmatch(r"\d+", key):
                yield float(key)
    elif isinstance(value, list):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


NUMBER = re.compile(r"(?<![\w.])[+\N{MINUS SIGN}]?\d[\d,]*(?:\.\d+)?(?: [kMGT]\b| %)?")


def is_stated(shown: str, stated: set[str], numbers: list[float]) -> bool:
    """Whether a number on the page is one of the JSON, rounded as it is shown."""
    plain = shown.replace("\N{MINUS SIGN}", "-").replace("+", "").replace(",", "")
    if plain in stated:
        return True
    scale = {" %": 0.01, " k": 1e3, " M": 1e6, " G": 1e9, " T": 1e12}.get(plain[-2:], 1.0)
    digits = plain.removesuffix(" %").rstrip(" kMGT")
    half = scale * 0.5000001 * 10.0 ** -len(digits.partition(".")[2])
    if scale > 1:
        half = abs(float(digits)) * scale * 0.00501
    return any(abs(float(digits) * scale - one) <= half for one in numbers)


def test_every_number_on_it_stands_in_the_json(report: Analysed) -> None:
    found = copy.deepcopy(report.found)
    cells = found["documents"].pop("domains")  # some thousand numbers, any of which might fit by chance
    numbers = sorted(set(numbers_in(found)))
    numbers += [document["tokens"] for documents in cells.values() for document in documents]
    stated = {f"{one:g}" for one in numbers}
    stated |= {str(length) for length in range(1, found["concept_lengths"]["longest"] + 2)}  # places in the counts
    body = report.page[report.page.index("<body>"):]
    body = re.sub(r"<script>.*?</script>|<text[^>]*class=\"(?:tick|name)\".*?</text>|<div class=\"doc\".*?</div>"
                  r"|<p class=\"lead\">.*?</p>|<body>|</body></html>\n", " ", body, flags=re.S)
    texts = " ".join(text for _, text in Reader(body).texts)
    for one in (found["run"], found["against"]):
        texts = texts.replace(one["place"], "")
    for context in found["compute"]["contexts"]:
        texts = texts.replace(f"{context // 1024}k", "")
    checked = 0
    for match in NUMBER.finditer(texts):
        shown = match.group()
        # What the explanations count with, and what is no result: positions 0 to 2 and 16, Table 3 and 5, 95 %.
        if shown in {"0", "1", "2", "3", "5", "16", "10 %", "90 %", "95 %"}:
            continue
        checked += 1
        assert is_stated(shown, stated, numbers), texts[max(0, match.start() - 60):match.end() + 20]
    assert checked > 500


def test_tables_show_the_numbers_of_their_own_rows(report: Analysed) -> None:
    rows = [[html.unescape(re.sub(r"<.*?>", "", cell)) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
            for row in re.findall(r"<tr>(<td.*?)</tr>", report.page)]
    rows = [[cell.replace("\N{MINUS SIGN}", "-") for cell in row] for row in rows]
    for one in report.found["loss_by_position"]["positions"]:
        if one["error"] is not None:
            assert [f"{one['position']}{'+' * (one['position'] == 16)}", str(one["tokens"]), str(one["documents"]),
                    f"{one['loss']:.3f} ± {one['error']:.3f}", f"{one['other_loss']:.3f}",
                    f"{one['difference']:+.3f} ± {one['difference_error']:.3f}"] in rows
    for name, one in report.found["concept_lengths"]["domains"].items():
        assert any(row[:3] == [name, f"{one['concepts']:,}", f"{one['mean']:.2f}"] for row in rows)
    for one in report.found["content_types"]["types"].values():
        (row,) = [row for row in rows if row[0] == one["title"]]
        assert row[1] == f"{one['tokens_per_concept']:.2f}" and row[6:] == [f"{n:.2f}" for n in one["paper"].values()]
    for one in report.found["stability"]["checkpoints"]:
        assert any(row[:2] == [str(one["step"]), f"{100 * one['agreement']:.2f} %"] for row in rows)


def test_cells_of_the_texts_carry_their_numbers(report: Analysed) -> None:
    hints = re.findall(r'data-i="(.*?)"', report.page)
    cells = [cell for documents in report.found["documents"]["domains"].values() for document in documents
             for cell in document["cells"]]
    assert len(hints) == len(cells) > 50
    for hint, cell in zip(hints, cells, strict=True):
        for said, token in zip(hint.split("|"), cell["tokens"], strict=True):
            p, boundary, length, loss = said.split(";")
            assert float(p) == pytest.approx(token["p"], abs=6e-4) and (boundary == "b") == token["boundary"]
            assert (int(length) if length else None) == token["length"]
            assert loss == ("" if token["loss"] is None else f"{token['loss']:.2f}")


def poisoned(value: Any) -> Any:
    """Every text that a corpus or a run can choose, hostile."""
    if isinstance(value, dict):
        return {(HOSTILE if key in ("en", "zh") else key): poisoned(one) if key not in ("text", "name", "place", "form")
                else HOSTILE for key, one in value.items()}
    return [poisoned(one) for one in value] if isinstance(value, list) else value


def test_hostile_texts_and_names_are_shown_and_do_nothing(report: Analysed) -> None:
    found = poisoned(report.found)
    found["stability"]["skipped"] = [{"step": 1, "reason": HOSTILE}]
    made = page(json.loads(json.dumps(found)))
    read = Reader(made)
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in Reader(report.page).tags}
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    for _, attributes in read.tags:
        assert not {name for name in attributes if name.startswith("on") or name == "src"}
    assert not set(made) & {"\u202e", "\x1b", "\x00", "\u2066"}
    assert made.count("&lt;img src=x onerror=alert(1)&gt;") > 20
    assert r"\u202e\x1b[2J\x00\u2066" in made


def test_line_ends_joiners_and_letters_of_all_scripts_stay() -> None:
    assert visible("é\n\t天\u200dא &") == "é\n\t天\u200dא &amp;"
    assert visible("\r\u200b\u202d") == r"\r\u200b\u202d"
