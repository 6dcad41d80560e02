"""Any checkpoint that is kept has the numbers that the run itself would have logged there."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from dlcm_lightning.checkpoint.folder import FORMAT
from dlcm_lightning.config import BoundaryConfig, Config, ConfigError
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.tokenizer import train_bpe
from dlcm_lightning.errors import CheckpointError, DataError
from dlcm_lightning.export.portable import export
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.model.dlcm import assemble
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training import evaluate as evaluation
from dlcm_lightning.training.evaluate import evaluate
from dlcm_lightning.training.run import pretrain
from tests.checkpoints import leave_checkpoint
from tests.permissions import of_any_user
from tests.synthetic import VOCABULARY, make_texts


def run_of(config: Config) -> Path:
    return Path(config.train.output_dir) / config.name


def quiet(message: str) -> None:
    del message


def test_it_says_of_every_checkpoint_what_the_run_said(run_config: Config) -> None:
    config = replace(run_config, train=replace(run_config.train, validate_every_steps=9, keep_last=3))
    report = pretrain(config, quiet)
    run, lines = run_of(config), list[str]()
    assert evaluate(run, None, [], lines.append) == report.validation
    logged = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
              if line["kind"] == "validation"}
    found = evaluate(run, 9, [], lines.append)
    assert {key: logged[9][key] for key in found} == found
    assert found["bits_per_byte"] != report.validation["bits_per_byte"]
    table = "\n".join(lines)
    assert "bits/byte" in table and "unigram" in table and "step 9," in table
    saved = json.loads((run / "evaluation-00000009.json").read_text())
    assert saved["validation"]["loss"] == found["loss"] and saved["tokens"] == 9 * config.data.tokens_per_step
    fewer = evaluate(run, None, ["data.validation_rows=2"], quiet)
    assert fewer["loss"] != report.validation["loss"]
    # The answers to both questions are there, each under its own name and with what was asked.
    answers = {file.name: json.loads(file.read_text()) for file in run.glob("evaluation-00000012*.json")}
    assert answers["evaluation-00000012.json"]["validation"]["loss"] == report.validation["loss"]
    assert answers["evaluation-00000012.json"]["question"]["overrides"] == {}
    (other,) = [answer for name, answer in answers.items() if name != "evaluation-00000012.json"]
    assert other["question"]["overrides"] == {"data.validation_rows": 2}
    assert other["validation"]["loss"] == fewer["loss"]


def test_other_boundaries_can_be_asked_for(run_config: Config) -> None:
    """Each cuts by its own rule, finds another loss, and has an answer of its own beside the run's."""
    pretrain(run_config, quiet)
    run, found = run_of(run_config), {}
    for rule in get_args(Boundaries):
        lines: list[str] = []
        found[rule] = evaluate(run, None, [], lines.append, rule)
    assert found["thresholded"] == found["calibrated"]
    assert found["half"]["R_thresholded"] == found["half"]["R_half"] == found["calibrated"]["R_half"], "of the same p"
    assert found["calibrated"]["R_thresholded"] != found["calibrated"]["R_half"]
    assert len({numbers["loss"] for numbers in found.values()}) == 3
    asked = [json.loads(file.read_text())["question"]["overrides"].get("boundaries")
             for file in run.glob("evaluation-*.json")]
    assert sorted(asked, key=str) == [None, "calibrated", "half", "sampled"]


@pytest.mark.parametrize("rule", ["calibrated", "half", "sampled"])
@pytest.mark.parametrize("model", ["model.kind=dense", "model.boundary.form=fixed", "model.boundary.form=rule"])
def test_boundaries_that_a_model_does_not_have_are_refused(run_config: Config, model: str, rule: Boundaries) -> None:
    kind, form = (model.split("=")[1], "both") if "kind" in model else ("dlcm", model.split("=")[1])
    boundary = BoundaryConfig(form=form, target_ratio=4)  # type: ignore[arg-type]
    config = replace(run_config.model, kind=kind, boundary=boundary)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"--boundaries {rule}: .*leave it out"):
        assemble(config, torch.float32, "sdpa").cut_by(rule)


