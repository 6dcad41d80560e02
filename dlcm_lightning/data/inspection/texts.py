"""Whether the tokens of every document are its text, byte for byte: its md5 was taken before it was tokenised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from dlcm_lightning.data.inspection.lookup import hashes
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.store import Content
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError

PIECE_TOKENS = 2**18
"""Decoded at once."""


class Texts:
    """Decodes the documents of shards. Immutable; threads may share one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        self._sizes = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self._bytes = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def check(self, source: Source, number: int) -> None:
        """Every document of a shard, those that are skipped too. DataError: one is not the text whose md5 is there, or
        they have not as many bytes as the manifest states."""
        shard, entry, stated = source.shard(number), source.manifest.shards[number], hashes(source, number)
        document = size = 0
        for block, row in enumerate(shard.index):
            lengths = source.lengths(number, shard, block)
            kept = np.ones(len(lengths), dtype=bool)
            if block in shard.skips:
                kept[shard.skips[block][:, 0]] = False
            for place, (digest, count) in enumerate(self._documents(source, shard.content, row[0], lengths)):
                if digest != stated[document].tobytes():
                    raise DataError(f"{source.where(number)}: document {document} is not the text that it was made of: "
                                    "the tokenizer changed it, or its tokens were; build the source again")
                document += 1
                size += count * int(kept[place])
        if size != entry.text_bytes:
            raise DataError(f"{source.where(number)}: its documents have {size} bytes, the manifest states "
                            f"{entry.text_bytes}; build the source again")

    def _documents(self, source: Source, content: Content, at: int, lengths: np.ndarray) -> Iterator[tuple[bytes, int]]:
        """md5 and bytes of each document of a block. at: its first token, in bytes."""
        ends = np.cumsum(lengths)
        place = 0
        while place < len(lengths):
            begin = int(ends[place] - lengths[place])
            last = max(place + 1, int(np.searchsorted(ends, begin + PIECE_TOKENS, side="right")))
            hashed = [hashlib.md5(usedforsecurity=False) for _ in range(place, last)]
            sizes = [0] * len(hashed)
            for first in range(begin, int(ends[last - 1]), PIECE_TOKENS):  # once, unless it is one long document
                until = min(first + PIECE_TOKENS, int(ends[last - 1]))
                width = source.dtype.itemsize
                text, bounds = self._decoded(np.frombuffer(
                    content.read(at + first * width, at + until * width), source.dtype))
                for number in range(len(hashed)):
                    inside = [min(max(int(end) - first, 0), until - first)
                              for end in (ends[place + number] - lengths[place + number], ends[place + number])]
                    piece = text[bounds[inside[0]]:bounds[inside[1]]]
                    hashed[number].update(piece)
                    sizes[number] += len(piece)
            yield from ((one.digest(), size) for one, size in zip(hashed, sizes, strict=True))
            place = last

    def _decoded(self, ids: np.ndarray) -> tuple[bytes, list[int]]:
        """The bytes of ids end to end, and where each begins, with the end of all."""
        sizes = self._sizes[ids]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        places = np.repeat(self._begins[ids] - bounds[:-1], sizes) + np.arange(bounds[-1])
        return self._bytes[places].tobytes(), bounds.tolist()
