"""Documents: their text, identity and split."""

from __future__ import annotations

import hashlib

from dlcm_lightning.data.building.documents import clean, digest, documents_of, split_of


def test_the_split_depends_on_the_text_alone_and_takes_its_share() -> None:
    splits = [split_of(digest(f"text {number}")) for number in range(20_000)]
    assert 0.017 < splits.count("validation") / 20_000 < 0.023
    assert split_of(b"\x00" * 16) == "validation" and split_of(b"\xff" * 16) == "train"
    assert [split_of(bytes([5, 0x1E, 0xB8, last]) + bytes(12)) for last in (0x51, 0x52)] == ["validation", "train"]
    assert {split_of(bytes([first] * 16), 0.0) for first in range(256)} == {"train"}


def test_documents_are_clean_and_not_blank() -> None:
    texts = ["naïve 🙂", " \n", "", "half \ud83d a pair", "\u3000", "x"]
    found = list(documents_of(texts))
    assert [document.text for document in found] == ["naïve 🙂", clean("half \ud83d a pair"), "x"]
    for document in found:
        assert document.identity == digest(document.text) == hashlib.md5(document.text.encode()).digest()
        assert document.size == len(document.text.encode())
    assert clean("whole 🙂") == "whole 🙂" and "�" in found[1].text
