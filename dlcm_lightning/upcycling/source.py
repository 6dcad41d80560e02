"""A dense model that weights are taken from, whoever wrote it, under the names and in the layout of ours.

LLaMA-like models of all formats hold the same matrices under other names and in other pieces: queries, keys and values
are one matrix here, gate and up another, and one matrix is rows of the pieces, one piece below the other. A format says
what it calls the pieces (`Naming`); everything else is written once, here. Whether all are there, each of its shape,
and none is left that nobody reads, is asked of the file's table of contents. Tensors come one at a time, as fp32.

    huggingface.py   a folder with config.json and safetensors
    gguf.py          a .gguf file
    own_models.py    an export of ours, or the directory of a run

The logits of a source are unembedding times norm: where they are multiplied by something, the matrix has it in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlcm_lightning.config import ModelConfig, MupConfig
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.upcycling.spelling import Spelling

LAYER = ("attention_norm", "query", "key", "value", "out", "ffn_norm", "gate", "up", "down")
"""The pieces of a layer."""
PIECES = {
    "attention_norm.weight": ("attention_norm",), "attention.qkv.weight": ("query", "key", "value"),
    "attention.out.weight": ("out",), "ffn_norm.weight": ("ffn_norm",), "ffn.gate_up.weight": ("gate", "up"),
    "ffn.down.weight": ("down",),
}
"""By the name within a layer of ours: its rows."""
EMBEDDING, NORM, UNEMBEDDING = "embedding.weight", "decoder.norm.weight", "unembedding.weight"


@dataclass(frozen=True)
class Shape:
    """Numbers of a dense model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    norm_epsilon: float
    rope_base: float

    def config(self) -> ModelConfig:
        """A dense model of ours with this shape, its logits as they come. ConfigError: there is none."""
        return ModelConfig(
            kind="dense", vocab_size=self.vocab_size, d_token=self.width, decoder_layers=self.layers,
            heads_token=self.heads, kv_heads_token=self.kv_heads, head_dim=self.head_dim, ffn_token=self.ffn,
            rope_base=self.rope_base, norm_epsilon=self.norm_epsilon, mup=MupConfig(d_base=self.width))

    @property
    def pieces(self) -> dict[str, tuple[int, ...]]:
        """The shape of each piece of a layer."""
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attention_norm": (self.width,), "query": (heads, self.width), "key": (kv_heads, self.width),
            "value": (kv_heads, self.width), "out": (self.width, heads), "ffn_norm": (self.width,),
            "gate": (self.ffn, self.width), "up": (self.ffn, self.width), "down": (self.width, self.ffn),
        }


@dataclass(frozen=True)
class Naming:
    """What a format calls the tensors."""

    layer: str
    """Of a piece of a layer, with {layer} and {piece}."""
    pieces: Mapping[str, str]
    """LAYER in the format's words."""
    embedding: str
    norm: str
    unembedding: str

    def of(self, layer: int, piece: str) -> str:
        return self.layer.format(layer=layer, piece=self.pieces[piece])

    def expected(self, shape: Shape, tied: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by the format's name. tied: the embedding is the unembedding too."""
        table = (shape.vocab_size, shape.width)
        found = {self.embedding: table, self.norm: (shape.width,)}
        if not tied:
            found[self.unembedding] = table
        sizes = shape.pieces
        return found | {self.of(layer, piece): sizes[piece] for layer in range(shape.layers) for piece in LAYER}

    def check(self, place: Path, shape: Shape, tied: bool, found: Mapping[str, tuple[int, ...]],
              unwanted: Mapping[str, str]) -> None:
        """found: shapes by the format's names. unwanted: what endings of names that nobody reads mean. CheckpointError:
        a tensor is left over, missing, or of another shape."""
        expected = self.expected(shape, tied)
        for name in sorted(found.keys() - expected.keys()):
            why = next((why for ending, why in unwanted.items() if name.endswith(ending)),
                       "nothing here reads it, so the model would compute something else without it")
            raise CheckpointError(f"{place}: it has {name}: {why}; take another model")
        if missing := sorted(expected.keys() - found.keys()):
            raise CheckpointError(f"{place}: {missing[0]} is missing"
                                  + (f", and {len(missing) - 1} more tensors" if len(missing) > 1 else "")
                                  + "; fetch the model again, all parts of it")
        for name, size in expected.items():
            if tuple(found[name]) != size:
                raise CheckpointError(f"{place}: {name} has the shape {tuple(found[name])}, and its configuration says "
                                      f"{size}; fetch the model again")

    def get(self, name: str, tied: bool, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor that we call `name`. read: a tensor by the format's name, in any dtype."""
        if name == EMBEDDING or (name == UNEMBEDDING and tied):
            return read(self.embedding).float()
        if name in (NORM, UNEMBEDDING):
            return read(self.norm if name == NORM else self.unembedding).float()
        _, _, layer, within = name.split(".", 3)
        return torch.cat([read(self.of(int(layer), piece)).float() for piece in PIECES[within]])


@dataclass(frozen=True)
class DenseSource:
    """A dense model that lies somewhere."""

    shape: Shape
    tied: bool
    """Whether embedding and unembedding are one matrix there. Here they are two; the second begins as a copy."""
    get: Callable[[str], Tensor]
    """The tensor of a name of ours, fp32, read now."""
    spelling: Spelling
    origin: str
    """Where it is and what it says of itself."""
    longest: int = 0
    """Tokens of the longest row that it computes as full attention does; 0 for no limit."""

    def names(self) -> Iterator[str]:
        """All that `get` answers to."""
        yield from (EMBEDDING, NORM, UNEMBEDDING)
        for layer in range(self.shape.layers):
            yield from (layer_name("decoder", layer, within) for within in PIECES)


def layer_name(stack: str, layer: int, within: str) -> str:
    return f"{stack}.layers.{layer}.{within}"
