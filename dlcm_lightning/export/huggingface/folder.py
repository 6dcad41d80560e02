"""`dlcm export --hf`: a folder that transformers loads without this package, offline.

    OUT/
        config.json, generation_config.json      shapes; which tokens begin and end a text
        configuration_dlcm.py, modeling_dlcm.py  the model, with the files beside them that they import
        model.safetensors                        as `dlcm export` writes it, "model." in front of every name
        tokenizer.json, tokenizer_config.json    BOS is put in front of texts; padding on the left
        README.md, curves.svg                    the model card
        config.yaml, portable.json               of the run: whatever takes an export takes this folder, too

    model = AutoModelForCausalLM.from_pretrained("OUT", trust_remote_code=True)
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dlcm_lightning import __version__
from dlcm_lightning.checkpoint.exported import PREFIX
from dlcm_lightning.config import Config
from dlcm_lightning.data.byte_level import is_control
from dlcm_lightning.data.tokenizer import SETTINGS, TOKENIZER, Tokenizer
from dlcm_lightning.export.huggingface.bundle import modelling_files
from dlcm_lightning.export.huggingface.model_card import CURVES, curves, model_card
from dlcm_lightning.export.portable import SPLIT_BYTES, finish, making, open_trained, rounded, write_state


def export_huggingface(place: str | Path, out: str | Path, *, step: int | None = None,
                       dtype: Literal["fp32", "bf16"] = "fp32", split_bytes: int = SPLIT_BYTES) -> Path:
    """Writes OUT whole or not at all; see `portable.export`."""
    out = Path(out)
    with making(out) as folder:
        trained = open_trained(place, step)
        tokenizer = trained.tokenizer
        state = rounded(trained.state, dtype)
        write_state({PREFIX + name: tensor for name, tensor in state.items()}, folder, split_bytes)
        for name, content in modelling_files(__version__).items():
            (folder / name).write_text(content, encoding="utf-8")
        _write_json(folder / "config.json", _config(trained.config, tokenizer, dtype))
        _write_json(folder / "generation_config.json", _generation(trained.config, tokenizer))
        _write_json(folder / TOKENIZER, _framing(tokenizer))
        _write_json(folder / SETTINGS, _settings(trained.config, tokenizer))
        drawn = curves(trained)
        if drawn:
            (folder / CURVES).write_text(drawn, encoding="utf-8")
        (folder / "README.md").write_text(model_card(trained, out.name, dtype, bool(drawn)), encoding="utf-8")
        finish(folder, trained, dtype)
    return out


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _config(config: Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_dlcm.DLCMConfig", "AutoModelForCausalLM": "modeling_dlcm.DLCMForCausalLM"}
    return {"architectures": ["DLCMForCausalLM"], "model_type": "dlcm", "auto_map": code,
            "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
            "max_position_embeddings": config.data.sequence_length, "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id,
            **asdict(config.model)}


def _generation(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Texts end with EOS, and hold neither BOS nor ids that the tokenizer does not know."""
    never = [tokenizer.bos_id, *range(tokenizer.vocab_size, config.model.vocab_size)]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id,
            "suppress_tokens": never, "do_sample": False}


def _framing(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer with BOS in front of every text, as in training."""
    definition: dict[str, Any] = json.loads(tokenizer.definition)
    for token in definition.get("added_tokens") or []:
        token["special"] = is_control(token)  # only special ones are spelled out in texts
    name, index = tokenizer.begin, tokenizer.bos_id
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}}}
    return definition


def _settings(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """split_special_tokens: a text that spells a control token is spelled out, as in training."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.begin, "eos_token": tokenizer.end,
            "pad_token": tokenizer.end, "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.data.sequence_length, "clean_up_tokenization_spaces": False,
            "split_special_tokens": True}
