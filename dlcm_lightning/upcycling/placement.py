"""Which layer of a dense model goes where in a model of ours, and what is refused.

A DLCM whose cross-attention writes nothing is its encoder's layers and then its decoder's: a dense model. So

    encoder     the source's first layers
    decoder     its last ones, and its final norm
    backbone    copies of layers from the source's middle, spread evenly; widened where the backbone is wider
    W_up        the identity, stacked where the backbone is wider
    out         of the cross-attention: zero, so that the first loss is the source's; its gradient is not zero

and norms, boundary and the rest of the cross-attention as they always begin (model/mup.py). A backbone that is no whole
multiple of the source begins so too. Layers between encoder and decoder have no place at token rate: they are left out
only where that is asked for, since the first loss is another one then.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config import Config, ConfigError, ModelConfig
from dlcm_lightning.upcycling.source import DenseSource, Shape

FIELDS = {
    "vocab_size": "vocab_size", "d_token": "width", "heads_token": "heads", "kv_heads_token": "kv_heads",
    "head_dim": "head_dim", "ffn_token": "ffn", "norm_epsilon": "norm_epsilon", "rope_base": "rope_base",
}
"""Of the model, by those of the source that they have to equal."""


@dataclass(frozen=True)
class Placement:
    """Layers of the source by number."""

    encoder: tuple[int, ...]
    backbone: tuple[int, ...]
    """Empty where it is made anew."""
    decoder: tuple[int, ...]
    times: int = 1
    """The backbone's width over the source's."""
    units: int = 1
    """Units of its feed-forward over the source's."""
    why_made: str = ""
    """Why the backbone is made anew; empty where it is not."""

    def skipped(self, layers: int) -> list[int]:
        """Layers of the source that are neither in the encoder nor in the decoder."""
        return sorted(set(range(layers)) - {*self.encoder, *self.decoder})


def place_layers(source: DenseSource, config: Config, skip_layers: bool) -> Placement:
    """ConfigError: the model does not fit the source."""
    model, shape = config.model, source.shape
    for field, theirs in FIELDS.items():
        ours, wanted = getattr(model, field), getattr(shape, theirs)
        if ours != wanted:
            raise ConfigError(f"model.{field} = {ours!r}: the source has {wanted!r}; write that")
    if model.mup.depth_exponent:
        raise ConfigError(f"model.mup.depth_exponent = {model.mup.depth_exponent:g}: residual branches of the source "
                          "are added as they are; write 0")
    if source.longest and config.data.sequence_length > source.longest:
        raise ConfigError(f"data.sequence_length = {config.data.sequence_length}: the source attends to the last "
                          f"{source.longest} tokens (sliding_window) and our models to all; write at most that")
    layers = shape.layers
    if model.kind == "dense":
        if model.decoder_layers != layers:
            raise ConfigError(f"model.decoder_layers = {model.decoder_layers}: the source has {layers}; write that")
        return Placement((), (), tuple(range(layers)))
    used = model.encoder_layers + model.decoder_layers
    if used > layers:
        raise ConfigError(f"model.encoder_layers + model.decoder_layers = {used}: the source has {layers}; write no "
                          "more than that together")
    encoder, decoder = range(model.encoder_layers), range(layers - model.decoder_layers, layers)
    if used < layers and not skip_layers:
        raise ConfigError(f"model.encoder_layers + model.decoder_layers = {used}: the source has {layers}, and its "
                          f"layers {model.encoder_layers} to {layers - model.decoder_layers - 1} would be left out, so "
                          "the first loss would not be its own; write as many as it has, or ask for it with "
                          "--skip-layers")
    times, units, why = _multiples(model, shape)
    middle = () if why else spread(model.backbone_layers, layers)
    return Placement(tuple(encoder), middle, tuple(decoder), times, units, why)


def _multiples(model: ModelConfig, shape: Shape) -> tuple[int, int, str]:
    """Of the backbone's width and units over the source's; or why it is no multiple."""
    times, units = model.d_concept // shape.width, model.ffn_concept // shape.ffn
    wanted = {"d_concept": times * shape.width, "heads_concept": times * shape.heads,
              "kv_heads_concept": times * shape.kv_heads, "ffn_concept": units * shape.ffn}
    for field, value in wanted.items():
        if getattr(model, field) != value or not value:
            return 1, 1, (f"model.{field} = {getattr(model, field)} is not what a multiple of the source has: width "
                          f"{shape.width}, {shape.heads} heads, {shape.kv_heads} key-value heads, {shape.ffn} units")
    if model.backbone_layers > shape.layers:
        return 1, 1, f"model.backbone_layers = {model.backbone_layers} is more than the source's {shape.layers}"
    return times, units, ""


def spread(wanted: int, layers: int) -> tuple[int, ...]:
    """So many layers, evenly over the middle half of `layers`; over more of the middle where the half is too few."""
    span = max(wanted, layers // 2)
    return tuple((layers - span) // 2 + (2 * number + 1) * span // (2 * wanted) for number in range(wanted))
