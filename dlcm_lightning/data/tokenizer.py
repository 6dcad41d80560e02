"""Byte-level BPE tokenizers: DeepSeek-V3's, or a small one trained on the corpus itself.

A thin layer over the `tokenizers` library that adds what pretraining needs and nothing else: documents are framed
as BOS + text + EOS, and every id knows which bytes it stands for. Byte-level BPE writes each byte of the UTF-8 text
as one printable character (GPT-2's alphabet), so the characters of a vocabulary entry, mapped back, *are* its bytes;
their sum over a document is the document's length. That makes bits per byte exact, and comparable between
tokenizers. A tokenizer that changes texts is refused (byte_level.py): what it declares is read, and it has to spell a
page of all scripts.

Control tokens are never recognised inside text: a web page that spells "</s>" is spelled out, it cannot end a
document. Only the encoder (text_encoder.py) puts BOS and EOS.

A tokenizer on disk is `tokenizer.json` (the library's format, its sha256 is the fingerprint that shards carry) and
`tokenizer_config.json`, which names BOS and EOS the way Hugging Face does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.data.byte_level import (
    byte_alphabet,
    bytes_of_signs,
    is_control,
    proof_page,
    why_lossy,
    without_control_tokens,
)
from dlcm_lightning.data.store import Store, store_at
from dlcm_lightning.data.text_encoder import Encoder
from dlcm_lightning.errors import DataError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
DEEPSEEK_IDS = 128_815
KNOWN_FRAMES = (("<s>", "</s>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
"""BOS and EOS of tokenizers that come without `tokenizer_config.json`."""

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
         r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""Where merges stop: GPT-4's pattern with single digits, so that a number is always cut the same way."""



