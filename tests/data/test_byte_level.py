"""Bytes in are bytes out: a tokenizer that changes texts is refused when it is loaded, or at the first text."""

from __future__ import annotations

import copy
import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlcm_lightning.data import text_encoder as module
from dlcm_lightning.data.byte_level import byte_alphabet, proof_page
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError

Change = Callable[[dict[str, Any]], object]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.fixture(scope="session")
def definition(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tokenizer.json of a good one."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return found


def changed(definition: dict[str, Any], change: Change) -> Tokenizer:
    found = copy.deepcopy(definition)
    change(found)
    return Tokenizer(json.dumps(found), "<s>", "</s>")


def without_byte(byte: int) -> Change:
    sign = next(sign for sign, value in byte_alphabet().items() if value == byte)

    def change(found: dict[str, Any]) -> None:
        index = found["model"]["vocab"].pop(sign)
        found["model"]["vocab"][f"{sign}{sign}"] = index
        found["model"]["merges"] = [merge for merge in found["model"]["merges"] if sign not in "".join(merge)]
    return change


def model(**settings: object) -> Change:
    return lambda found: found["model"].update(settings)


def put(**settings: object) -> Change:
    return lambda found: found.update(settings)


@pytest.mark.parametrize(("change", "message"), [
    (put(normalizer={"type": "NFC"}), "its normalizer (NFC) changes texts"),
    (put(normalizer={"type": "NFKC"}), "its normalizer (NFKC) changes texts"),
    (put(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFD"}]}), "(Lowercase, NFD)"),
    (put(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}), "(Strip)"),
    (put(normalizer={"type": "Prepend", "prepend": "▁"}), "(Prepend)"),
    (put(pre_tokenizer=None), "it has no ByteLevel pre-tokenizer"),
    (put(pre_tokenizer={"type": "Digits", "individual_digits": True}), "it has no ByteLevel pre-tokenizer"),
    (put(pre_tokenizer={"type": "Whitespace"}), "its pre-tokenizer Whitespace removes or replaces"),
    (put(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, BYTE_LEVEL]}),
     "its pre-tokenizer WhitespaceSplit removes"),
    (put(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}, BYTE_LEVEL]}),
     "Split removes"),
    (put(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "add_prefix_space puts a space"),
    (lambda found: found["model"]["vocab"].update({"ab漢": 9999}), "byte-level alphabet ('漢' is no sign"),
    (model(dropout=0.1), "model.dropout = 0.1"),
    (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    (model(continuing_subword_prefix="##"), "model.continuing_subword_prefix"),
    (without_byte(0x0D), "lacks 1 of the 256 bytes (0x0d)"),
    (without_byte(0xF4), "lacks 1 of the 256 bytes (0xf4)"),
    (put(model={"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2}, "unk_token": "<unk>"}),
     "is WordLevel"),
    (put(model={"type": "WordPiece", "vocab": {"<s>": 0, "</s>": 1, "[UNK]": 2}, "unk_token": "[UNK]",
                "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}), "is WordPiece"),
    (put(model={"type": "Unigram", "vocab": [["<s>", 0.0], ["</s>", 0.0]], "unk_id": 0}), "is Unigram"),
])
def test_a_tokenizer_that_changes_texts_is_refused(definition: dict[str, Any], change: Change, message: str) -> None:
    with pytest.raises(DataError) as caught:
        changed(definition, change)
    assert message in str(caught.value) and ("choose" in str(caught.value) or "set" in str(caught.value))


def test_bytes_that_are_in_no_text_may_be_missing(definition: dict[str, Any]) -> None:
    for byte in (0xC0, 0xC1, *range(0xF5, 0x100)):
        with pytest.raises(UnicodeDecodeError):
            bytes([byte]).decode()
    changed(definition, without_byte(0xC0))
    changed(definition, without_byte(0xFF))


def test_the_page_holds_what_such_tokenizers_change() -> None:
    page = proof_page()
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert unicodedata.normalize(form, page) != page  # type: ignore[arg-type]
    assert page.lower() != page and page.strip() + "x" != page and set(map(chr, range(256))) < set(page)
    scripts = {unicodedata.name(sign, "?").split()[0] for sign in page}
    assert {"LATIN", "CJK", "ARABIC", "CYRILLIC", "DEVANAGARI", "HANGUL", "HIRAGANA", "HEBREW", "THAI"} < scripts


SPELLED = ["before </s> after <s>", "<think>so</think>", "<｜User｜> <｜fim▁begin｜>", "</s></s>", "<s>", " <think> ",
           "[END]x"]


def controls(special: bool, **options: object) -> Change:
    def change(found: dict[str, Any]) -> None:
        for token in found["added_tokens"]:
            token["special"] = special
        first = max(found["model"]["vocab"].values()) + 1
        for number, name in enumerate(("<think>", "</think>", "<｜User｜>", "<｜fim▁begin｜>", "[END]")):
            found["added_tokens"].append({"id": first + number, "content": name, "single_word": False, "lstrip": False,
                                          "rstrip": False, "normalized": False, "special": special, **options})
    return change


@pytest.mark.parametrize("change", [
    controls(True), controls(False), controls(False, lstrip=True, rstrip=True), controls(False, normalized=True),
    controls(True, single_word=True)])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_the_names_of_control_tokens_are_spelled_out_whatever_their_flags(
        definition: dict[str, Any], change: Change, ignore_merges: bool) -> None:
    made = changed(definition, lambda found: (change(found), found["model"].update(ignore_merges=ignore_merges)))
    assert made.controls == {0, 1, *range(made.vocab_size - 5, made.vocab_size)}
    for text, ids in zip(SPELLED, made.encode_documents(SPELLED), strict=True):
        assert not made.controls.intersection(ids[1:-1].tolist()) and (ids[0], ids[-1]) == (0, 1)
        assert b"".join(made.pieces(ids)) == text.encode()


def test_a_run_of_spaces_may_be_an_added_token(definition: dict[str, Any]) -> None:
    def change(found: dict[str, Any]) -> None:
        first = max(found["model"]["vocab"].values()) + 1
        for number, run in enumerate(("    ", "\n\n\n")):
            found["added_tokens"].append({"id": first + number, "content": run, "single_word": False, "lstrip": False,
                                          "rstrip": False, "normalized": False, "special": False})
    made = changed(definition, change)
    text = "a\n\n\n\n        b    "
    ids, = made.encode_documents([text])
    assert {made.vocab_size - 2, made.vocab_size - 1} < set(ids.tolist()) and made.decode(ids) == text


def test_truncation_padding_and_a_template_of_a_tokenizer_json_change_nothing(definition: dict[str, Any]) -> None:
    made = changed(definition, put(
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<s>"}))
    assert made.decode(made.encode_documents(["one two three four five six"])[0]) == "one two three four five six"


def test_a_tokenizer_that_passes_and_still_changes_a_text_ends_the_build_at_that_text(
        definition: dict[str, Any], tmp_path: Path) -> None:
    """An added token has the id of a merged one, which only some texts hold."""
    token, index = max(((token, index) for token, index in definition["model"]["vocab"].items() if token.isalpha()
                        and token.isascii()), key=lambda item: len(item[0]))
    assert len(token) > 2

    def change(found: dict[str, Any]) -> None:
        found["added_tokens"].append({"id": index, "content": "\n" * 40, "single_word": False, "lstrip": False,
                                      "rstrip": False, "normalized": False, "special": False})
    made = changed(definition, change)
    with pytest.raises(DataError, match="the tokens of this document do not stand for the bytes of its text"):
        tokenize_documents(["good", token], made, tmp_path / "s", source="s", domain="d")
    assert not (tmp_path / "s").exists()


def long_texts() -> list[str]:
    chance = random.Random(0)
    words = ["the cat ", "天地玄黄", "x = 1\n", "    ", "naïve ", "🙂👩‍👩‍👧", "12345 ", "\n\n", "</s>"]
    return ["".join(chance.choices(words, k=9000)), "天" * 9000, "a" * 40_000, " " * 30_000 + "x" + "\n" * 30_000,
            "".join(chance.choices("abcdefgh0123456789", k=40_000)), proof_page() * 9]


@pytest.mark.parametrize("number", range(6))
def test_a_text_encoded_in_pieces_gives_the_same_ids(tokenizer: Tokenizer, number: int, monkeypatch: pytest.MonkeyPatch
                                                     ) -> None:
    text = long_texts()[number]
    whole, = tokenizer.encode_documents([text])
    for window, overlap, agree in ((4096, 512, 64), (5000, 1024, 100), (2**19, 2**16, 2**11)):
        for name, size in (("WINDOW_BYTES", window), ("OVERLAP_BYTES", overlap), ("AGREE_BYTES", agree)):
            monkeypatch.setattr(module, name, size)
        sizes: list[int] = []
        counts: list[int] = []

        def advance(size: int, count: int, sizes: list[int] = sizes, counts: list[int] = counts) -> None:
            sizes.append(size)
            counts.append(count)

        ids = tokenizer.encoder.encode_long(bytearray(text.encode()), advance)
        assert np.array_equal(ids, whole) and ids.dtype == np.uint16
        assert (sum(sizes), sum(counts)) == (len(text.encode()), len(ids) - 2)
        assert tokenizer.encoder.bytes_of([ids]).tolist() == [len(text.encode())]
    monkeypatch.setattr(module, "COUNTED_AT_ONCE", 100)
    assert tokenizer.encoder.bytes_of([ids, whole[:3]]).tolist() == [
        len(text.encode()), sum(map(len, tokenizer.pieces(whole[:3])))]
