"""A line of JSON: the text in it as the library finds it, and good lines that the library refuses."""

from __future__ import annotations

import json
import random

import pytest

from dlcm_lightning.data.preprocessing import json_line
from dlcm_lightning.data.preprocessing.documents import LONG_BYTES, LongText
from dlcm_lightning.data.preprocessing.json_line import _Walk, text_of

DEEP = 200_000
"""Python 3.11's library refuses to go as deep as 1,000, that of 3.13 goes deeper than 3,000."""
SIGNS = ["a", "b", '"', "\\", "\n", "\t", "é", "中", "😀", "\ud800", "\udc00", "\x01", "u", "n", " ", "/", "\\u", "\\n"]


def text(chance: random.Random, longest: int) -> str:
    return "".join(chance.choices(SIGNS, k=chance.randrange(longest)))


def value(chance: random.Random, depth: int = 0) -> object:
    kind = chance.randrange(8)
    if kind == 0 and depth < 4:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 1 and depth < 4:
        return {text(chance, 3): value(chance, depth + 1) for _ in range(chance.randrange(4))}
    return chance.choice([1, -2.5e10, 0, True, None, "x", text(chance, 7), 1e300])


def walked(line: bytes) -> bytes | None:
    found = _Walk(line, "text").result()
    return None if found is None else bytes(found)


@pytest.mark.parametrize("seed", range(10))
def test_a_walk_finds_what_the_library_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        monkeypatch.setattr(json_line, "PIECE_BYTES", chance.choice([1, 2, 3, 5, 7, 16, 64]))
        held = {text(chance, 3): value(chance) for _ in range(chance.randrange(4))}
        held["text"] = chance.choice([text(chance, 40), None])
        items = list(held.items())
        chance.shuffle(items)
        line = json.dumps(dict(items), ensure_ascii=chance.random() < 0.5, indent=chance.choice([None, 1])).encode(
            "utf-8", "surrogatepass")
        wanted = json.loads(line)["text"]
        assert walked(line) == (None if wanted is None else wanted.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("seed", range(10))
def test_a_walk_accepts_what_the_library_accepts_and_nothing_else(seed: int) -> None:
    chance, good = random.Random(seed), 0
    for _ in range(2000):
        line = json.dumps({"a": value(chance), "text": text(chance, 5), "b": [1, {"c": 2}]}).encode()
        at = chance.randrange(len(line))
        line = line[:at] + bytes([chance.choice(b'{}[],:"\\0123eE+-. truefalsn\n')]) + line[at + chance.randrange(2):]
        try:
            wanted: object = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, IndexError):
            wanted = 0
        try:
            found = walked(line)
        except (ValueError, KeyError):
            assert not (wanted is None or isinstance(wanted, str)), line
        else:
            assert found == (wanted.encode("utf-8", "surrogatepass") if isinstance(wanted, str) else wanted), line
            good += 1
    assert 200 < good < 1800


@pytest.mark.parametrize("other", ["9" * 5000, "-" + "9" * 5000, "[" * DEEP + "]" * DEEP,
                                   '{"a":' * DEEP + "1" + "}" * DEEP], ids=["digits", "minus", "lists", "objects"])
def test_a_text_is_found_beside_what_the_library_refuses(other: str) -> None:
    for line in (f'{{"m": {other}, "text": "good"}}', f'{{"text": "good", "m": [{other}]}}'):
        assert text_of(line.encode(), "text") == "good"
    for line in (f'{{"m": {other}, "text": "bad}}', f'{{"m": {other}, "text": 1}}', f'{{"m": {other}x, "text": ""}}'):
        with pytest.raises(ValueError, match=r"JSON|not closed|no text"):
            text_of(line.encode(), "text")


@pytest.mark.parametrize("repeated", ["x", "中\n", "😀\\\"", "\ud83d\ude00é"])
def test_a_long_text_is_utf8(repeated: str) -> None:
    content = repeated * LONG_BYTES
    for ascii_only in (True, False):
        line = json.dumps({"a": [1], "text": content}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        found = text_of(line, "text")
        assert isinstance(found, LongText)
        wanted = json.loads(line)["text"]
        assert found.content == wanted.encode("utf-8", "surrogatepass")
    assert text_of(json.dumps({"a": content, "text": "short"}).encode("utf-8", "surrogatepass"), "text") == "short"