class Tokenizer:
    """Text to ids and back. Made by `load` or `train_bpe`; immutable."""

    def __init__(self, definition: str, begin: str, end: str) -> None:
        """definition: the text of tokenizer.json, kept as it is. begin, end: the BOS and EOS tokens, which it must
        hold. DataError: the library refuses it, it changes texts, or it lacks these tokens."""
        self.definition = definition
        try:
            found = json.loads(definition)
            reason = why_lossy(found)
            self._vocabulary: dict[str, int] = found["model"]["vocab"]
            self._added = {token["id"]: token for token in found.get("added_tokens") or []}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"tokenizer.json: not one of the tokenizers library ({error!r})") from error
        if reason:
            raise DataError(f"tokenizer.json: {reason}")
        ids = {token["content"]: index for index, token in self._added.items()}
        bos_id, eos_id = (ids.get(name, self._vocabulary.get(name)) for name in (begin, end))
        if bos_id is None or eos_id is None or bos_id == eos_id:
            raise DataError(f"tokenizer: begin {begin!r}, end {end!r} are not two tokens of its vocabulary; "
                            "name its own tokens as bos_token and eos_token in tokenizer_config.json")
        self.begin, self.end = begin, end
        self.bos_id, self.eos_id = bos_id, eos_id
        self.encoder = Encoder(without_control_tokens(found), bos_id, eos_id, self.token_bytes())
        try:
            self._prove(self.encoder.library)
        except DataError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"tokenizer.json: the tokenizers library refuses it ({error})") from error

    def _prove(self, library: tokenizers.Tokenizer) -> None:
        """DataError: it does not spell a text with its own bytes, or takes a name in a text for a control token."""
        names = [token["content"] for token in self._added.values() if is_control(token)] + [self.begin, self.end]
        for text in (proof_page(), "".join(names), " ".join(names), *names[:64]):
            ids = library.encode(text, add_special_tokens=False).ids
            if self.controls.intersection(ids) or b"".join(self.pieces(ids)) != text.encode():
                raise DataError("tokenizer.json: it does not spell every text with the bytes of that text (found on a "
                                f"text that begins with {text[:20]!r}); choose a byte-level BPE that does")

    @cached_property
    def controls(self) -> frozenset[int]:
        """Ids that no text holds."""
        return frozenset(index for index, token in self._added.items() if is_control(token)) | {
            self.bos_id, self.eos_id}

    @staticmethod
    def load(place: str | Path | Store) -> Tokenizer:
        """Reads `tokenizer.json` of a folder. DataError: missing, not a byte-level BPE, BOS and EOS unknown."""
        store = store_at(place) if isinstance(place, str | Path) else place
        where, settings = store.where(TOKENIZER), store.where(SETTINGS)
        try:
            definition = store.whole(TOKENIZER).decode()
            frame = _frame(store.whole(SETTINGS), settings) if store.exists(SETTINGS) else None
            if frame is None:
                found = json.loads(definition)
                names = {*found["model"]["vocab"], *(token["content"] for token in found.get("added_tokens") or [])}
                frame = next((frame for frame in KNOWN_FRAMES if names.issuperset(frame)), None)
        except FileNotFoundError:
            raise DataError(f"{where}: missing; a tokenizer is a folder with a tokenizer.json") from None
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not a tokenizer.json of the tokenizers library ({error!r})") from error
        if frame is None:
            raise DataError(f"{settings}: which tokens begin and end a document is not known; "
                            'write {"bos_token": "...", "eos_token": "..."} there')
        try:
            return Tokenizer(definition, *frame)
        except DataError as error:
            raise DataError(f"{store.where()}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer_config.json`, and `tokenizer.json` byte for byte as it was read; each whole or not at all,
        that one last."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"bos_token": self.begin, "eos_token": self.end, "tokenizer_class": "PreTrainedTokenizerFast"}
        write_atomically(Path(folder) / SETTINGS, (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode())
        write_atomically(Path(folder) / TOKENIZER, self.definition.encode())

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return len(self._pieces)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text: BOS, the text's ids, EOS."""
        return self.encoder.encode_documents(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens vanish, a character cut in the middle becomes U+FFFD."""
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes each id stands for; empty for special tokens."""
        return [self._pieces[int(index)] for index in ids]

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each id stands for, 0 for special tokens."""
        return np.fromiter(map(len, self._pieces), np.int64, len(self._pieces))

    @cached_property
    def _pieces(self) -> list[bytes]:
        pieces = [b""] * (max([*self._vocabulary.values(), *self._added]) + 1)
        plain = [token for token, index in self._vocabulary.items() if index not in self._added]
        try:
            content, begin = bytes_of_signs("".join(plain)), 0
        except ValueError as error:
            raise DataError(f"tokenizer: its vocabulary is not written in the byte-level alphabet ({error}); "
                            "choose a byte-level BPE") from error
        for token in plain:
            pieces[self._vocabulary[token]] = content[begin:begin + len(token)]
            begin += len(token)
        for index, token in self._added.items():
            pieces[index] = b"" if token.get("special") else token["content"].encode()
        pieces[self.bos_id] = pieces[self.eos_id] = b""
        return pieces


def _frame(content: bytes | bytearray, where: str) -> tuple[str, str] | None:
    """BOS and EOS of a Hugging Face tokenizer_config.json, written as text or as {"content": text}."""
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, no settings")
    except ValueError as error:
        raise DataError(f"{where}: not the JSON of a tokenizer_config.json ({error})") from error
    tokens = [found.get(name) for name in ("bos_token", "eos_token")]
    texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    begin, end = texts
    return (begin, end) if isinstance(begin, str) and isinstance(end, str) else None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with <s> = 0, </s> = 1 and all 256 bytes, trained on `texts`. The same texts, the same tokenizer.

    DataError where the texts are too few for so many ids or vocab_size is below 258.
    """
    if vocab_size < 258:
        raise DataError(f"vocab_size = {vocab_size}: a byte-level BPE needs at least 256 bytes + BOS + EOS = 258")
    library = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=sorted(byte_alphabet()))
    library.train_from_iterator(texts, trainer=trainer)
    if library.get_vocab_size() != vocab_size:
        raise DataError(f"vocab_size = {vocab_size}: the texts yield only {library.get_vocab_size()} tokens; "
                        "give more text or ask for fewer")
    return Tokenizer(library.to_str(), "<s>", "</s>")
