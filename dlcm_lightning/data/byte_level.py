"""Which tokenizers keep every byte of a text, and the proof that one does.

Pretraining counts bits per byte, so the bytes of a document's tokens must be the document's: bytes in, bytes out. A
`tokenizer.json` of the tokenizers library can do many things to a text before it becomes ids: normalise it (NFKC makes
"x²" an "x2"), drop whitespace, put a space in front, leave out characters that its vocabulary lacks. What it declares
is read here, and then it has to spell a page of text from all scripts, byte for byte.

Control tokens (`added_tokens`: BOS, EOS, <think>, <|user|>) are spelled out when a text holds their names, whether they
are marked special or not: a web page that quotes "</s>" must not end a document. Added tokens that are only whitespace
are text like any other, and stay.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Container, Iterator
from typing import Any

import numpy as np

KEEPS_TEXT = ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength")
"""Pre-tokenizers that only cut, as long as they do not remove what they cut at."""
IN_NO_TEXT = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
"""Bytes that UTF-8 never writes."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: the byte itself where printable, else the next free code point."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


def bytes_of_signs(text: str) -> bytes:
    """The bytes that signs of the alphabet stand for. ValueError: other signs are among them."""
    table = np.full(2**9, -1, dtype=np.int16)
    for sign, byte in byte_alphabet().items():
        table[ord(sign)] = byte
    found = table[np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4"), 2**9 - 1)]
    if (found < 0).any():
        raise ValueError(f"{text[int(np.argmax(found < 0))]!r} is no sign of the byte-level alphabet")
    return found.astype(np.uint8).tobytes()


def why_lossy(definition: dict[str, Any]) -> str:
    """What in a tokenizer.json changes a text on its way to ids, and the remedy; empty where nothing does. KeyError,
    TypeError: it is no tokenizer.json."""
    model = definition["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "an unnamed model")
    if kind != "BPE":
        return f"its model is {kind}, and only byte-level BPE spells every text; train or choose a byte-level BPE"
    if model.get("dropout"):
        return f"model.dropout = {model['dropout']}: the same text gives other ids each time; set it to null"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            return f"model.{name} = {model[name]!r}: tokens are not the bytes that they stand for; choose another"
    if normalizers := [one["type"] for one in _parts(definition.get("normalizer"), "normalizers")]:
        return (f"its normalizer ({', '.join(normalizers)}) changes texts; set \"normalizer\" to null and train the "
                "merges on texts as they are, or choose another")
    cutters = list(_parts(definition.get("pre_tokenizer"), "pretokenizers"))
    for one in cutters:
        if one["type"] not in KEEPS_TEXT or one.get("behavior") == "Removed":
            return f"its pre-tokenizer {one['type']} removes or replaces characters; choose another tokenizer"
        if one["type"] == "ByteLevel" and one.get("add_prefix_space", True):
            return "add_prefix_space puts a space in front of every text; set it to false"
    if not any(one["type"] == "ByteLevel" for one in cutters):
        return "it has no ByteLevel pre-tokenizer, so it does not work on bytes; choose a byte-level BPE"
    if missing := missing_bytes(model["vocab"]):
        shown = ", ".join(f"0x{byte:02x}" for byte in missing[:5])
        return f"its vocabulary lacks {len(missing)} of the 256 bytes ({shown}), which would vanish; choose another"
    return ""


def missing_bytes(vocabulary: Container[str]) -> list[int]:
    """Bytes of UTF-8 texts that have no token of their own, ascending."""
    return sorted(byte for sign, byte in byte_alphabet().items()
                  if sign not in vocabulary and byte not in IN_NO_TEXT)


def _parts(node: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """The steps of what may be a sequence of sequences."""
    if node is None:
        return
    if node["type"] == "Sequence":
        for one in node[name]:
            yield from _parts(one, name)
    else:
        yield node


def is_control(token: dict[str, Any]) -> bool:
    """Whether an added token is a name that a text may quote, and no plain run of whitespace."""
    plain = not (token.get("lstrip") or token.get("rstrip") or token.get("single_word") or token.get("special"))
    return not (plain and token["content"].isspace())


def without_control_tokens(definition: dict[str, Any]) -> str:
    """The tokenizer.json by which texts are encoded."""
    added = definition.get("added_tokens") or []
    kept = [token for token in added if not is_control(token)]
    names = {token["content"] for token in added if is_control(token)}
    model = definition["model"]
    if model.get("ignore_merges"):  # which would find a name that is also in the vocabulary without any merge
        model = {**model, "vocab": {token: index for token, index in model["vocab"].items() if token not in names}}
    return json.dumps({**definition, "model": model, "added_tokens": kept, "post_processor": None}, ensure_ascii=False)


def proof_page() -> str:
    """A fixed text of all scripts, with what normalizers change, cutters drop and vocabularies lack."""
    every = "".join(map(chr, range(0x100)))
    scripts = "".join(chr(code) for code in range(0x100, 0x20000, 61) if not 0xD800 <= code < 0xE000)
    both = "é한글åﬁ²½①ﬀℌ™"
    forms = "".join(unicodedata.normalize(form, both) for form in ("NFC", "NFD"))
    odd = "\ufeff\u200d\u2028\u2029\u00a0\u3000\u0085\u200b\ufffd\ue000\U0010ffff"
    lines = (
        "x² 10⁹ ½ ﬁn Ⅷ ㍿", " leading, trailing and  double  spaces ", "\ttabs\t\n\r\n\r  \n\n", "It's O'Neil's, WE'LL",
        "1234567890 3.14 1e-9 ٣٤٥ १२३", "def f(x):\n    return x  # 注释", "你好，世界。これは日本語です。한국어 문장",
        "Привет, мир! Γειά σου κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดี",
        "👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 🤷🏽‍♂️", "ß ẞ ı İ ǅ Ω Å",
        "\\frac{1}{2} $x_1^2$ <b>&amp;</b> {\"a\": [1]}", "zA\u030a\u0327 e\u0301 \u1112\u1161\u11ab", "\0\x7f\x1b[0m",
    )
    return "\n".join([every, scripts, forms, odd, *lines])
