"""The sizes at which a check looks: one axis of a model changes, all else stays.

    token     D over 8, E fixed: encoder, decoder and what connects them
    concept   E over 8, D fixed: the backbone and what reads it
    depth     layers of every stack over 8, widths fixed

The model is a small one of the user's proportions: heads, key-value heads and feed-forward grow with the width as they
do there, sections such as the boundary and muP's are the user's own. Head width is at most 16 and, along a width,
stacks have at most two layers, so that four sizes of an axis are a matter of a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from dlcm_lightning.config import ConfigError, ModelConfig

Axis = Literal["token", "concept", "depth"]
AXES: tuple[Axis, ...] = ("token", "concept", "depth")
MULTIPLES = (1, 2, 4, 8)
LEAST_WIDTH = 64
FIXED_WIDTH = 128
HEAD_DIM = 16
LAYERS, LEAST_LAYERS = 2, 2


@dataclass(frozen=True)
class Size:
    """One model of an axis."""

    axis: Axis
    value: int
    """D, E, or the layers of each stack."""
    model: ModelConfig


def sizes_of(model: ModelConfig, axis: Axis, least: int | None = None) -> Iterator[Size]:
    """least: the smallest width or depth of the axis. ConfigError: a dense model has no concepts; no such width."""
    if axis == "concept" and model.kind == "dense":
        raise ConfigError("--axes concept: a dense model has none; leave it out")
    token, concept = (_fitting(model, stack, FIXED_WIDTH) for stack in ("token", "concept"))
    if axis == "depth":
        for multiple in MULTIPLES:
            layers = multiple * (least or LEAST_LAYERS)
            deep = replace(model, encoder_layers=layers, backbone_layers=layers, decoder_layers=layers)
            yield Size(axis, layers, narrowed(deep, token, concept))
        return
    shallow = replace(model, encoder_layers=min(LAYERS, model.encoder_layers),
                      backbone_layers=min(LAYERS, model.backbone_layers),
                      decoder_layers=min(LAYERS, model.decoder_layers))
    first = _fitting(model, axis, least or LEAST_WIDTH)
    if least is not None and first != least:
        raise ConfigError(f"--least-width {least}: widths of this model's proportions are multiples of "
                          f"{_unit(model, axis)}; take {first}")
    for multiple in MULTIPLES:
        width = multiple * first
        widths = (width, concept) if axis == "token" else (token, width)
        yield Size(axis, width, narrowed(shallow, *widths))


def narrowed(model: ModelConfig, d_token: int, d_concept: int) -> ModelConfig:
    """The model at other widths, in its own proportions."""
    head_dim = min(HEAD_DIM, model.head_dim)
    given: dict[str, Any] = {"d_token": d_token, "d_concept": d_concept, "head_dim": head_dim}
    for stack, width in (("token", d_token), ("concept", d_concept)):
        before, heads = getattr(model, f"d_{stack}"), getattr(model, f"heads_{stack}")
        share = heads // getattr(model, f"kv_heads_{stack}")
        kv_heads = max(1, round(width * heads * model.head_dim / before / head_dim / share))
        given |= {f"kv_heads_{stack}": kv_heads, f"heads_{stack}": kv_heads * share,
                  f"ffn_{stack}": max(1, round(width * getattr(model, f"ffn_{stack}") / before))}
    return replace(model, **given, attention="auto")


def _unit(model: ModelConfig, stack: str) -> int:
    """Widths at which heads come out whole are its multiples, where heads cover the width."""
    share = getattr(model, f"heads_{stack}") // getattr(model, f"kv_heads_{stack}")
    return share * min(HEAD_DIM, model.head_dim)


def _fitting(model: ModelConfig, stack: str, wanted: int) -> int:
    """The least width of the model's proportions that is not below."""
    unit = _unit(model, stack)
    return -(-wanted // unit) * unit
