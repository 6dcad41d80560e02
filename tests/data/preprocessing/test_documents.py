"""Documents: their text, identity and split."""

from __future__ import annotations

import hashlib
import json

import pytest

from dlcm_lightning.data.preprocessing.documents import LongText, clean, digest, documents_of, split_of
from dlcm_lightning.data.preprocessing.json_line import text_of


def test_the_split_depends_on_the_text_alone_and_takes_its_share() -> None:
    splits = [split_of(digest(f"text {number}")) for number in range(20_000)]
    assert 0.017 < splits.count("validation") / 20_000 < 0.023
    assert split_of(b"\x00" * 16) == "validation" and split_of(b"\xff" * 16) == "train"
    assert [split_of(bytes([5, 0x1E, 0xB8, last]) + bytes(12)) for last in (0x51, 0x52)] == ["validation", "train"]
    assert {split_of(bytes([first] * 16), 0.0) for first in range(256)} == {"train"}


def test_documents_are_clean_and_not_blank() -> None:
    texts = ["naïve 🙂", " \n", "", "half \ud83d a pair", "\u3000", "x"]
    found = list(documents_of(texts))
    assert [document.text for document in found] == ["naïve 🙂", "half \ufffd a pair", "x"]
    for document in found:
        assert isinstance(document.text, str)
        assert document.identity == digest(document.text) == hashlib.md5(document.text.encode()).digest()
        assert document.size == len(document.text.encode())
    assert [document.replaced for document in found] == [0, 1, 0]


@pytest.mark.parametrize(("text", "wanted", "replaced"), [
    ("a\ud800b", "a\ufffdb", 1), ("\ud83d\ude00", "😀", 0), ("\ude00\ud83d", "\ufffd\ufffd", 2),
    ("\ud83d\ud83d\ude00\ude00", "\ufffd😀\ufffd", 2), ("\ufffd\ud800", "\ufffd\ufffd", 1), ("plain 🙂", "plain 🙂", 0),
    ("\udbff\udfff", "\U0010ffff", 0), ("é\udfff中", "é\ufffd中", 1)])
def test_a_lone_surrogate_is_one_character_and_a_pair_is_its_own(text: str, wanted: str, replaced: int) -> None:
    """Each surrogate as JSON escapes it, or as three bytes (CESU-8), in short texts and in long ones."""
    assert clean(text) == wanted
    for line in (json.dumps({"text": text}).encode(), b'{"text": "%s"}' % text.encode("utf-8", "surrogatepass")):
        found = text_of(line, "text")
        assert isinstance(found, str)
        document, = documents_of([found])
        assert (document.text, document.replaced) == (wanted, replaced)
    document, = documents_of([LongText(text.encode("utf-8", "surrogatepass"))])
    assert isinstance(document.text, LongText)
    assert (bytes(document.text.content).decode(), document.replaced) == (wanted, replaced)
    assert document.identity == digest(wanted) and document.size == len(wanted.encode())


def test_a_long_blank_text_is_no_document() -> None:
    blank = " \n\u3000\t" * 2**18
    assert not list(documents_of([LongText(blank.encode())]))
    assert len(list(documents_of([LongText(f"{blank}x".encode())]))) == 1
