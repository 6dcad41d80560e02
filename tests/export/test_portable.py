"""A run's checkpoint as a model that stands alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.cli import main
from dlcm_lightning.config import Config
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export import portable
from dlcm_lightning.export.portable import about, export, load_model, load_state, model_state
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.run import pretrain

WITHOUT = """
import sys, torch
from dlcm_lightning.export.portable import load_model
model = load_model(sys.argv[1])
foreign = [name for name in ("lightning", "pytorch_lightning", "deepspeed") if name in sys.modules]
print(foreign, sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.fixture
def run(run_config: Config) -> Path:
    pretrain(run_config, lambda _: None)
    return Path(run_config.train.output_dir) / run_config.name


def newest(run: Path) -> Checkpoint:
    folder = folders(run)[-1]
    return Checkpoint(folder, Manifest.load(folder))


def test_every_number_of_the_checkpoint_is_in_the_model(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == ["config.yaml", "model.safetensors", "portable.json",
                                                          "tokenizer.json", "tokenizer_config.json"]
    state, model = load_state(out), load_model(out)
    assert state.keys() == model.state_dict().keys()
    with newest(run).tensors() as stored:
        for name, tensor in model.state_dict().items():
            kind = "weight/" if f"weight/{name}" in stored.names() else "buffer/model."
            assert torch.equal(tensor, stored.get(kind + name)), name
    assert {"boundary.rate_bias", "boundary.prior_mean"} <= state.keys()
    assert state["boundary.rate_bias"] != 0, "or its loss would not be noticed"
    assert about(out)["step"] == 12 and about(out)["parameters"] == sum(t.numel() for t in state.values())


def test_it_computes_what_the_run_computed(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    said = Probe(Tokenizer.load(out)).fingerprint(load_model(out), torch.device("cpu"))
    expected = newest(run).manifest.fingerprint
    assert said.boundaries == expected.boundaries and "1" in said.boundaries and "0" in said.boundaries
    assert said.loss == pytest.approx(expected.loss, rel=1e-6)


@pytest.mark.parametrize("split", [1, 10_000, 10**9])
def test_large_models_are_split_and_read_together(run: Path, tmp_path: Path, split: int) -> None:
    whole, parts = export(run, tmp_path / "whole"), export(run, tmp_path / "parts", split_bytes=split)
    files = sorted(file.name for file in parts.glob("*.safetensors"))
    assert (len(files) == 1) == (split == 10**9)
    if len(files) > 1:
        index = json.loads((parts / portable.INDEX).read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["weight_map"].keys() == load_state(whole).keys()
    for name, tensor in load_state(whole).items():
        assert torch.equal(tensor, load_state(parts)[name])
    load_model(parts)


def test_bf16_rounds_matrices_and_nothing_else(run: Path, tmp_path: Path) -> None:
    state, exact = load_state(export(run, tmp_path / "out", dtype="bf16")), model_state(newest(run))
    for name, tensor in state.items():
        rounded = tensor.dim() > 1 and not name.startswith("boundary.")
        assert tensor.dtype == (torch.bfloat16 if rounded else torch.float32), name
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    load_model(tmp_path / "out")


def test_loading_needs_neither_lightning_nor_deepspeed(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(out)], capture_output=True, text=True, timeout=120,
                          check=True)
    assert done.stdout.split() == ["[]", str(sum(p.numel() for p in load_model(out).parameters()))]


def test_an_older_step_can_be_asked_for(run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", step=9)
    assert about(out)["step"] == 9
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; there are 9, 12"):
        export(run, tmp_path / "other", step=4)


def test_what_cannot_be_exported_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match="is not there"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        export(tmp_path, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export(run, tmp_path / "there")
    file = next(folders(run)[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged.*choose another step"):
        export(run, tmp_path / "out")
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out"), "--step", "9", "--dtype", "bf16"]) == 0
    (tmp_path / "out" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path / "out")
    assert not list(tmp_path.glob(".*unfinished"))


def test_weights_in_a_wrong_place_are_noticed_by_what_they_compute(run: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    honest = portable.model_state

    def shuffled(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        state = honest(checkpoint)
        one, other = "encoder.layers.0.attention.out.weight", "decoder.layers.0.attention.out.weight"
        assert state[one].shape == state[other].shape
        state[one], state[other] = state[other], state[one]
        return state

    monkeypatch.setattr(portable, "model_state", shuffled)
    with pytest.raises(CheckpointError, match="computes something else: its loss on the probe text"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
