"""What is written: its first loss is the source's, its parts come from where the report says, all of it or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.cli import main
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError, MupConfig
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export import portable
from dlcm_lightning.export.portable import about, export, load_model, load_state
from dlcm_lightning.model import mup
from dlcm_lightning.model.dlcm import assemble
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.upcycling import filling
from dlcm_lightning.upcycling.filling import OUT, UP
from dlcm_lightning.upcycling.open_source import open_source
from dlcm_lightning.upcycling.placement import spread
from dlcm_lightning.upcycling.spelling import completed, spelling_of
from dlcm_lightning.upcycling.upcycle import Upcycled, dense_model, upcycle
from tests.upcycling.conftest import FFN, HEADS, KV_HEADS, LAYERS, WIDTH, Folder, change, with_model

HOST = torch.device("cpu")
SAME = 1e-6
"""Relative, of two losses in float32."""
WIDE = {"d_concept": 2 * WIDTH, "heads_concept": 2 * HEADS, "kv_heads_concept": 2 * KV_HEADS, "ffn_concept": 3 * FFN}


def loss(folder: Path) -> float:
    return Probe(Tokenizer.load(folder)).fingerprint(load_model(folder), HOST).loss


def part(done: Upcycled, name: str) -> list[str]:
    return [line for line in done.report if line.startswith(f"{name} ")]


@pytest.mark.parametrize(("encoder", "decoder"), [(2, 2), (1, 3), (3, 1)])
def test_the_first_loss_of_a_dlcm_is_that_of_the_source(llama: Path, target: Config, tmp_path: Path, encoder: int,
                                                        decoder: int) -> None:
    source = open_source(llama)
    config = with_model(target, encoder_layers=encoder, decoder_layers=decoder)
    done = upcycle(source, config, tmp_path / "out")
    expected = Probe(Tokenizer.load(llama)).fingerprint(dense_model(source), HOST).loss
    assert done.source_loss == expected
    assert done.loss == pytest.approx(expected, rel=SAME) == loss(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "config.yaml", "model.safetensors", "portable.json", "tokenizer.json", "tokenizer_config.json"]
    assert about(tmp_path / "out")["upcycled"]["source_loss"] == expected
    assert not list(tmp_path.glob(".*unfinished"))


@pytest.mark.parametrize("fields", [{}, WIDE, {"d_concept": 48, "ffn_concept": 40}, {"backbone_layers": 7}])
def test_any_width_at_which_rates_hold_and_any_backbone_give_the_same_first_loss(
        llama: Path, target: Config, tmp_path: Path, fields: dict[str, int]) -> None:
    config = with_model(target, mup=MupConfig(d_base=16), **fields)
    assert config.model.s_token == 2.0
    done = upcycle(open_source(llama), config, tmp_path / "out")
    assert done.loss == pytest.approx(done.source_loss, rel=SAME)


def test_every_part_is_what_the_report_says(llama: Path, target: Config, tmp_path: Path) -> None:
    source = open_source(llama)
    done = upcycle(source, with_model(target, mup=MupConfig(d_base=16)), tmp_path / "out", seed=5)
    state = load_state(tmp_path / "out")
    fresh = mup_state(with_model(target, mup=MupConfig(d_base=16)), seed=5)
    for place, layer in enumerate((0, 1)):
        for stack, first in (("encoder", 0), ("decoder", 2), ("backbone", 1)):
            for within in ("attention.qkv.weight", "ffn_norm.weight"):
                assert torch.equal(state[f"{stack}.layers.{place}.{within}"],
                                   source.get(f"decoder.layers.{layer + first}.{within}"))
    assert torch.equal(state["unembedding.weight"], 2 * source.get("unembedding.weight"))
    assert torch.equal(state["decoder.norm.weight"], source.get("decoder.norm.weight"))
    assert not state[OUT].any() and torch.equal(state[UP], torch.eye(WIDTH))
    for name in ("cross_attention.key.weight", "cross_attention.query.weight", "boundary.query.weight",
                 "backbone.norm.weight", "boundary.rate_bias"):
        assert torch.equal(state[name], fresh[name]), name
    assert part(done, "backbone")[0].endswith("copied from layers 1-2")
    counted = sum(int(re.findall(r" ([\d,]+)  ", line)[0].replace(",", "")) for line in done.report)
    assert counted == sum(one.numel() for one in load_model(tmp_path / "out").parameters())


def mup_state(config: Config, seed: int) -> dict[str, torch.Tensor]:
    model = assemble(config.model, torch.float32, "sdpa")
    mup.initialise(model, config.model, seed)
    return dict(model.state_dict())


def test_a_wider_backbone_is_widened_and_another_is_made(llama: Path, target: Config, tmp_path: Path) -> None:
    wide = upcycle(open_source(llama), with_model(target, **WIDE), tmp_path / "wide")
    assert part(wide, "backbone")[0].endswith("widened (width x 2, units x 3) from layers 1-2")
    assert torch.equal(load_state(tmp_path / "wide")[UP], torch.cat([torch.eye(WIDTH)] * 2))
    made = upcycle(open_source(llama), with_model(target, ffn_concept=FFN + 1), tmp_path / "made")
    assert "nothing is taken over: model.ffn_concept = 49" in part(made, "backbone")[0]


def test_a_dense_model_of_ours_takes_all_and_is_a_source_itself(llama: Path, target: Config, tmp_path: Path) -> None:
    dense = with_model(target, kind="dense", decoder_layers=LAYERS, mup=MupConfig(d_base=8))
    first = upcycle(open_source(llama), dense, tmp_path / "dense")
    again = upcycle(open_source(tmp_path / "dense"), target, tmp_path / "dlcm")
    assert again.loss == pytest.approx(first.source_loss, rel=SAME) == first.loss
    with pytest.raises(CheckpointError, match=r"model\.kind = 'dlcm': a DLCM is no dense model; .*train\.init_from"):
        open_source(tmp_path / "dlcm")


def test_a_run_of_ours_is_a_source(target: Config, tmp_path: Path) -> None:
    config = with_model(target, kind="dense", decoder_layers=LAYERS, mup=MupConfig(d_base=8))
    pretrain(config, lambda _: None)
    run = Path(config.train.output_dir) / config.name
    done = upcycle(open_source(run), target, tmp_path / "out")
    assert done.loss == pytest.approx(loss(export(run, tmp_path / "export")), rel=SAME)


def test_layers_are_left_out_only_where_that_is_asked_for(llama: Path, target: Config, tmp_path: Path) -> None:
    config, source = with_model(target, encoder_layers=1), open_source(llama)
    with pytest.raises(ConfigError, match=r"= 3: the source has 4, and its layers 1 to 1 would be left out.*--skip"):
        upcycle(source, config, tmp_path / "out")
    done = upcycle(source, config, tmp_path / "out", skip_layers=True)
    assert done.report[-1].endswith("layer 1 at token rate: the first loss is not the source's")
    assert done.loss != pytest.approx(done.source_loss, rel=1e-3)


@pytest.mark.parametrize(("fields", "said"), [
    ({"vocab_size": 400}, "model.vocab_size = 400: the source has 360"),
    ({"d_token": 64, "heads_token": 8}, "model.d_token = 64: the source has 32"),
    ({"heads_token": 8}, "model.heads_token = 8: the source has 4"),
    ({"kv_heads_token": 4}, "model.kv_heads_token = 4: the source has 2"),
    ({"head_dim": 16}, "model.head_dim = 16: the source has 8"), ({"ffn_token": 64}, "model.ffn_token = 64: .* 48"),
    ({"norm_epsilon": 1e-6}, "model.norm_epsilon = 1e-06: the source has 1e-05"),
    ({"rope_base": 1e4}, r"model.rope_base = 10000\.0: the source has 5000\.0"),
    ({"encoder_layers": 3}, r"model.encoder_layers \+ model.decoder_layers = 5: the source has 4"),
    ({"kind": "dense"}, "model.decoder_layers = 2: the source has 4"),
])
def test_what_does_not_fit_is_refused_by_field_and_value(llama: Path, target: Config, tmp_path: Path,
                                                         fields: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        upcycle(open_source(llama), with_model(target, **fields), tmp_path / "out", skip_layers=True)
    assert not list(tmp_path.glob("*out*"))


def test_a_window_shorter_than_the_rows_is_refused(hub: Folder, target: Config, tmp_path: Path) -> None:
    source = open_source(hub("Mistral", sliding_window=32))
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 64: the source attends to the last 32"):
        upcycle(source, target, tmp_path / "out")
    upcycle(source, replace(target, data=replace(target.data, sequence_length=32)), tmp_path / "out")


@pytest.mark.parametrize(("name", "change"), [
    ("unembedding.weight", lambda value: value / 2), (OUT, torch.ones_like),
    ("encoder.layers.1.attention.qkv.weight", lambda value: value.flip(0)),
])
def test_a_mistake_is_noticed_by_what_is_computed_and_nothing_is_left(
        llama: Path, target: Config, tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """No fold of the logits' scale, a cross-attention that adds something, rows in another order."""
    honest = filling.Filling._write

    def mistaken(self: filling.Filling, target: str, value: torch.Tensor) -> int:
        return honest(self, target, change(value) if target == name else value)

    monkeypatch.setattr(filling.Filling, "_write", mistaken)
    with pytest.raises(CheckpointError, match="not written, for its loss on the probe texts would be"):
        upcycle(open_source(llama), with_model(target, mup=MupConfig(d_base=16)), tmp_path / "out")
    assert not [one for one in tmp_path.iterdir() if "out" in one.name]


