"""The model that is looked at, and the validation rows that it is looked at on.

A run's directory or an export, computed in fp32 on whatever device there is: decisions lie near the threshold, and a
page that says other things on another machine would be of little use. The rows are the run's own validation rows,
unless fields of `data` say otherwise; what the model is, no field can change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dlcm_lightning.checkpoint.folder import CONFIG
from dlcm_lightning.compose import differences, load_saved_config
from dlcm_lightning.config import DataConfig
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import ConfigError, DataError
from dlcm_lightning.export.portable import Trained, model_of, open_trained
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.ops.attention import why_not
from dlcm_lightning.ops.device import on_gpu
from dlcm_lightning.progress import Log

MAY_BE_ASKED = "data."
"""What overrides begin with."""


@dataclass(frozen=True)
class Subject:
    """A trained model that is ready to compute."""

    trained: Trained
    model: LanguageModel
    """In evaluation mode, fp32."""

    @property
    def name(self) -> str:
        return self.trained.config.name

    @property
    def segmented(self) -> bool:
        """Whether it cuts texts into concepts; a dense model does not."""
        return self.trained.config.model.kind == "dlcm"


def open_subject(place: str | Path, step: int | None = None) -> Subject:
    """place: a run's directory or an export. step: of a run's checkpoint, or the newest. CheckpointError: there is no
    model, a damaged one, or one that computes something else than when it was written."""
    trained = open_trained(place, step)
    device = torch.device("cuda" if on_gpu() else "cpu")
    config = trained.config
    if config.model.attention != "auto" and why_not(config.model.attention, device, torch.float32):
        config = replace(config, model=replace(config.model, attention="auto"))
    model = model_of(config, trained.state, torch.float32, device, str(trained.place))
    trained.check(model)
    return Subject(trained, model)


def open_rows(trained: Trained, rows: int | None, overrides: Sequence[str], log: Log) -> Reader:
    """The reader of the validation rows. rows: at most so many of each source. ConfigError: an override of anything but
    `data`. DataError: the rows are gone, or written in other ids than the model knows."""
    config = load_saved_config(trained.place / CONFIG, overrides)
    refused = [name for name in differences(trained.config, config) if not name.startswith(MAY_BE_ASKED)]
    if refused:
        raise ConfigError(f"{refused[0]}: dlcm analyze looks at the model as it was trained; give fields of data, such "
                          "as data.root=...")
    data: DataConfig = config.data if rows is None else replace(config.data, validation_rows=rows)
    try:
        reader = Reader(data, config.seed, config.model.vocab_size, log=log)
    except DataError as error:
        raise DataError(f"{trained.place}: its validation rows cannot be read: {error}; if the data have moved, give "
                        "data.root=... after the name of the run") from error
    if Tokenizer.load(reader.store).fingerprint != trained.tokenizer_fingerprint:
        raise DataError(f"data.root = {data.root!r}: its tokenizer.json is not that of {trained.place}, so its ids "
                        "mean other texts to this model; tokenise the texts with the model's own tokenizer")
    return reader


def check_same_tokenizer(trained: Trained, other: Trained) -> None:
    """ConfigError: the two models do not share a tokenizer, so that there is no loss of the same tokens."""
    if trained.tokenizer_fingerprint != other.tokenizer_fingerprint:
        raise ConfigError(f"--against {other.place}: its tokenizer.json ({other.tokenizer_fingerprint[:12]}) is not "
                          f"that of {trained.place} ({trained.tokenizer_fingerprint[:12]}), so the two predict "
                          "different tokens; compare runs that share a tokenizer")
