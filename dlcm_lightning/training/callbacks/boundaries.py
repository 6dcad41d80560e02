"""Boundaries one can see: fixed validation documents cut into their concepts, in TensorBoard and as a page.

Boundaries are thresholded, as at inference. TensorBoard strips colours from texts, so there a bar stands between two
concepts: `The\u2502 cat\u2502 sat on`. `boundaries.html` in the run's directory shows the same texts in colours. A
boundary inside a character is shown after the character: no character is cut.
"""

from __future__ import annotations

import codecs
import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.batch import Batch
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.model.dlcm import DLCM
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.callbacks.metrics import tensorboard
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch

BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"
PAGE = "boundaries.html"
COLOURS = ("#cfe3f7", "#f9dcc4", "#d3efd0", "#ead6f2")
"""Of neighbouring concepts, in turn."""


@torch.no_grad()
def concepts_of(model: DLCM, tokenizer: Tokenizer, text: str, max_tokens: int, device: torch.device) -> list[str]:
    """The beginning of `text`, cut into what each concept pools; begin-of-text and end-of-text are shown as pieces of
    their concepts. Joined they are the text, up to the last whole character of `max_tokens` tokens."""
    tokens = tokenizer.encode_documents([text])[0][:max_tokens]
    ids = torch.as_tensor(tokens, dtype=torch.long, device=device)
    output = model(ids, Segments.from_lengths([len(tokens)], ids.device))
    assert output.concepts is not None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    found, begin = [], 0
    for end in [*output.concepts.closing.tolist(), len(tokens) - 1]:
        if end >= begin:
            found.append(decoder.decode(b"".join(tokenizer.pieces(tokens[begin:end + 1]))))
            begin = end + 1
    return [one for one in found if one]


def page(documents: Mapping[str, Sequence[Sequence[str]]], title: str) -> str:
    """HTML of the concepts of documents, by domain."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>",
             "body{font:15px/1.7 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}",
             "p{white-space:pre-wrap;overflow-wrap:anywhere}span{border-radius:3px;padding:2px 0}",
             *(f".c{number}{{background:{colour}}}" for number, colour in enumerate(COLOURS)),
             f"</style><h1>{html.escape(title)}</h1>"]
    for domain, texts in documents.items():
        parts.append(f"<h2>{html.escape(domain)}</h2>")
        for concepts in texts:
            spans = (f"<span class='c{number % len(COLOURS)}'>{html.escape(concept)}</span>"
                     for number, concept in enumerate(concepts))
            parts.append(f"<p>{''.join(spans)}</p>")
    return "\n".join(parts) + "\n"


class ShowBoundaries(Callback):
    """Writes both at every validation and at the run's end."""

    def __init__(self, reader: Reader, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch
        self.tokenizer = Tokenizer.load(reader.store)
        self.documents: dict[str, Sequence[str]] = {
            domain: reader.fixed_documents(domain) for domain in dict.fromkeys(s.domain for s in reader.sources)
        }
        self.max_tokens = reader.config.sequence_length

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(module, PretrainModule)
        config, step = module.config, trainer.global_step
        if not module.finishes_step(batch_idx) or not isinstance(module.model, DLCM):
            return
        if step % config.train.validate_every_steps and step != config.total_steps:
            return
        model = module.model
        with self.stopwatch.paused("validate"):
            # On all ranks: where the model is spread over them, its forward is theirs together.
            shown = {domain: [concepts_of(model, self.tokenizer, text, self.max_tokens, module.device)
                              for text in texts] for domain, texts in self.documents.items()}
            if (board := tensorboard(trainer)) is None:
                return
            for domain, texts in shown.items():
                panel = "".join(f"<p>{html.escape(BAR.join(concepts))}</p>\n\n" for concepts in texts)
                board.experiment.add_text(f"boundaries/{domain}", panel, module.consumed_tokens)
            title = f"{config.name}: concepts at step {step:,} of {config.total_steps:,}"
            write_atomically(board.run / PAGE, page(shown, title).encode())
