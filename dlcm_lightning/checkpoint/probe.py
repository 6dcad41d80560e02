"""What a model says of a fixed text: its loss and where it ends concepts.

Stored with every checkpoint and asked again when one is loaded: weights that load without an error but belong to
another layout, an order that was lost, a constant that changed, compute something else and are caught.
"""

from __future__ import annotations

import torch

from dlcm_lightning.batch import IGNORE_INDEX
from dlcm_lightning.checkpoint.folder import Fingerprint
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.segments import Segments

TEXTS = (
    "A river carries what it has taken from the hills; by the time it meets the sea, it has forgotten every stone.",
    "先写下问题，再读数据，最后才写结论。顺序一变，答案也会变。",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "If $x^2 - 5x + 6 = 0$, then $(x - 2)(x - 3) = 0$, so $x = 2$ or $x = 3$.",
)
LOSS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Relative. The same weights give the same numbers but for the order of sums on another machine."""
FLIPPED = {torch.float64: 0.0, torch.float32: 0.02, torch.bfloat16: 0.1}
"""Share of decisions that may differ, those that lie at the threshold."""


class Probe:
    """The texts in one tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = [torch.as_tensor(ids, dtype=torch.long) for ids in tokenizer.encode_documents(list(TEXTS))]
        self.lengths = [len(piece) for piece in pieces]
        self.tokens = torch.cat(pieces)
        ends = torch.full((1,), IGNORE_INDEX)
        self.targets = torch.cat([torch.cat([piece[1:], ends]) for piece in pieces])

    @torch.no_grad()
    def fingerprint(self, model: LanguageModel, device: torch.device) -> Fingerprint:
        """Thresholded, as at inference. Collective where the model is spread over ranks."""
        documents = Segments.from_lengths(self.lengths, device)
        output = model(self.tokens.to(device), documents, None, self.targets.to(device))
        boundaries = "" if output.segmentation is None else "".join(
            "1" if one else "0" for one in output.segmentation.boundaries.tolist())
        return Fingerprint(output.nll_sum.item() / int((self.targets >= 0).sum()), boundaries)


def difference(stored: Fingerprint, now: Fingerprint, dtype: torch.dtype) -> str:
    """Why the two are not of one model, or nothing."""
    if not abs(now.loss - stored.loss) <= LOSS_TOLERANCE[dtype] * abs(stored.loss):
        return f"its loss on the probe text is {now.loss:.6g}, it was {stored.loss:.6g} when it was written"
    flipped = sum(one != other for one, other in zip(stored.boundaries, now.boundaries, strict=False))
    if len(stored.boundaries) != len(now.boundaries) or flipped > FLIPPED[dtype] * len(now.boundaries):
        return f"{flipped} of {len(now.boundaries)} boundaries on the probe text are not those of when it was written"
    return ""
