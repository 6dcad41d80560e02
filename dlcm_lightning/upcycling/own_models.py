"""A dense model of ours as a source: an export, or the newest checkpoint of a run.

The logits of ours are multiplied by 1 / s_token. A source's are not, so its unembedding is the stored one times that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dlcm_lightning.checkpoint.exported import Exported
from dlcm_lightning.checkpoint.folder import open_checkpoint
from dlcm_lightning.config import ModelConfig
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export.portable import model_state
from dlcm_lightning.model.mup import logit_scale
from dlcm_lightning.upcycling.source import PIECES, UNEMBEDDING, DenseSource, Shape, layer_name
from dlcm_lightning.upcycling.spelling import spelling_of


def read_export(folder: Path) -> DenseSource:
    """CheckpointError: damaged, or no dense model."""
    exported = Exported(folder)
    exported.check_whole()
    config = exported.config.model
    stored = exported.tensors()
    return _source(folder, config, {name: tuple(stored.shape(name)[0]) for name in stored.names()}, stored.get,
                   f"{folder} (an export of ours)")


def read_run(run: Path) -> DenseSource:
    """The same of its newest checkpoint."""
    checkpoint = open_checkpoint(run, None)
    _refuse_dlcm(run, checkpoint.config.model)
    state = model_state(checkpoint)
    return _source(run, checkpoint.config.model, {name: tuple(tensor.shape) for name, tensor in state.items()},
                   state.__getitem__, f"{checkpoint.folder} (a run of ours)")


def _refuse_dlcm(place: Path, config: ModelConfig) -> None:
    if config.kind != "dense":
        raise CheckpointError(f"{place}: model.kind = {config.kind!r}: a DLCM is no dense model; to train it on, give "
                              "its export as train.init_from")


def _source(place: Path, config: ModelConfig, sizes: Mapping[str, tuple[int, ...]], stored: Callable[[str], Tensor],
            origin: str) -> DenseSource:
    _refuse_dlcm(place, config)
    shape = Shape(config.decoder_layers, config.d_token, config.heads_token, config.kv_heads_token, config.head_dim,
                  config.ffn_token, config.vocab_size, config.norm_epsilon, config.rope_base)
    scale = logit_scale(config)

    def get(name: str) -> Tensor:
        tensor = stored(name).to(torch.float32)
        return tensor * scale if name == UNEMBEDDING else tensor

    source = DenseSource(shape, False, get, spelling_of(place), origin)
    if differing := sorted(set(source.names()) ^ sizes.keys()):
        raise CheckpointError(f"{place}: its tensors are not those of its model ({differing[0]}); export it again")
    rows = shape.pieces
    for layer in range(shape.layers):
        for within, pieces in PIECES.items():
            name = layer_name("decoder", layer, within)
            if sizes[name] != (sum(rows[piece][0] for piece in pieces), *rows[pieces[0]][1:]):
                raise CheckpointError(f"{place}: {name} has the shape {sizes[name]}, and its config.yaml says "
                                      "otherwise; export it again")
    return source
