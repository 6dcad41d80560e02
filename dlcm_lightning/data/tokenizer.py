"""Byte-level BPE tokenizers: DeepSeek-V3's, or a small one trained on the corpus itself.

A thin layer over the `tokenizers` library that adds what pretraining needs and nothing else: documents are framed
as BOS + text + EOS, and every id knows which bytes it stands for. Byte-level BPE writes each byte of the UTF-8 text
as one printable character (GPT-2's alphabet), so the characters of a vocabulary entry, mapped back, *are* its bytes;
their sum over a document is the document's length. That makes bits per byte exact, and comparable between
tokenizers. A tokenizer that changes texts is refused (byte_level.py): what it declares is read, and it has to spell a
page of all scripts.

Control tokens are never recognised inside text: a web page that spells "</s>" is spelled out, it cannot end a
document. Only `encode_documents` and `encode_long` put BOS and EOS.

A text of any length is encoded in bounded memory, in windows that overlap. BPE never merges across the end of a token,
so what comes after a token's end does not depend on what came before it, as long as words are cut in the same places:
a window begins at the end of a token of the one before, and is taken once the two agree over a stretch. A text for
which they do not is refused.

A tokenizer on disk is `tokenizer.json` (the library's format, its sha256 is the fingerprint that shards carry) and
`tokenizer_config.json`, which names BOS and EOS the way Hugging Face does.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dlcm_lightning.data.byte_level import byte_alphabet, is_control, proof_page, why_lossy, without_control_tokens
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


WINDOW_BYTES, OVERLAP_BYTES, AGREE_BYTES = 2**19, 2**16, 2**11
"""Of a text that is encoded in pieces: a window, by how much it overlaps the one before, and the stretch over which
both have to agree."""
COUNTED_AT_ONCE = 2**22
"""Ids whose bytes are looked up at once."""
CUTS = 8
"""Places at which a window is tried to begin."""


class Tokenizer:
    """Text to ids and back. Made by `load` or `train_bpe`; immutable."""

    def __init__(self, definition: str, begin: str, end: str) -> None:
        """definition: the text of tokenizer.json. begin, end: the BOS and EOS tokens, which it must hold. DataError:
        the library refuses it, it changes texts, or it lacks these tokens."""
        self._definition = definition
        try:
            found = json.loads(definition)
            reason = why_lossy(found)
            self._vocabulary: dict[str, int] = found["model"]["vocab"]
            self._added = {token["id"]: token for token in found.get("added_tokens") or []}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"tokenizer.json: not one of the tokenizers library ({error!r})") from error
        if reason:
            raise DataError(f"tokenizer.json: {reason}")
        try:
            self._library = tokenizers.Tokenizer.from_str(without_control_tokens(found))
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"tokenizer.json: the tokenizers library refuses it ({error})") from error
        self._library.no_truncation()
        self._library.no_padding()
        ids = {token["content"]: index for index, token in self._added.items()}
        bos_id, eos_id = (ids.get(name, self._vocabulary.get(name)) for name in (begin, end))
        if bos_id is None or eos_id is None or bos_id == eos_id:
            raise DataError(f"tokenizer: begin {begin!r}, end {end!r} are not two tokens of its vocabulary; "
                            "name its own tokens as bos_token and eos_token in tokenizer_config.json")
        self.begin, self.end = begin, end
        self.bos_id, self.eos_id = bos_id, eos_id
        self._prove()

    def _prove(self) -> None:
        """DataError: it does not spell a text with its own bytes, or takes a name in a text for a control token."""
        names = [token["content"] for token in self._added.values() if is_control(token)] + [self.begin, self.end]
        for text in (proof_page(), "".join(names), " ".join(names), *names[:64]):
            ids = self._library.encode(text, add_special_tokens=False).ids
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
        """One uint32 array per text: BOS, the text's ids, EOS. Uses the library's threads, and some hundred bytes of
        memory a character; `encode_long` bounds that."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        framed = (array("I", [self.bos_id, *item.ids, self.eos_id]) for item in encoded)  # sooner than np.array
        return [np.frombuffer(ids, dtype=np.uintc) for ids in framed]

    def bytes_of(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) int64: UTF-8 bytes that each document's ids stand for; ids that are not empty."""
        if sum(map(len, encoded)) > COUNTED_AT_ONCE:
            return np.array([sum(int(self._sizes[ids[begin:begin + COUNTED_AT_ONCE]].sum())
                                 for begin in range(0, len(ids), COUNTED_AT_ONCE)) for ids in encoded])
        starts = np.cumsum([0, *map(len, encoded[:-1])])
        found: np.ndarray = np.add.reduceat(self._sizes[np.concatenate(encoded)], starts)
        return found

    def encode_long(self, content: bytes | bytearray, advance: Callable[[int, int], object] = lambda *_: None
                    ) -> np.ndarray:
        """The same ids for one text in UTF-8, of any length, in bounded memory beyond the ids; uint16 or uint32.
        advance: told of the bytes and the ids of each piece. DataError: pieces of the text do not fit together."""
        ids = array("H" if self.vocab_size <= 2**16 else "I", [self.bos_id])
        for piece in self._pieces_of_ids(content):
            ids.extend(piece.tolist())
            advance(int(self._sizes[piece].sum()), len(piece))
        ids.append(self.eos_id)
        return np.frombuffer(ids, dtype=np.dtype(ids.typecode))

    def _pieces_of_ids(self, content: bytes | bytearray) -> Iterator[np.ndarray]:
        begin, (ids, ends) = 0, self._window(content, 0)
        while begin + WINDOW_BYTES < len(content):
            for cut in self._cuts(content, begin, ends):
                after, after_ends = self._window(content, begin + int(ends[cut]))
                if _agree(ids[cut + 1:], after, after_ends):
                    yield ids[:cut + 1]
                    begin, ids, ends = begin + int(ends[cut]), after, after_ends
                    break
            else:
                raise DataError(f"a text of {len(content):,} bytes cannot be encoded in pieces by this tokenizer (at "
                                f"byte {begin:,}); split it into shorter documents")
        yield ids

    def _window(self, content: bytes | bytearray, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a window, and where in it each ends, in bytes."""
        end = begin + WINDOW_BYTES
        while end < len(content) and content[end] & 0xC0 == 0x80:  # inside a character
            end -= 1
        text = content[begin:end].decode()
        ids = np.array(self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int64)
        return ids, np.cumsum(self._sizes[ids])

    def _cuts(self, content: bytes | bytearray, begin: int, ends: np.ndarray) -> Iterator[int]:
        """Tokens of a window behind which the next one may begin: a character ends there too."""
        first = int(np.searchsorted(ends, WINDOW_BYTES - OVERLAP_BYTES))
        places = [cut for cut in range(first, max(0, first - 4096), -1)
                  if cut < len(ends) and content[begin + int(ends[cut])] & 0xC0 != 0x80]
        yield from places[::max(1, len(places) // CUTS)][:CUTS]

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
    def _sizes(self) -> np.ndarray:
        return self.token_bytes()

    @cached_property
    def _pieces(self) -> list[bytes]:
        alphabet = byte_alphabet()
        latin = {byte: "\u0100" for byte in range(256)} | {ord(sign): chr(byte) for sign, byte in alphabet.items()}
        pieces = [b""] * (max([*self._vocabulary.values(), *self._added]) + 1)
        for token, index in self._vocabulary.items():
            try:
                pieces[index] = token.translate(latin).encode("latin-1")
            except UnicodeEncodeError:
                if index not in self._added:
                    raise DataError(f"tokenizer: token {token!r} is not written in the byte-level alphabet; "
                                    "only byte-level BPE tokenizers can be used") from None
        for index, token in self._added.items():
            pieces[index] = b"" if token.get("special") else token["content"].encode()
        pieces[self.bos_id] = pieces[self.eos_id] = b""
        return pieces


def _agree(before: np.ndarray, after: np.ndarray, after_ends: np.ndarray) -> bool:
    """Whether two windows cut the text in the same way behind the place where the second one begins."""
    count = min(len(before), len(after))
    differing = np.flatnonzero(before[:count] != after[:count])
    same = int(differing[0]) if len(differing) else count
    return same > 0 and int(after_ends[same - 1]) >= AGREE_BYTES


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