def test_what_is_half_written_never_has_the_name(llama: Path, target: Config, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.unfinished").exists()
        raise OSError("no space left")

    monkeypatch.setattr(portable, "save_config", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(no space left\)"):
        upcycle(open_source(llama), target, tmp_path / "out")
    assert not [one for one in tmp_path.iterdir() if "out" in one.name]
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        upcycle(open_source(llama), target, tmp_path / "out")


def test_the_middle_is_spread_evenly() -> None:
    assert spread(8, 30) == (7, 9, 11, 13, 15, 17, 19, 21)
    assert spread(15, 30) == tuple(range(7, 22)) and spread(30, 30) == tuple(range(30)) and spread(1, 4) == (2,)


def test_bytes_that_a_vocabulary_lacks_take_ids_of_control_tokens(llama: Path, tmp_path: Path) -> None:
    folder = change(llama, tmp_path / "lacking")
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    name = next(token for token in vocabulary if token == "\u0104")  # the sign of byte 0x04
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary["<gh_stars>"] = number = vocabulary.pop(name)
    definition["added_tokens"].append({"id": number, "content": "<gh_stars>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    found = spelling_of(folder)
    assert found.tokenizer is not None and "(0x04) take the ids of control tokens" in found.said
    assert [number] == found.tokenizer.encode_documents(["\x04"])[0][1:-1].tolist()
    assert completed(definition, {"<gh_stars>", "<s>", "</s>"})[1] == ""
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<gh_stars>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    kept = spelling_of(folder)
    assert kept.tokenizer is None and "lacks 1 of the 256 bytes (0x04)" in kept.said


def test_the_command_shows_writes_and_refuses(llama: Path, target: Config, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    save_config(target, run)
    assert main(["upcycle", str(llama), "--show"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "model.yaml").write_text(shown)
    model = yaml.safe_load(shown)["model"]
    assert (model["encoder_layers"], model["backbone_layers"], model["decoder_layers"]) == (2, 2, 2)
    (tmp_path / "fits.yaml").write_text("base: [model]\nname: fits\ndata: {sources: [{name: a, domain: d, weight: 1}]}")
    assert load_config(tmp_path / "fits.yaml").model.rope_base == 5000.0
    assert main(["upcycle", str(llama), str(tmp_path / "out"), "--config", str(tmp_path / "fits.yaml"),
                 "data.sequence_length=64"]) == 0
    said = capsys.readouterr().out
    losses = re.findall(r"(\d\.\d{6}) (?:nats|of)", said)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert main(["upcycle", str(llama), str(tmp_path / "other"), "--config", str(run), "model.ffn_token=64"]) == 2
    assert "model.ffn_token = 64: the source has 48" in capsys.readouterr().err
    for wrong in (["upcycle", str(llama)], ["upcycle", str(llama), str(tmp_path / "other")],
                  ["upcycle", str(llama), "--show", "--config", str(run)]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1
    nowhere = change(llama, tmp_path / "bare")
    (nowhere / "tokenizer.json").unlink()
    command = ["upcycle", str(nowhere), str(tmp_path / "other"), "--config", str(run)]
    assert main(command) == 2
    assert "holds no tokenizer.json; give the source's tokenizer with --tokenizer" in capsys.readouterr().err
    assert main([*command, "--tokenizer", str(llama)]) == 0
