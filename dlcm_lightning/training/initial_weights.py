"""The weights that a run begins with: drawn by the muP table, or those of an export (`train.init_from`).

Values come from the file by name, one whole tensor at a time, and go wherever the strategy keeps a parameter, exactly
as drawn ones do. Every rank reads them; one compares the files with the sums in portable.json, and tells the others.

An export is of this model only if it computes the same function: the shapes, and what no tensor shows (the epsilon of
the norms, the base of the rotary angles, the width at which rates hold, since logits are divided by it). Knobs of
segmentation and initialisation may differ. It is of these data only if the tokenizer is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dlcm_lightning.checkpoint.exported import ABOUT, Exported
from dlcm_lightning.compose import differences_of
from dlcm_lightning.config import Config, ModelConfig
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError, ConfigError, UserError
from dlcm_lightning.model import mup
from dlcm_lightning.model.dlcm import LanguageModel
from dlcm_lightning.training.datamodule import PretrainData
from dlcm_lightning.training.strategies.full_state import Fill, Place, copy_whole

FREE = ("attention", "mup.sigma", "mup.sigma_embedding")
"""Fields of the model that may differ, beside those of the boundary but for its form."""
DLCM_ONLY = ("d_concept", "encoder_layers", "backbone_layers", "heads_concept", "kv_heads_concept", "ffn_concept",
             "boundary.form")
"""Those that a dense model does not read."""


def filling(config: Config, trainer: Trainer | None, begins: bool | None) -> tuple[Fill, str]:
    """What fills a model; and why that is not `train.init_from`, where it should be. begins: whether the run has no
    checkpoint yet; None: not known, as Lightning tells of one only when the model is there. Collective.

    CheckpointError: the run begins, and `train.init_from` is no whole export, or one of another model or tokenizer."""
    draw = partial(mup.initialise, model=config.model, seed=config.seed)
    if not config.train.init_from or trainer is None or begins is False:
        return draw, ""
    said: str = trainer.strategy.broadcast(_examined(config, trainer) if trainer.is_global_zero else "")
    if said and begins:
        raise CheckpointError(said)
    return (draw, said) if said else (partial(fill_from, Exported(config.train.init_from)), "")


def _examined(config: Config, trainer: Trainer) -> str:
    """What is wrong with it, or nothing."""
    try:
        exported = Exported(config.train.init_from)
        exported.check_whole()
        data = trainer.datamodule  # type: ignore[attr-defined]
        fingerprint = Tokenizer.load(data.reader.store).fingerprint if isinstance(data, PretrainData) else ""
        check(exported, config, fingerprint)
    except UserError as error:
        return f"train.init_from = {config.train.init_from!r}: {error}"
    return ""


def check(exported: Exported, config: Config, tokenizer: str) -> None:
    """tokenizer: the sha256 of the data's tokenizer.json; empty where it is not known. ConfigError: it is of another
    model, or of another tokenizer."""
    before = exported.config.model
    if fields := _differing(before, config.model):
        name = fields[0]
        theirs, ours = (_value(model, name) for model in (before, config.model))
        raise ConfigError(f"model.{name} = {ours!r}: the export has {theirs!r}"
                          + (f", and {len(fields) - 1} more fields differ ({', '.join(fields[1:4])})"
                             if len(fields) > 1 else "") + "; write what its config.yaml says")
    if tokenizer and exported.tokenizer_fingerprint() != tokenizer:
        raise ConfigError(f"its tokenizer.json is not that of data.root = {config.data.root!r}, so the ids of the data "
                          "mean other texts to it; tokenise the texts with it (data.tokenizer for the sample corpus, "
                          "dlcm tokenize --tokenizer for others)")


def _differing(before: ModelConfig, now: ModelConfig) -> list[str]:
    found = [name for name in differences_of(asdict(before), asdict(now))
             if name not in FREE and (not name.startswith("boundary.") or name == "boundary.form")]
    return [name for name in found if now.kind == "dlcm" or before.kind == "dlcm" or name not in DLCM_ONLY]


def _value(model: ModelConfig, name: str) -> object:
    section, _, field = name.rpartition(".")
    return getattr(getattr(model, section) if section else model, field)


@torch.no_grad()
def fill_from(exported: Exported, model: LanguageModel, place: Place = copy_whole) -> None:
    """Fills every parameter, and the buffers that are kept. CheckpointError: it has other tensors than the model."""
    owners = dict(mup.role_parameters(model))
    kept = model.state_dict().keys() - owners.keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    expected = {*owners, *buffers}
    with exported.tensors() as stored:
        if differing := sorted(expected ^ set(stored.names())):
            where = "model" if differing[0] in expected else "export"
            raise _another(exported, f"{differing[0]} is in the {where} only")
        for name, owner in owners.items():
            place(owner.weight, _read(exported, stored.get, name, owner.shape))
        for name, buffer in buffers.items():
            buffer.copy_(_read(exported, stored.get, name, buffer.shape))


def _read(exported: Exported, get: Callable[[str], Tensor], name: str, shape: torch.Size) -> Tensor:
    value = get(name)
    if value.shape != shape:
        raise _another(exported, f"{name} has the shape {tuple(value.shape)}, in the model {tuple(shape)}")
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value


def _another(exported: Exported, what: str) -> CheckpointError:
    return CheckpointError(f"train.init_from = {str(exported.folder)!r}: {what}, though its config.yaml and {ABOUT} "
                           "agree with the run; write it again with this version")
