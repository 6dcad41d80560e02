"""A .gguf file, the format of llama.cpp: numbers, tokenizer and weights in one file, the weights often quantised.

Read with the `gguf` library (an extra). Quantised weights are taken for the numbers that they stand for, which is what
every runtime computes with. In files of the architecture `llama` the rows of queries and keys are interleaved, since
llama.cpp turns neighbours by a rotary angle; here, and in the models that such files are made from, halves are turned:

    row 2 i + j of a head there  =  row j d / 2 + i of the head here,   i < d / 2,  j < 2

A key of the metadata that is not known may change the function, and is refused by its name.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError, DataError
from dlcm_lightning.upcycling.source import DenseSource, Naming, Shape
from dlcm_lightning.upcycling.spelling import Spelling, completed

NAMING = Naming(
    "blk.{layer}.{piece}.weight",
    {"attention_norm": "attn_norm", "query": "attn_q", "key": "attn_k", "value": "attn_v", "out": "attn_output",
     "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
    "token_embd.weight", "output_norm.weight", "output.weight")
UNWANTED = {
    ".bias": "the matrices of a DLCM have no biases", "attn_q_norm.weight": "a DLCM does not norm the queries and keys "
    "of its self-attention", "attn_k_norm.weight": "a DLCM does not norm the queries and keys of its self-attention",
    "rope_freqs.weight": "only plain rotary angles are computed here, not scaled ones",
}
KNOWN = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base",
}
"""Below `llama.`, where they have a meaning here."""
HARMLESS = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "none", "attention.causal": True}
"""What others have to be, where they are given."""
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _split(digits: str) -> list[dict[str, Any]]:
    pattern = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{REST}"
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, BYTES]


CUTTERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{**BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "llama-bpe": _split(r"\p{N}{1,3}"), "qwen2": _split(r"\p{N}"),
}
"""Where merges stop, by `tokenizer.ggml.pre`."""
NAMED = ("bos", "eos", "unknown", "padding")
CONTROL, USER_DEFINED = 3, 4
"""Kinds of tokens in `tokenizer.ggml.token_type`."""


def read_file(path: Path) -> DenseSource:
    """CheckpointError: no such file, the library is missing, or a model that cannot be had here."""
    try:
        library = importlib.import_module("gguf")
    except ImportError:
        raise CheckpointError(f"{path}: is read with the library gguf, which is not installed; "
                              "pip install 'dlcm-lightning[gguf]'") from None
    try:
        reader = library.GGUFReader(path)
        about = {name: field.contents() for name, field in reader.fields.items()}
        sizes = {tensor.name: tuple(int(one) for one in reversed(tensor.shape)) for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: is no whole .gguf file ({error}); fetch it again") from error
    shape, window = _shape(path, about, sizes)
    tied = NAMING.unembedding not in sizes
    NAMING.check(path, shape, tied, sizes, UNWANTED)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    turned = {NAMING.of(layer, piece): heads for layer in range(shape.layers)
              for piece, heads in (("query", shape.heads), ("key", shape.kv_heads))}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        try:
            numbers = library.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(f"{path}: {name} is stored as {tensor.tensor_type.name}, which the library gguf does "
                                  "not read; take a file of another quantisation") from None
        found = torch.from_numpy(np.array(numbers, dtype=np.float32)).reshape(sizes[name])
        return halves(found, turned[name]) if name in turned else found

    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    named = f", {about['general.name']}" if "general.name" in about else ""
    return DenseSource(shape, tied, lambda name: NAMING.get(name, tied, read), _spelling(path, about),
                       f"{path} (GGUF {', '.join(kinds)}{named})", window)


def halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys (heads d, W) as llama.cpp orders them -> as they are ordered here."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _shape(path: Path, about: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> tuple[Shape, int]:
    """The numbers, and the window of attention, 0 for none."""
    architecture = about.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: general.architecture = {architecture!r}: only 'llama' is read; take a model of "
                              "that architecture")
    given = {name.removeprefix("llama."): value for name, value in about.items() if name.startswith("llama.")}
    for name, value in given.items():
        if name not in KNOWN and HARMLESS.get(name) != value:
            raise CheckpointError(f"{path}: llama.{name} = {value!r}: nothing here computes that; take another model")
    try:
        width, heads = int(given["embedding_length"]), int(given["attention.head_count"])
        head_dim = int(given.get("attention.key_length", width // heads))
        shape = Shape(
            layers=int(given["block_count"]), width=width, heads=heads,
            kv_heads=int(given.get("attention.head_count_kv", heads)), head_dim=head_dim,
            ffn=int(given["feed_forward_length"]), vocab_size=sizes[NAMING.embedding][0],
            norm_epsilon=_shortest(given["attention.layer_norm_rms_epsilon"]),
            rope_base=_shortest(given.get("rope.freq_base", 10_000.0)))
        for name in ("rope.dimension_count", "attention.value_length"):
            if int(given.get(name, head_dim)) != head_dim:
                raise CheckpointError(f"{path}: llama.{name} = {given[name]!r}: it has to be the width of a head, "
                                      f"{head_dim}, here; take another model")
        window = int(given.get("attention.sliding_window", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is not that of a llama model ({error!r}); fetch it again"
                              ) from error
    shape.config()
    return shape, window


def _shortest(number: float) -> float:
    """The number that was meant by one of 32 bits: 1e-05, and not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _spelling(path: Path, about: dict[str, Any]) -> Spelling:
    """The tokenizer, made of the metadata."""
    if (kind := about.get("tokenizer.ggml.model")) != "gpt2":
        return Spelling(None, f"{path}: tokenizer.ggml.model = {kind!r}: only byte-level BPE, 'gpt2', spells "
                              "every text")
    if (cut := about.get("tokenizer.ggml.pre")) not in CUTTERS:
        return Spelling(None, f"{path}: tokenizer.ggml.pre = {cut!r}: where its merges stop is known here of "
                              f"{', '.join(CUTTERS)} only")
    try:
        tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
        named = {which: tokens[about[f"tokenizer.ggml.{which}_token_id"]] for which in NAMED
                 if f"tokenizer.ggml.{which}_token_id" in about}
        begin, end = named["bos"], named["eos"]
        merges = [merge.split(" ") for merge in about["tokenizer.ggml.merges"]]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return Spelling(None, f"{path}: its metadata lacks what makes a tokenizer ({error!r})")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": number, "content": token, **flags, "special": kind == CONTROL}
             for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
             if kind in (CONTROL, USER_DEFINED)]
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTTERS[cut]}, "post_processor": None,
        "decoder": {**BYTES, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": cut == "llama-bpe", "vocab": {token: number for number, token in enumerate(tokens)},
                  "merges": merges},
    }
    text, said = completed(definition, set(named.values()))
    try:
        return Spelling(Tokenizer(text, begin, end), said)
    except DataError as error:
        return Spelling(None, f"{path}: {error}")
