"""Bytes of tokens to text that can be shown while it grows.

A token may end inside a character, and a text may end inside a stop string: both are held back until it is known what
they become. What is shown is never taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one sequence, in spans that belong to one concept each."""

    def __init__(self, stops: Sequence[bytes]) -> None:
        """stops: the text ends before any of these."""
        self.content = bytearray()
        self.stopped = False
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = self._concept = 0
        self._ends: list[tuple[int, int]] = []
        """Where each token ends, and its concept."""

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def add(self, piece: bytes, concept: int) -> list[tuple[str, int]]:
        """A token's bytes, and which concept it belongs to -> what can be shown now."""
        begin = max(0, len(self.content) - self._longest + 1)
        self.content += piece
        self._ends.append((len(self.content), concept))
        found = [at for stop in self._stops if (at := self.content.find(stop, begin)) >= 0]
        if found:
            self.stopped = True
            del self.content[min(found):]
            return self.close()
        held = max((length for stop in self._stops for length in range(1, len(stop))
                    if self.content.endswith(stop[:length])), default=0)
        return self._show(len(self.content) - held, False)

    def close(self) -> list[tuple[str, int]]:
        """What is left to be shown."""
        return self._show(len(self.content), True)

    def _show(self, until: int, final: bool) -> list[tuple[str, int]]:
        spans: list[tuple[str, int]] = []
        while self._shown < until:
            end, self._concept = self._ends[0]
            if end <= until:
                self._ends.pop(0)
            self._keep(spans, self._decoder.decode(bytes(self.content[self._shown:min(end, until)])), self._concept)
            self._shown = max(self._shown, min(end, until))
        if final:
            self._keep(spans, self._decoder.decode(b"", True), self._concept)
        return spans

    @staticmethod
    def _keep(spans: list[tuple[str, int]], text: str, concept: int) -> None:
        if text and spans and spans[-1][1] == concept:
            spans[-1] = spans[-1][0] + text, concept
        elif text:
            spans.append((text, concept))