@pytest.mark.parametrize("override", [
    "model.kind=dense", "model.boundary.form=paper", "model.boundary.target_ratio=2", "model.norm_epsilon=1e-3",
    "model.rope_base=500", "model.mup.d_base=64", "seed=1", "optim.lr_token=1", "train.strategy=fsdp2",
])
def test_nothing_on_the_command_line_makes_another_model(run_config: Config, override: str) -> None:
    run = stopped_at_once(run_config)
    with pytest.raises(ConfigError, match="answers for the model as it was trained"):
        evaluate(run, None, [override], quiet)
    assert not list(run.glob("evaluation-*"))


def stopped_at_once(config: Config) -> Path:
    """A run with a checkpoint that nobody looks into."""
    leave_checkpoint(run_of(config), 3, config)
    return run_of(config)


def test_rows_in_the_ids_of_another_tokenizer_are_refused(run_config: Config, tmp_path: Path) -> None:
    pretrain(run_config, quiet)
    other = train_bpe(make_texts("english", 200, seed=9) + make_texts("chinese", 200, seed=9), VOCABULARY)
    other.save(tmp_path / "other")
    for name, domain in (("a", "en"), ("b", "zh")):
        tokenize_documents(make_texts("english", 200), other, tmp_path / "other" / name, source=name, domain=domain,
                           validation_share=0.3)
    with pytest.raises(DataError, match="is not that of"):
        evaluate(run_of(run_config), None, [f"data.root={tmp_path / 'other'}"], quiet)


def test_a_checkpoint_of_another_model_is_refused_whatever_its_manifest_says(run_config: Config) -> None:
    run = stopped_at_once(run_config)
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        evaluate(run, None, [], quiet)


def test_a_run_that_may_only_be_read_still_gets_its_table(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pretrain(run_config, quiet)
    run, lines = run_of(run_config), list[str]()
    run.chmod(0o555)
    with of_any_user():
        assert evaluate(run, None, [], lines.append) == report.validation
    assert "bits/byte" in "\n".join(lines) and "cannot be written (" in lines[-1]
    run.chmod(0o755)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "write_atomically", full)
    evaluate(run, None, [], lines.append)
    assert "No space left on device" in lines[-1]
    assert not list(run.glob("evaluation-*"))


def test_other_users_of_the_group_may_read_what_a_run_leaves(run_config: Config) -> None:
    before = os.umask(0o027)
    try:
        pretrain(run_config, quiet)
        exported = export(run_of(run_config), run_of(run_config).with_name("exported"))
    finally:
        os.umask(before)
    files = [*run_of(run_config).rglob("*"), *exported.rglob("*")]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files if file.is_file()} == {0o640}


def test_a_checkpoint_that_may_not_be_read_is_named_so_and_left_as_it_is(run_config: Config) -> None:
    pretrain(run_config, quiet)
    newest = folders(run_of(run_config))[-1]
    before = sorted(file.name for file in newest.parent.iterdir())
    for name in ("manifest.json", "config.yaml", "state-00000-of-00001.safetensors"):
        (newest / name).chmod(0)
        with of_any_user():
            for act in (lambda: evaluate(run_of(run_config), None, [], quiet), lambda: pretrain(run_config, quiet),
                        lambda: export(run_of(run_config), run_of(run_config).with_name("out"))):
                if name.startswith("state") and act.__code__.co_names[0] == "pretrain":
                    (run_of(run_config) / "report.json").unlink(missing_ok=True)  # so that it looks at the tensors
                with pytest.raises(CheckpointError, match=rf"{name} cannot be read \(.*Permission denied.*permission"):
                    act()
        (newest / name).chmod(0o644)
    assert sorted(file.name for file in newest.parent.iterdir()) == before
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    for act in (lambda: evaluate(run_of(run_config), None, [], quiet), lambda: pretrain(run_config, quiet)):
        with pytest.raises(CheckpointError, match=f"format 99, this version reads {FORMAT}: it was written by another"):
            act()
    assert sorted(file.name for file in newest.parent.iterdir()) == before


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused(run_config: Config) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluate(run_of(run_config), None, [], quiet)
    pretrain(run_config, quiet)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 9, 12"):
        evaluate(run_of(run_config), 3, [], quiet)
    file = next(folders(run_of(run_config))[-1].glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate(run_of(run_config), None, [], quiet)
