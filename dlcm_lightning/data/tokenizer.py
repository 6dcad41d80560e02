"""Byte-level BPE tokenizers: DeepSeek-V3's, or a small one trained on the corpus itself.

A thin layer over the `tokenizers` library that adds what pretraining needs and nothing else: documents are framed
as BOS + text + EOS, and every id knows which bytes it stands for. Byte-level BPE writes each byte of the UTF-8 text
as one printable character (GPT-2's alphabet), so the characters of a vocabulary entry, mapped back, *are* its bytes;
their sum over a document is the document's length. That makes bits per byte exact, and comparable between
tokenizers.

Special tokens are never recognised inside text: a web page that spells "</s>" is spelled out, it cannot end a
document. Only `encode_documents` puts BOS and EOS.

A tokenizer on disk is `tokenizer.json` (the library's format, its sha256 is the fingerprint that shards carry) and
`tokenizer_config.json`, which names BOS and EOS the way Hugging Face does.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dlcm_lightning.data.store import Store, store_at
from dlcm_lightning.durable import write_atomically
from dlcm_lightning.errors import DataError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
DEEPSEEK_IDS = 128_815
KNOWN_FRAMES = (("<s>", "</s>"), ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
"""BOS and EOS of tokenizers that come without `tokenizer_config.json`."""

WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
         r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
"""Where merges stop: GPT-4's pattern with single digits, so that a number is always cut the same way."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: the byte itself where printable, else the next free code point."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


class Tokenizer:
    """Text to ids and back. Made by `load` or `train_bpe`; immutable."""

    def __init__(self, definition: str, begin: str, end: str) -> None:
        """definition: the text of tokenizer.json. begin, end: the BOS and EOS tokens, which it must hold."""
        self._definition = definition
        try:
            self._library = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"tokenizer.json: the tokenizers library refuses it ({error})") from error
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        bos_id, eos_id = self._library.token_to_id(begin), self._library.token_to_id(end)
        if bos_id is None or eos_id is None:
            raise DataError(f"tokenizer: begin {begin!r}, end {end!r} are not both in its vocabulary; "
                            "name its own tokens as bos_token and eos_token in tokenizer_config.json")
        self.begin, self.end = begin, end
        self.bos_id, self.eos_id = bos_id, eos_id

    @staticmethod
    def load(place: str | Path | Store) -> Tokenizer:
        """Reads `tokenizer.json` of a folder. DataError: missing, not a byte-level BPE, BOS and EOS unknown."""
        store = store_at(place) if isinstance(place, str | Path) else place
        where, settings = store.where(TOKENIZER), store.where(SETTINGS)
        try:
            definition = store.whole(TOKENIZER).decode()
            found = json.loads(definition)
            vocabulary = {*found["model"]["vocab"], *(token["content"] for token in found.get("added_tokens", []))}
            frame = next((frame for frame in KNOWN_FRAMES if vocabulary.issuperset(frame)), None)
            if store.exists(SETTINGS):
                frame = _frame(store.whole(SETTINGS), settings) or frame
        except FileNotFoundError:
            raise DataError(f"{where}: missing; a tokenizer is a folder with a tokenizer.json") from None
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({error})") from error
        except DataError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not a tokenizer.json of the tokenizers library ({error})") from error
        if frame is None:
            raise DataError(f"{settings}: which tokens begin and end a document is not known; "
                            'write {"bos_token": "...", "eos_token": "..."} there')
        return Tokenizer(definition, *frame)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer_config.json`, and `tokenizer.json` byte for byte as it was read; each whole or not at all,
        that one last."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        settings = {"bos_token": self.begin, "eos_token": self.end, "tokenizer_class": "PreTrainedTokenizerFast"}
        write_atomically(Path(folder) / SETTINGS, (json.dumps(settings, ensure_ascii=False, indent=2) + "\n").encode())
        write_atomically(Path(folder) / TOKENIZER, self._definition.encode())

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to vocab_size - 1."""
        return len(self._pieces)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json."""
        return hashlib.sha256(self._definition.encode()).hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text: BOS, the text's ids, EOS. Uses the library's threads."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        framed = (array("I", [self.bos_id, *item.ids, self.eos_id]) for item in encoded)  # sooner than np.array
        return [np.frombuffer(ids, dtype=np.uintc) for ids in framed]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens vanish, a character cut in the middle becomes U+FFFD."""
        return b"".join(self.pieces(ids)).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes each id stands for; empty for special tokens."""
        return [self._pieces[int(index)] for index in ids]

    def token_bytes(self) -> np.ndarray:
        """(V,) int64: UTF-8 bytes each id stands for, 0 for special tokens."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    @cached_property
    def _pieces(self) -> list[bytes]:
        alphabet = _byte_alphabet()
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        added = self._library.get_added_tokens_decoder()
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index in added:
                pieces[index] = b"" if added[index].special else token.encode()
                continue
            try:
                pieces[index] = bytes(alphabet[character] for character in token)
            except KeyError:
                raise DataError(f"tokenizer: token {token!r} is not written in the byte-level alphabet; "
                                "only byte-level BPE tokenizers can be used") from None
        return pieces


def _frame(content: bytes, where: str) -> tuple[str, str] | None:
    """BOS and EOS of a Hugging Face tokenizer_config.json, written as text or as {"content": text}."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
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
                                  initial_alphabet=sorted(_byte_alphabet()))
    library.train_from_iterator(texts, trainer=trainer)
    if library.get_vocab_size() != vocab_size:
        raise DataError(f"vocab_size = {vocab_size}: the texts yield only {library.get_vocab_size()} tokens; "
                        "give more text or ask for fewer")
    return Tokenizer(library.to_str(), "<s>", "</s>")
