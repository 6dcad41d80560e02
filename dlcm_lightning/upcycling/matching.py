"""`dlcm upcycle SOURCE --show`: the `model:` section of a DLCM that the source fits, to be pasted into a run file.

The halves of the source become encoder and decoder, half as many of its layers the backbone, at the same width. Base
rates hold at the source's own width (`mup.d_base`), so that s = 1 and rates are what they are written to be.
"""

from __future__ import annotations

from collections.abc import Iterator

from dlcm_lightning.upcycling.source import DenseSource


def matching_section(source: DenseSource) -> Iterator[str]:
    """Lines of YAML."""
    shape = source.shape
    encoder = -(-shape.layers // 2)
    yield f"# {source.origin}"
    yield f"# {shape.layers} layers; embedding and unembedding {'tied' if source.tied else 'two matrices'}; " + (
        f"tokenizer of {source.spelling.tokenizer.vocab_size} ids" if source.spelling.tokenizer else "no tokenizer")
    if source.spelling.said:
        yield f"# {source.spelling.said}"
    if source.longest:
        yield f"# data.sequence_length: at most {source.longest}, its sliding window"
    yield "model:"
    for field, value in (
        ("kind", "dlcm"), ("vocab_size", shape.vocab_size), ("d_token", shape.width), ("d_concept", shape.width),
        ("encoder_layers", encoder), ("backbone_layers", max(1, shape.layers // 2)),
        ("decoder_layers", max(1, shape.layers - encoder)), ("heads_token", shape.heads),
        ("kv_heads_token", shape.kv_heads), ("heads_concept", shape.heads), ("kv_heads_concept", shape.kv_heads),
        ("head_dim", shape.head_dim), ("ffn_token", shape.ffn), ("ffn_concept", shape.ffn),
        ("rope_base", _plain(shape.rope_base)), ("norm_epsilon", _plain(shape.norm_epsilon)),
    ):
        yield f"  {field}: {value}"
    yield "  boundary: {target_ratio: 4.0}"
    yield f"  mup: {{d_base: {shape.width}, sigma: {_plain(round(shape.width**-0.5, 6))}}}"


def _plain(number: float) -> str:
    """As YAML reads a number: with a point."""
    mantissa, e, exponent = repr(number).partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
