"""The tokenizer of a source, made to spell every text.

Tokenizers of the hub may lack bytes that hardly any text holds: that of SmolLM2 has no token for 21 of the 256. 13 of
these are in no UTF-8 text; the other eight (0x04, or the 0xf1 that begins rare signs) would vanish from a document, and
bits per byte would count what was never predicted. Such a byte takes the id of a control token (<gh_stars>), which no
text holds: control tokens are spelled out here wherever a text quotes them. Every text without such bytes keeps its
ids, and no row is added to the embedding. BOS, EOS and the other tokens that the model's settings name are left alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlcm_lightning.data.byte_level import byte_alphabet, is_control, missing_bytes
from dlcm_lightning.data.tokenizer import SETTINGS, TOKENIZER, Tokenizer
from dlcm_lightning.errors import DataError


@dataclass(frozen=True)
class Spelling:
    """A tokenizer, or none."""

    tokenizer: Tokenizer | None
    said: str
    """Why there is none, or what was changed in it; empty where nothing was."""


def spelling_of(folder: Path) -> Spelling:
    """Of a folder with tokenizer.json."""
    if not (folder / TOKENIZER).is_file():
        return Spelling(None, f"{folder} holds no {TOKENIZER}")
    try:
        return Spelling(Tokenizer.load(folder), "")
    except DataError as error:
        return _repaired(folder, str(error))


def _repaired(folder: Path, why: str) -> Spelling:
    """With ids for missing bytes, where that is what is wrong with it."""
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
        definition, said = completed(json.loads((folder / TOKENIZER).read_bytes()), _named(settings))
        with tempfile.TemporaryDirectory() as name:
            shutil.copyfile(folder / SETTINGS, Path(name) / SETTINGS)
            (Path(name) / TOKENIZER).write_text(definition, encoding="utf-8")
            return Spelling(Tokenizer.load(name), said) if said else Spelling(None, why)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # DataError is a ValueError
        return Spelling(None, why)


def _named(settings: dict[str, Any]) -> set[str]:
    """Tokens that a tokenizer_config.json names: bos_token and the like."""
    values = [value for key, value in settings.items() if key.endswith("_token")]
    return {value["content"] if isinstance(value, dict) else value for value in values if value}


def completed(definition: dict[str, Any], kept: Collection[str]) -> tuple[str, str]:
    """The text of a tokenizer.json that has a token for every byte of every text, and what was changed. kept: control
    tokens whose ids are not to be taken. Nothing is changed where nothing lacks, or too few ids can be had."""
    vocabulary: dict[str, int] = dict(definition["model"]["vocab"])
    signs = {byte: sign for sign, byte in byte_alphabet().items()}
    missing = missing_bytes(vocabulary)
    free = [token for token in definition.get("added_tokens") or []
            if token.get("special") and is_control(token) and token["content"] not in kept]
    if not missing or len(free) < len(missing):
        return json.dumps(definition, ensure_ascii=False), ""
    taken = free[-len(missing):]
    for byte, token in zip(missing, taken, strict=True):
        vocabulary.pop(token["content"], None)
        vocabulary[signs[byte]] = token["id"]
    added = [token for token in definition["added_tokens"] if token not in taken]
    changed = {**definition, "added_tokens": added, "model": {**definition["model"], "vocab": vocabulary}}
    shown = ", ".join(f"0x{byte:02x}" for byte in missing)
    names = ", ".join(token["content"] for token in taken)
    return json.dumps(changed, ensure_ascii=False), (
        f"bytes that its vocabulary lacks ({shown}) take the ids of control tokens that no text holds ({names})")
