"""A model of the Hugging Face hub: config.json, and model.safetensors or its parts with an index.

Read with json and safetensors; `transformers` is not needed. Llama, Mistral, Qwen2 and Qwen3 are written in the same
names. config.json is a list of what may differ from a plain LLaMA, so it is read as such: whatever changes the function
and has no counterpart here is refused by its name, before any weight is read. transformers 5 keeps the rotary settings
in `rope_parameters`, before that `rope_theta` and `rope_scaling` stood beside the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlcm_lightning.checkpoint.tensors import DTYPES, Tensors
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.upcycling.source import DenseSource, Naming, Shape
from dlcm_lightning.upcycling.spelling import spelling_of

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
NAMING = Naming(
    "model.layers.{layer}.{piece}.weight",
    {"attention_norm": "input_layernorm", "query": "self_attn.q_proj", "key": "self_attn.k_proj",
     "value": "self_attn.v_proj", "out": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
     "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
UNWANTED = {
    ".bias": "the matrices of a DLCM have no biases", "q_norm.weight": "a DLCM does not norm the queries and keys of "
    "its self-attention", "k_norm.weight": "a DLCM does not norm the queries and keys of its self-attention",
}
WITHOUT_MEANING = ".rotary_emb.inv_freq"
"""Angles, which old versions stored and which follow from rope_theta."""
FUNCTION = {
    "attention_bias": (False, "our matrices have no biases"), "mlp_bias": (False, "our matrices have no biases"),
    "hidden_act": ("silu", "our feed-forward is SwiGLU, with silu"),
    "partial_rotary_factor": (1.0, "all of a head is turned here"),
    "attn_logit_softcapping": (None, "no logits are capped here"),
    "final_logit_softcapping": (None, "no logits are capped here"),
    "attention_multiplier": (None, "attention is scaled by 1 / sqrt(head_dim) here"),
    "query_pre_attn_scalar": (None, "attention is scaled by 1 / sqrt(head_dim) here"),
    "embedding_multiplier": (1.0, "nothing is multiplied there here"),
    "residual_multiplier": (1.0, "nothing is multiplied there here"),
    "logits_scaling": (1.0, "nothing is multiplied there here"),
    "logit_scale": (1.0, "nothing is multiplied there here"),
    "clip_qkv": (None, "nothing is clipped here"), "use_qk_norm": (False, "queries and keys are not normed here"),
    "num_experts": (0, "there are no experts here"), "num_local_experts": (0, "there are no experts here"),
    "quantization_config": (None, "its weights are quantised; take the ones it was made from"),
    "auto_map": (None, "it runs code of its own, which nobody knows here"),
}
"""Fields of config.json by what they have to be, where they are given, and why."""


def read_folder(folder: Path) -> DenseSource:
    """CheckpointError: it is no such folder, or of a model that cannot be had here."""
    about = _config(folder)
    kind = about.get("model_type")
    if kind not in KINDS:
        raise CheckpointError(f"{folder / CONFIG}: model_type = {kind!r}: only {', '.join(KINDS)} are read; take a "
                              "model of one of these")
    for field, (wanted, why) in FUNCTION.items():
        if field in about and about[field] is not None and about[field] != wanted:
            _refuse(folder, field, about[field], why)
    try:
        window, shape = _window(folder, about), _shape(folder, about)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not the configuration of a {kind} model ({error!r}); fetch it "
                              "again") from error
    tied = bool(about.get("tie_word_embeddings", False))
    shape.config()
    stored = _open(folder)
    sizes = {name: _size(folder, stored, name) for name in stored.names() if not name.endswith(WITHOUT_MEANING)}
    if tied and NAMING.unembedding in sizes:
        if not torch.equal(stored.get(NAMING.unembedding), stored.get(NAMING.embedding)):
            _refuse(folder, "tie_word_embeddings", True, f"{NAMING.unembedding} is stored and is not the embedding")
        del sizes[NAMING.unembedding]
    NAMING.check(folder, shape, tied, sizes, UNWANTED)
    return DenseSource(shape, tied, _getter(tied, stored), spelling_of(folder),
                       f"{folder} ({kind} of the Hugging Face hub)", window)


def _refuse(folder: Path, field: str, value: object, why: str) -> None:
    raise CheckpointError(f"{folder / CONFIG}: {field} = {value!r}: {why}; take another model")


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: holds no {CONFIG}; name the folder of a Hugging Face model, a .gguf file, an "
                              "export or a run of ours") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG}: holds a {type(found).__name__}; fetch it again")
    return found


def _shape(folder: Path, about: dict[str, Any]) -> Shape:
    heads = int(about["num_attention_heads"])
    width = int(about["hidden_size"])
    return Shape(
        layers=int(about["num_hidden_layers"]), width=width, heads=heads,
        kv_heads=int(about.get("num_key_value_heads") or heads), head_dim=int(about.get("head_dim") or width // heads),
        ffn=int(about["intermediate_size"]), vocab_size=int(about["vocab_size"]),
        norm_epsilon=float(about.get("rms_norm_eps", 1e-6)), rope_base=_rope_base(folder, about))


def _rope_base(folder: Path, about: dict[str, Any]) -> float:
    """The base of the rotary angles, where there is nothing else to them."""
    base = about.get("rope_theta", 10_000.0)
    for field in ("rope_scaling", "rope_parameters"):
        given = about.get(field) or {}
        rotary = given.get("rope_type", given.get("type", "default"))
        if rotary != "default" or any(isinstance(one, dict) for one in given.values()):
            _refuse(folder, field, given, "only plain rotary angles are computed here, not scaled ones")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            _refuse(folder, field, given, "all of a head is turned here")
        base = given.get("rope_theta", base)
    return float(base)


def _window(folder: Path, about: dict[str, Any]) -> int:
    """Tokens that attention is cut to, 0 for all that come before."""
    kinds = set(about.get("layer_types") or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        _refuse(folder, "layer_types", other, "only causal softmax attention is computed here")
    used = "sliding_attention" in kinds if kinds else about.get("use_sliding_window", True)
    usual = 4096 if about.get("model_type") == "mistral" else 0  # what its configuration has where a file is silent
    return int(about.get("sliding_window", usual) or 0) if used else 0


def _open(folder: Path) -> Tensors:
    if (folder / INDEX).is_file():
        try:
            parts = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX}: cannot be read ({error!r}); fetch it again") from error
    else:
        parts = [WHOLE]
    for part in parts:
        if not (folder / part).is_file():
            pickled = next(folder.glob("pytorch_model*.bin"), None)
            raise CheckpointError(f"{folder}: {part} is missing; " + (
                f"{pickled.name} would have to be unpickled, which can run code: convert it to safetensors "
                "(save_pretrained of transformers does)" if pickled else "fetch the model again, all parts of it"))
    try:
        return Tensors(folder / part for part in parts)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: {error}; fetch the model again") from error


def _size(folder: Path, stored: Tensors, name: str) -> tuple[int, ...]:
    try:
        return tuple(stored.shape(name)[0])
    except KeyError as error:
        raise CheckpointError(f"{folder}: {name} is stored as {error}, and only {', '.join(DTYPES)} are read; take "
                              "weights that are not quantised") from None


def _getter(tied: bool, stored: Tensors) -> Callable[[str], Tensor]:
    return lambda name: NAMING.get(name, tied, stored.get)
