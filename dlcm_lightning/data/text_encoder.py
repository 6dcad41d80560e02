"""Texts to ids: the part of a tokenizer that a process needs which does nothing else.

It is small and can be sent to other processes, which then need not prove the tokenizer again (tokenizer.py does).

A text of any length is encoded in bounded memory, in windows that overlap. BPE never merges across the end of a token,
so what comes after a token's end does not depend on what came before it, as long as words are cut in the same places:
a window begins at the end of a token of the one before, and is taken once the two agree over a stretch. A text for
which they do not is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import tokenizers

from dlcm_lightning.errors import DataError

WINDOW_BYTES, OVERLAP_BYTES, AGREE_BYTES = 2**19, 2**16, 2**11
"""Of a text that is encoded in pieces: a window, by how much it overlaps the one before, and the stretch over which
both have to agree."""
COUNTED_AT_ONCE = 2**22
"""Ids whose bytes are looked up at once."""
CUTS = 8
"""Places at which a window is tried to begin."""


class Encoder:
    """Documents to ids, with BOS and EOS, and the bytes that ids stand for."""

    def __init__(self, definition: str, bos_id: int, eos_id: int, sizes: np.ndarray) -> None:
        """definition: a tokenizer.json without control tokens. sizes (V,) int64: UTF-8 bytes that each id stands for,
        0 for BOS and EOS."""
        self._definition, self.bos_id, self.eos_id, self.sizes = definition, bos_id, eos_id, sizes

    def __reduce__(self) -> tuple[type[Encoder], tuple[str, int, int, np.ndarray]]:
        """Without the library's object, which each process makes at its first text."""
        return Encoder, (self._definition, self.bos_id, self.eos_id, self.sizes)

    @cached_property
    def library(self) -> tokenizers.Tokenizer:
        made = tokenizers.Tokenizer.from_str(self._definition)
        made.no_truncation()
        made.no_padding()
        return made

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One uint32 array per text: BOS, the text's ids, EOS. Uses the library's threads, and some hundred bytes of
        memory a character; `encode_long` bounds that."""
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        documents = []
        for item in encoded:
            ids = array("I", (self.bos_id,))
            ids.fromlist(item.ids)  # sooner than np.array
            ids.append(self.eos_id)
            documents.append(np.frombuffer(ids, dtype=np.uintc))
        return documents

    def bytes_of(self, encoded: Sequence[np.ndarray]) -> np.ndarray:
        """(n,) int64: UTF-8 bytes that each document's ids stand for; ids that are not empty."""
        if sum(map(len, encoded)) > COUNTED_AT_ONCE:
            return np.array([sum(int(self.sizes[ids[begin:begin + COUNTED_AT_ONCE]].sum())
                                 for begin in range(0, len(ids), COUNTED_AT_ONCE)) for ids in encoded])
        starts = np.cumsum([0, *map(len, encoded[:-1])])
        found: np.ndarray = np.add.reduceat(self.sizes[np.concatenate(encoded)], starts)
        return found

    def encode_long(self, content: bytes | bytearray, advance: Callable[[int, int], object] = lambda *_: None
                    ) -> np.ndarray:
        """The same ids for one text in UTF-8, of any length, in bounded memory beyond the ids; uint16 or uint32.
        advance: told of the bytes and the ids of each piece. DataError: pieces of the text do not fit together."""
        ids = array("H" if len(self.sizes) <= 2**16 else "I", [self.bos_id])
        for piece in self._pieces_of_ids(content):
            ids.extend(piece.tolist())
            advance(int(self.sizes[piece].sum()), len(piece))
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
        ids = np.array(self.library.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int64)
        return ids, np.cumsum(self.sizes[ids])

    def _cuts(self, content: bytes | bytearray, begin: int, ends: np.ndarray) -> Iterator[int]:
        """Tokens of a window after which the next one may begin: a character ends there too."""
        first = int(np.searchsorted(ends, WINDOW_BYTES - OVERLAP_BYTES))
        places = [cut for cut in range(first, max(0, first - 4096), -1)
                  if cut < len(ends) and content[begin + int(ends[cut])] & 0xC0 != 0x80]
        yield from places[::max(1, len(places) // CUTS)][:CUTS]


def _agree(before: np.ndarray, after: np.ndarray, after_ends: np.ndarray) -> bool:
    """Whether two windows cut the text in the same way after the place where the second one begins."""
    count = min(len(before), len(after))
    differing = np.flatnonzero(before[:count] != after[:count])
    same = int(differing[0]) if len(differing) else count
    return same > 0 and int(after_ends[same - 1]) >= AGREE_BYTES
