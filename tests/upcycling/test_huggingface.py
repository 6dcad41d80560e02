"""Folders of the hub: the same logits as transformers gives, and what cannot be had refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlcm_lightning.errors import CheckpointError, ConfigError
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.upcycling.open_source import open_source
from dlcm_lightning.upcycling.upcycle import dense_model
from tests.synthetic import VOCABULARY
from tests.upcycling.conftest import Folder, change
from tests.upcycling.plain_llama import plain_llama

ROUNDED, EXACT = 1e-5, 1e-9
"""Of the largest logit, in float32 and in float64."""
TOKENS = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))


def ours(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = dense_model(open_source(path), dtype)
    with torch.no_grad():
        return model.logits(model(TOKENS, Segments.from_lengths([len(TOKENS)])).hidden)


def theirs(path: Path, **given: Any) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **given).eval()
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(("kind", "given"), [
    ("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Llama", {"head_dim": 12}),
    ("Mistral", {"sliding_window": None}), ("Mistral", {"tie_word_embeddings": True, "sliding_window": 512}),
])
def test_logits_are_those_of_transformers_and_of_the_equations(hub: Folder, kind: str, given: dict[str, Any]) -> None:
    """transformers computes norms and angles in float32 whatever it is asked for, the equations in float64."""
    folder = hub(kind, **given)
    assert far(ours(folder), theirs(folder)) < ROUNDED
    assert far(ours(folder, torch.float64), plain_llama(folder, TOKENS)) < EXACT
    assert open_source(folder).tied == bool(given.get("tie_word_embeddings"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_exactly(hub: Folder, dtype: torch.dtype) -> None:
    folder = hub(dtype=dtype)
    stored = load_file(folder / "model.safetensors")
    found = open_source(folder).get("decoder.layers.1.ffn.gate_up.weight")
    expected = [stored[f"model.layers.1.mlp.{piece}_proj.weight"] for piece in ("gate", "up")]
    assert found.dtype == torch.float32 and torch.equal(found, torch.cat(expected).to(torch.float32))
    assert far(ours(folder), theirs(folder)) < ROUNDED


def test_parts_with_an_index_are_read_together(llama: Path, tmp_path: Path) -> None:
    folder = change(llama, tmp_path / "parts")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    where = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: state[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert torch.equal(ours(folder), ours(llama))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing; fetch"):
        open_source(folder)


def test_the_base_of_the_angles_is_found_where_old_and_new_versions_write_it(llama: Path, tmp_path: Path) -> None:
    new = change(llama, tmp_path / "new", rope_theta=None,
                 rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    old = change(llama, tmp_path / "old", rope_parameters=None, rope_theta=5000.0, rope_scaling=None)
    none = change(llama, tmp_path / "none", rope_parameters=None, rope_theta=None)
    assert [open_source(one).shape.rope_base for one in (new, old, none)] == [5000.0, 5000.0, 10_000.0]


@pytest.mark.parametrize(("fields", "said"), [
    ({"model_type": "gemma3"}, "model_type = 'gemma3': only llama, mistral, qwen2, qwen3 are read"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters = .*llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear.*not scaled ones"),
    ({"rope_parameters": {"full": {"rope_type": "default"}}}, "rope_parameters = "),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
    ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5}}, "rope_parameters = .*all of a head"),
    ({"attention_bias": True}, "attention_bias = True: our matrices have no biases"),
    ({"mlp_bias": True}, "mlp_bias = True"), ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0"),
    ({"logits_scaling": 8.0}, r"logits_scaling = 8\.0"), ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"num_local_experts": 8}, "num_local_experts = 8"), ({"auto_map": {"AutoModel": "x"}}, "auto_map"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .*quantised"),
    ({"layer_types": ["linear_attention"]}, r"layer_types = \['linear_attention'\]"),
    ({"num_hidden_layers": 5}, r"model\.layers\.4\.input_layernorm\.weight is missing, and 8 more"),
    ({"num_hidden_layers": 3}, r"it has model\.layers\.3\.input_layernorm\.weight: nothing here reads it"),
    ({"intermediate_size": 40}, r"mlp\.gate_proj\.weight has the shape \(48, 32\).*\(40, 32\)"),
    ({"hidden_size": None}, "not the configuration of a llama model"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True: .*is stored and is not the embedding"),
])
def test_what_changes_the_function_is_refused_by_its_name(llama: Path, tmp_path: Path, fields: dict[str, Any],
                                                          said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as refusal:
        open_source(change(llama, tmp_path / "changed", **fields))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
                                   "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "vocab_size"])
@pytest.mark.parametrize("value", ["linear", [1], {"a": {"b": 1}}, -1, 0, 3, True], ids=str)
def test_a_field_of_any_type_is_read_or_refused_with_words(llama: Path, tmp_path: Path, field: str, value: object
                                                           ) -> None:
    try:
        open_source(change(llama, tmp_path / "out", **{field: value}))
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)


def test_a_mistral_that_says_no_window_has_that_of_its_configuration(hub: Folder, tmp_path: Path) -> None:
    path = hub("Mistral", sliding_window=32)
    assert open_source(path).longest == 32
    assert open_source(change(path, tmp_path / "silent", sliding_window=None)).longest == 4096


@pytest.mark.parametrize(("kind", "said"), [
    ("Qwen2", r"it has model\.layers\.0\.self_attn\.k_proj\.bias: the matrices of a DLCM have no biases"),
    ("Qwen3", r"self_attn\.k_norm\.weight: a DLCM does not norm the queries and keys"),
])
def test_biases_of_qwen2_and_norms_of_qwen3_are_refused_by_their_names(hub: Folder, kind: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_source(hub(kind))


def test_what_is_no_folder_of_a_model_is_said(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        open_source(tmp_path)
    pickled = change(llama, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin would have to be unpickled.*convert it to"):
        open_source(pickled)
    (pickled / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_source(pickled)
    (pickled / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_source(pickled)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is no \.gguf file"):
        open_source(tmp_path / "weights.bin")
