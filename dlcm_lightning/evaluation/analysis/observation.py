"""What a model says of every token of the validation rows.

The rows are those of `dlcm evaluate`, in its micro-batches, thresholded; so sums over them are the same numbers. A row
holds *pieces* of documents, and the model sees each piece as a document of its own: positions restart, its first token
is a boundary. Two pieces in neighbouring rows may still be of one *document*. Errors are correlated within a document,
so that standard errors are taken over documents.

Axes: T tokens of all rows, those of padding rows left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.progress import progress_bar


@dataclass(frozen=True)
class Tokens:
    """The validation rows, end to end."""

    ids: np.ndarray
    """(T,) int64."""
    targets: np.ndarray
    """(T,) int64: the token that is predicted at each; negative where nothing is predicted."""
    target_bytes: np.ndarray
    """(T,) int64: UTF-8 bytes of the predicted token; 0 where nothing is predicted."""
    first: np.ndarray
    """(T,) bool: whether a token is the first of its piece."""
    domains: np.ndarray
    """(T,) int64: index in `names`."""
    sources: np.ndarray
    """(T,) int64: number of the source in the reader."""
    documents: np.ndarray
    """(T,) int64: number of the document, over all its pieces; ascending."""
    rows: int
    names: list[str]
    """Of domains."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def predicted(self) -> np.ndarray:
        """(T,) bool: whether a token predicts another one."""
        return self.targets >= 0

    @property
    def starts(self) -> np.ndarray:
        """(N + 1,) int64: where each piece begins, and T."""
        return np.append(np.flatnonzero(self.first), len(self))

    @property
    def positions(self) -> np.ndarray:
        """(T,) int64: offset of each token in its piece."""
        begins = np.flatnonzero(self.first)
        return np.arange(len(self)) - begins[np.cumsum(self.first) - 1]

    @property
    def present(self) -> list[int]:
        """Domains that have tokens."""
        return [int(one) for one in np.unique(self.domains)]


@dataclass(frozen=True)
class Answer:
    """What one model says of them."""

    nll: np.ndarray
    """(T,) float64: negative log-likelihood of the predicted token in nats; 0 where nothing is predicted."""
    probabilities: np.ndarray | None
    """(T,) float64: p; None for a dense model."""
    boundaries: np.ndarray | None
    """(T,) bool: the thresholded decisions; None for a dense model."""
    threshold: float | None
    """What p was compared with; None for a dense model, and for forms without p."""


def read_tokens(reader: Reader) -> Tokens:
    """All validation rows. DataError: one cannot be read."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (
        "ids", "targets", "first", "domains", "sources", "documents")}
    document, before, rows = -1, (-1, -1), 0
    for batch in ValidationBatches(reader):
        length = batch.sequence_length
        first = np.zeros(len(batch.tokens), dtype=bool)
        first[batch.documents.cu_seqlens[:-1].numpy()] = True
        for number, sample in enumerate(batch.samples.tolist()):
            if sample < 0:
                continue
            span = slice(number * length, (number + 1) * length)
            ids, begins = batch.tokens[span].numpy(), first[span]
            place = reader.validation_rows[sample]
            follows = place == (before[0], before[1] + 1) and ids[0] != reader.bos_id
            numbers = document + np.cumsum(begins) - (1 if follows else 0)
            document, before, rows = int(numbers[-1]), place, rows + 1
            for name, values in (("ids", ids), ("targets", batch.targets[span].numpy()), ("first", begins),
                                 ("domains", np.full(length, batch.domains[number].item())),
                                 ("sources", np.full(length, place[0])), ("documents", numbers)):
                parts[name].append(values)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    target_bytes = np.where(whole["targets"] >= 0, reader.token_bytes[whole["targets"].clip(min=0)], 0)
    return Tokens(**whole, target_bytes=target_bytes, rows=rows, names=list(reader.domains))


@torch.no_grad()
def observe(model: LanguageModel, reader: Reader, what: str) -> Answer:
    """The model's answer to all validation rows. what: words for the progress bar."""
    nll, probabilities, boundaries, threshold = [], [], [], None
    for batch in progress_bar(ValidationBatches(reader), desc=what, unit="batch"):
        batch = batch.to(model.where)
        output = model(batch.tokens, batch.documents, None, batch.targets)
        counted = batch.counted()
        nll.append(output.nll[counted].double().cpu().numpy())
        if (found := output.segmentation) is not None:
            probabilities.append(found.probabilities[counted].double().cpu().numpy())
            boundaries.append(found.boundaries[counted].cpu().numpy())
            calibrated = model.config.boundary.threshold == "calibrated"
            threshold = float(found.threshold) if calibrated else 0.5
    if not boundaries:
        return Answer(np.concatenate(nll), None, None, None)
    if not model.config.boundary.learned:
        threshold = None
    return Answer(np.concatenate(nll), np.concatenate(probabilities), np.concatenate(boundaries), threshold)
