"""Boundaries one can see: fixed validation documents with their concepts marked, as text in TensorBoard.

Each concept stands between bars, its last piece closes it: `|The| cat| sat on|`. Thresholded, as at inference.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning.batch import Batch
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.model.dlcm import DLCM
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.callbacks.metrics import tensorboard
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.stopwatch import Stopwatch

BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"


@torch.no_grad()
def marked_text(model: DLCM, tokenizer: Tokenizer, text: str, max_tokens: int, device: torch.device) -> str:
    """`text` with a bar behind every concept; begin-of-text and end-of-text are shown as concepts of their own."""
    tokens = tokenizer.encode_documents([text])[0][:max_tokens]
    ids = torch.as_tensor(tokens, dtype=torch.long, device=device)
    documents = Segments.from_lengths([len(tokens)], ids.device)
    output = model(ids, documents)
    assert output.concepts is not None
    closing = [*output.concepts.closing.tolist(), len(tokens) - 1]
    shown, begin = [], 0
    for end in closing:
        if end >= begin:
            pieces = b"".join(tokenizer.pieces(tokens[begin:end + 1]))
            shown.append(pieces.decode("utf-8", errors="replace"))
            begin = end + 1
    return BAR.join(shown)


class ShowBoundaries(Callback):
    """Writes the text panel at every validation and at the run's end."""

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
        with self.stopwatch.paused("validate"):
            for domain, texts in self.documents.items():
                # On all ranks: where the model is spread over them, its forward is theirs together.
                shown = [marked_text(module.model, self.tokenizer, text, self.max_tokens, module.device)
                         for text in texts]
                panel = "".join(f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>\n\n" for text in shown)
                if (board := tensorboard(trainer)) is not None:
                    board.experiment.add_text(f"boundaries/{domain}", panel, module.consumed_tokens)
