"""`dlcm generate`: prompts from a command line or a file, texts to a terminal or as JSON lines.

One text streams as it comes; several come whole, each under its prompt. With concepts, the tokens that one concept
pools share a background on a terminal, and bars stand between concepts elsewhere.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from dlcm_lightning.data.inspection.table import escape_control_characters
from dlcm_lightning.errors import ConfigError
from dlcm_lightning.inference.generator import Begun, Completion, Generator, Piece
from dlcm_lightning.inference.sampling import Sampling
from dlcm_lightning.inference.text import TextStream
from dlcm_lightning.progress import progress_bar

COLOURS = (153, 229, 157, 224, 189, 222)
"""Backgrounds of neighbouring concepts, of the 256 that terminals know; text on them is black."""
RESET = "\x1b[0m"
BAR = "|"


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Those of the command line, then those of a file: one a line, or lines of JSON with a field "prompt" where its
    name ends in .jsonl; - reads standard input. ConfigError: none, or the file cannot be read."""
    prompts = list(given)
    if file is not None:
        prompts += _from_file(file)
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT, or --prompts FILE with one a line (an empty --prompt begins "
                          "a document)" if file is None else f"--prompts {file}: holds no prompt")
    return prompts


def _from_file(file: str) -> Iterator[str]:
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--prompts {file}: not a text in UTF-8 ({error})") from error
    except OSError as error:
        raise ConfigError(f"--prompts {file}: cannot be read ({error})") from error
    for number, line in enumerate((line.removesuffix("\r") for line in lines), 1):
        if not line.strip():
            continue
        if not file.endswith(".jsonl"):
            yield line
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--prompts {file}: line {number} is no JSON with a field \"prompt\" ({error!r})"
                              ) from error
        if not isinstance(prompt, str):
            raise ConfigError(f"--prompts {file}: \"prompt\" of line {number} is a {type(prompt).__name__}; write a "
                              "text")
        yield prompt


class Screen:
    """Texts with or without concepts, coloured or not."""

    def __init__(self, concepts: bool, colour: bool, out: TextIO) -> None:
        self.concepts, self.colour, self._out = concepts, colour, out
        self._concept: int | None = None

    @property
    def utf8(self) -> bool:
        return (self._out.encoding or "").lower().replace("-", "") == "utf8"

    def span(self, text: str, concept: int) -> None:
        """Text of one concept, shown at once."""
        text = escape_control_characters(text, keep="\n\t\u200c\u200d")  # joiners of letters and signs
        if self.concepts and self.colour:
            begin = f"\x1b[30;48;5;{COLOURS[concept % len(COLOURS)]}m"
            text = "\n".join(f"{begin}{line}{RESET}" if line else "" for line in text.split("\n"))
        elif self.concepts and self._concept not in (None, concept):
            text = BAR + text
        self._concept = concept
        self.write(text)

    def write(self, text: str) -> None:
        encoding = self._out.encoding or "utf-8"
        try:
            self._out.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._out.flush()
        except BrokenPipeError:  # what the texts are piped to, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
            raise SystemExit(0) from None

    def close(self) -> None:
        self._concept = None
        self.write("\n")


def spans_of(pieces: Iterable[bytes], closing: Sequence[bool]) -> list[tuple[str, int]]:
    """The text of tokens, one string a concept. closing: whether each of the first tokens closes a concept."""
    stream, concept = TextStream(()), 0
    spans: list[tuple[str, int]] = []
    for place, piece in enumerate(pieces):
        spans += stream.add(piece, concept)
        concept += place < len(closing) and closing[place]
    spans += stream.close()
    return [("".join(text for text, _ in same), number)
            for number, same in itertools.groupby(spans, key=lambda span: span[1])]


