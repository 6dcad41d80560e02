"""Files of llama.cpp: the numbers that they stand for, rows of queries and keys turned back, the tokenizer rebuilt."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.upcycling.gguf import NAMING, halves
from dlcm_lightning.upcycling.huggingface import NAMING as HUB
from dlcm_lightning.upcycling.open_source import open_source
from dlcm_lightning.upcycling.source import LAYER
from dlcm_lightning.upcycling.upcycle import dense_model
from tests.upcycling.conftest import FFN, HEADS, KV_HEADS, LAYERS, Folder
from tests.upcycling.test_huggingface import ROUNDED, far, ours, theirs

library = pytest.importorskip("gguf")
Write = Callable[..., Path]


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As the converter of llama.cpp writes queries and keys: within a head, neighbours are a pair."""
    grouped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return grouped.swapaxes(1, 2).reshape(rows.shape)


def write(hub: Path, path: Path, kind: str = "F32", settings: dict[str, Any] | None = None,
          extra: dict[str, np.ndarray] | None = None, architecture: str = "llama", pre: str = "gpt-2") -> Path:
    """A folder of the hub as a .gguf file. kind: of the matrices. settings: of the writer's methods, by name."""
    about = json.loads((hub / "config.json").read_text())
    state = {name: tensor.float().numpy() for name, tensor in load_file(hub / "model.safetensors").items()}
    writer = library.GGUFWriter(path, architecture)
    given: dict[str, Any] = {
        "block_count": about["num_hidden_layers"], "context_length": 512, "embedding_length": about["hidden_size"],
        "feed_forward_length": about["intermediate_size"], "head_count": about["num_attention_heads"],
        "head_count_kv": about["num_key_value_heads"], "layer_norm_rms_eps": about["rms_norm_eps"],
        "rope_freq_base": about["rope_parameters"]["rope_theta"], "vocab_size": about["vocab_size"],
        "rope_dimension_count": about["head_dim"], **(settings or {})}
    for name, value in given.items():
        getattr(writer, f"add_{name}")(value)
    definition = json.loads((hub / "tokenizer.json").read_text())
    vocabulary = sorted(definition["model"]["vocab"].items(), key=lambda one: one[1])
    controls = {token["content"] for token in definition["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in controls else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {HUB.embedding: NAMING.embedding, HUB.norm: NAMING.norm, HUB.unembedding: NAMING.unembedding}
    names |= {HUB.of(layer, piece): NAMING.of(layer, piece) for layer in range(LAYERS) for piece in LAYER}
    heads = {"q_proj": about["num_attention_heads"], "k_proj": about["num_key_value_heads"]}
    for name, numbers in state.items():
        for piece, count in heads.items():
            numbers = interleaved(numbers, count) if piece in name else numbers
        stored = library.GGMLQuantizationType[kind if numbers.ndim > 1 else "F32"]
        writer.add_tensor(names[name], library.quants.quantize(np.ascontiguousarray(numbers), stored), raw_dtype=stored)
    for name, numbers in (extra or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def wide(hub: Folder) -> Path:
    """All widths a multiple of 32, the block of quantised types."""
    return hub(hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_the_folder_computes_that_it_was_made_from(hub: Folder, tmp_path: Path, tied: bool) -> None:
    folder = hub(tie_word_embeddings=tied)
    file = write(folder, tmp_path / "a.gguf")
    assert open_source(file).tied == tied
    assert torch.equal(ours(file), ours(folder))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_numbers_are_those_that_quantised_ones_stand_for(wide: Path, tmp_path: Path, kind: str) -> None:
    file = write(wide, tmp_path / "a.gguf", kind)
    stored = library.GGMLQuantizationType[kind]
    state = load_file(wide / "model.safetensors")
    found = open_source(file)
    for layer in (0, LAYERS - 1):
        qkv = found.get(f"decoder.layers.{layer}.attention.qkv.weight")
        for piece, heads, rows in zip(("query", "key"), (4, 2), qkv.split([64, 32, 32])[:2], strict=True):
            written = library.quants.quantize(interleaved(state[HUB.of(layer, piece)].numpy(), heads), stored)
            meant = torch.from_numpy(library.quants.dequantize(written, stored))
            assert torch.equal(torch.from_numpy(interleaved(rows.numpy(), heads)), meant.float())
        assert found.get(f"decoder.layers.{layer}.ffn.down.weight").dtype == torch.float32
    size = state["lm_head.weight"].abs().max()
    assert 0 < (found.get("unembedding.weight") - state["lm_head.weight"]).abs().max() < 0.2 * size


def test_logits_are_those_that_transformers_finds_in_the_file(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    file = write(wide, tmp_path / "a.gguf", "Q8_0")
    assert far(ours(file), theirs(tmp_path, gguf_file="a.gguf")) < ROUNDED


def test_rows_that_are_not_turned_back_give_other_logits(wide: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(wide, tmp_path / "a.gguf")
    monkeypatch.setattr(sys.modules["dlcm_lightning.upcycling.gguf"], "halves", lambda rows, heads: rows)
    assert far(ours(file), ours(wide)) > 100 * ROUNDED


def test_turning_back_undoes_what_llama_cpp_does() -> None:
    rows = torch.randn(24, 5)
    assert torch.equal(halves(torch.from_numpy(interleaved(rows.numpy(), 3)), 3), rows)


def test_the_tokenizer_is_that_of_the_file(llama: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["It's 2 + 23 = 25, don't\n\n  you see?", "天地 ¼ \t\tx"]
    found = open_source(write(llama, tmp_path / "a.gguf")).spelling
    assert found.said == "" and found.tokenizer is not None
    assert (found.tokenizer.bos_id, found.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for ids in found.tokenizer.encode_documents(texts):
        assert found.tokenizer.decode(ids[1:-1]) in texts
    for pre in ("smollm", "llama-bpe", "qwen2"):
        assert open_source(write(llama, tmp_path / f"{pre}.gguf", pre=pre)).spelling.tokenizer is not None
    unknown = open_source(write(llama, tmp_path / "b.gguf", pre="viking")).spelling
    assert unknown.tokenizer is None and "tokenizer.ggml.pre = 'viking'" in unknown.said
    other = open_source(write(llama, tmp_path / "c.gguf", settings={"tokenizer_model": "llama"})).spelling
    assert other.tokenizer is None or other.said == ""


@pytest.mark.parametrize(("given", "said"), [
    ({"architecture": "qwen2"}, "general.architecture = 'qwen2': only 'llama' is read"),
    ({"settings": {"rope_dimension_count": 4}}, r"llama\.rope\.dimension_count = 4: .*width of a head, 8"),
    ({"settings": {"rope_scaling_factor": 2.0}}, r"llama\.rope\.scaling\.factor = 2\.0: nothing here computes that"),
    ({"settings": {"expert_count": 8}}, r"llama\.expert_count = 8"),
    ({"settings": {"block_count": 3}}, r"it has blk\.3\.attn_k\.weight: nothing here reads it"),
    ({"settings": {"block_count": 5}}, r"blk\.4\.attn_k\.weight is missing, and 8 more"),
    ({"extra": {"blk.0.attn_q.bias": np.zeros(32, np.float32)}}, r"attn_q\.bias: the matrices of a DLCM have no"),
    ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, r"rope_freqs\.weight: only plain rotary angles"),
])
def test_what_changes_the_function_is_refused_by_its_name(llama: Path, tmp_path: Path, given: dict[str, Any],
                                                          said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_source(write(llama, tmp_path / "a.gguf", **given))


def test_what_is_no_whole_file_is_said_and_so_is_a_missing_library(llama: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(llama, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUX" + b"\0" * 40)
    (tmp_path / "c.gguf").write_bytes(file.read_bytes()[:-FFN * 4])
    for name in ("b.gguf", "c.gguf"):
        with pytest.raises(CheckpointError, match=r"is no whole \.gguf file"):
            open_source(tmp_path / name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'dlcm-lightning\[gguf\]'"):
        open_source(file)


def test_a_model_of_it_is_made_of_one_tensor_at_a_time(llama: Path, tmp_path: Path) -> None:
    model = dense_model(open_source(write(llama, tmp_path / "a.gguf", "F16")))
    assert model.config.heads_token == HEADS and model.config.kv_heads_token == KV_HEADS