def spans_of_completion(generator: Generator, completion: Completion) -> list[tuple[str, int]]:
    """Of prompt and text; what a stop string cut off is left out."""
    pieces = generator.tokenizer.pieces([*completion.prompt_ids, *completion.ids])
    room = sum(map(len, pieces[: len(completion.prompt_ids)])) + completion.text_bytes
    kept = [piece[: max(0, room - end + len(piece))]
            for piece, end in zip(pieces, itertools.accumulate(map(len, pieces)), strict=True)]
    return spans_of(kept, completion.boundaries)


def as_json(generator: Generator, completion: Completion, prompts: Sequence[str], concepts: bool) -> dict[str, Any]:
    """What a program wants to know of a text."""
    read = len(completion.boundaries)
    found: dict[str, Any] = {
        "prompt": prompts[completion.prompt], "sample": completion.sample, "text": completion.text,
        "finish": completion.finish, "prompt_tokens": len(completion.prompt_ids), "tokens": len(completion.ids),
        "ids": completion.ids}
    if read:
        found |= {"concepts": completion.concepts, "tokens_per_concept": round(read / completion.concepts, 3)}
    if concepts and read:
        found["spans"] = [text for text, _ in spans_of_completion(generator, completion)]
    return found


def run(generator: Generator, prompts: Sequence[str], sampling: Sampling, *, samples: int, batch_size: int,
        concepts: bool, colour: bool | None, as_lines: bool, note: Callable[[str], None]) -> None:
    """Generates, and writes to standard output. colour: None where the terminal says. note: of what it took."""
    began = time.monotonic()
    if concepts and generator.model.config.kind == "dense":
        note("a dense model has no concepts to show")
        concepts = False
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    screen = Screen(concepts, colour, sys.stdout)
    events = generator.stream(prompts, sampling, samples=samples, batch_size=batch_size)
    if len(prompts) * samples == 1 and not as_lines:
        done = [_streamed(generator, events, screen)]
    else:
        done = list(_whole_texts(generator, events, prompts, samples, screen, as_lines, concepts))
    tokens = sum(len(one.ids) for one in done)
    seconds = time.monotonic() - began
    note(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second{_ratio(done)}; "
         f"ended by {', '.join(sorted({one.finish for one in done}))}")


def _ratio(done: Iterable[Completion]) -> str:
    read, closed = sum(len(one.boundaries) for one in done), sum(one.concepts for one in done)
    return f"; {closed:,} concepts, {read / closed:.2f} tokens per concept" if closed else ""


def _streamed(generator: Generator, events: Iterable[Begun | Piece | Completion], screen: Screen) -> Completion:
    """One text as it comes, after its prompt."""
    for event in events:
        if isinstance(event, Completion):
            screen.close()
            return event
        if isinstance(event, Piece):
            screen.span(event.text, event.concept)
        else:
            for text, concept in spans_of(generator.tokenizer.pieces(event.prompt_ids), event.boundaries):
                screen.span(text, concept)
    raise AssertionError("every text ends")


def _whole_texts(generator: Generator, events: Iterable[Begun | Piece | Completion], prompts: Sequence[str],
                 samples: int, screen: Screen, as_lines: bool, concepts: bool) -> Iterator[Completion]:
    """Several texts, in their order, each when those before it have ended."""
    waiting: dict[tuple[int, int], Completion] = {}
    following = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(samples)]
    with progress_bar(total=len(following), desc="generate", unit="text") as bar:
        for event in events:
            if not isinstance(event, Completion):
                continue
            bar.update()
            waiting[event.prompt, event.sample] = event
            while following and following[0] in waiting:
                one = waiting.pop(following.pop(0))
                if as_lines:
                    screen.write(json.dumps(as_json(generator, one, prompts, concepts), ensure_ascii=not screen.utf8)
                                 + "\n")
                else:
                    screen.write(f"--- prompt {one.prompt + 1}" + f", sample {one.sample + 1}" * (samples > 1) + "\n")
                    for text, concept in spans_of_completion(generator, one):
                        screen.span(text, concept)
                    screen.close()
                yield one
