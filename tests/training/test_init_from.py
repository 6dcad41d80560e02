"""A run that begins with the weights of an export: they are there before the first step, and nothing else passes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dlcm_lightning import PretrainData, PretrainModule, trainer_arguments
from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.config import BoundaryConfig, Config, ConfigError
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import TOKENIZER
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export.portable import export, load_model, load_state
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training import initial_weights
from dlcm_lightning.training.evaluate import evaluate
from dlcm_lightning.training.run import pretrain


def quiet(message: str) -> None:
    del message


@pytest.fixture
def exported(run_config: Config, tmp_path: Path) -> Path:
    """Of a run of 12 steps, so that the boundary's buffers are not zero."""
    pretrain(run_config, quiet)
    return export(Path(run_config.train.output_dir) / run_config.name, tmp_path / "exported")


def begun(config: Config, exported: Path, **fields: Any) -> Config:
    """Another run from there, of two steps and with another seed."""
    optim = replace(config.optim, total_tokens=2 * config.data.tokens_per_step, warmup_tokens=0)
    train = replace(config.train, init_from=str(exported))
    return replace(config, **{"name": "begun", "seed": 8, "optim": optim, "train": train, **fields})


class Look(Callback):
    """Keeps the state before the first step, and the loss of the first."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}
        self.loss = float("nan")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, PretrainModule)
        self.state = {name: value.clone() for name, value in module.model.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        assert isinstance(module, PretrainModule) and module.last_step is not None
        if trainer.global_step == 1:
            sums = module.last_step
            self.loss = (sums.total("nll") / sums.total("targets")).item()


def first_loss(config: Config, exported: Path) -> float:
    """Of the exported model on the first step's rows, its boundaries sampled as in training."""
    reader = Reader(config.data, config.seed, config.model.vocab_size, log=quiet)
    total, targets, model = 0.0, 0, load_model(exported)
    for batch in reader.step_batches(0):
        with torch.no_grad():
            total += model(batch.tokens, batch.documents, batch.noise, batch.targets).nll_sum.item()
        targets += int((batch.targets >= 0).sum())
    return total / targets


def test_the_run_begins_with_weights_and_buffers_of_the_export(run_config: Config, exported: Path) -> None:
    look, config, said = Look(), begun(run_config, exported), []
    pretrain(config, said.append, callbacks=[look])
    expected = load_state(exported)
    assert look.state.keys() == expected.keys()
    assert expected["boundary.rate_bias"] != 0 and expected["boundary.prior_mean"].any()
    for name, value in expected.items():
        assert torch.equal(look.state[name], value), name
    assert look.loss == pytest.approx(first_loss(config, exported), rel=1e-6)
    assert f"begins with the weights of {exported}" in said


def test_a_trainer_of_ones_own_begins_there_too(run_config: Config, exported: Path) -> None:
    look, config = Look(), begun(run_config, exported)
    own_trainer(config, look).fit(PretrainModule(config), datamodule=PretrainData(config, log=quiet))
    assert all(torch.equal(look.state[name], value) for name, value in load_state(exported).items())


def own_trainer(config: Config, *callbacks: Callback) -> Trainer:
    return Trainer(**trainer_arguments(config), callbacks=list(callbacks), logger=False, enable_checkpointing=False,
                   enable_progress_bar=False, enable_model_summary=False)


def test_lightnings_own_checkpoint_continues_without_it_and_nothing_else_does(run_config: Config, exported: Path,
                                                                             tmp_path: Path) -> None:
    config = begun(run_config, exported)
    file, whole, again = tmp_path / "lightning.ckpt", PretrainModule(config), PretrainModule(config)

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.save_checkpoint(file)

    own_trainer(config, Save()).fit(whole, datamodule=PretrainData(config, log=quiet))
    shutil.rmtree(exported)
    own_trainer(config).fit(again, datamodule=PretrainData(config, log=quiet), ckpt_path=file)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())
    data = PretrainData(config, log=quiet)
    own_trainer(config).validate(PretrainModule(config), datamodule=data, ckpt_path=file, verbose=False)
    for act in (Trainer.fit, Trainer.validate):
        with pytest.raises(CheckpointError, match=r"is no folder, hence has no portable\.json"):
            act(own_trainer(config), PretrainModule(config), datamodule=PretrainData(config, log=quiet))


def test_a_run_that_continues_does_not_need_it(run_config: Config, exported: Path) -> None:
    config = begun(run_config, exported)
    whole = pretrain(config, quiet)
    shutil.rmtree(Path(config.train.output_dir) / config.name)
    short = replace(config, optim=replace(config.optim, total_tokens=2 * config.data.tokens_per_step))
    stopped = replace(short, train=replace(short.train, checkpoint_every_steps=1))
    pretrain(stopped, quiet)
    run = Path(config.train.output_dir) / config.name
    shutil.rmtree(exported)
    shutil.rmtree(folders(run)[-1])
    (run / "report.json").unlink(missing_ok=True)
    again = pretrain(stopped, quiet)
    assert again.validation == whole.validation
    evaluate(run, None, [], quiet)
    assert Checkpoint(folders(run)[-1], Manifest.load(folders(run)[-1])).config.train.init_from == str(exported)


def test_segmentation_and_initialisation_may_differ(run_config: Config, exported: Path) -> None:
    boundary = replace(run_config.model.boundary, target_ratio=3.0, rate_weight=0.1)
    model = replace(run_config.model, boundary=boundary, mup=replace(run_config.model.mup, sigma=0.5))
    pretrain(begun(run_config, exported, model=model), quiet)


def refused(config: Config, said: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind, match=said) as refusal:
        pretrain(config, quiet)
    assert "\n" not in str(refusal.value)


def test_what_is_not_of_this_model_is_refused_by_its_field(run_config: Config, exported: Path) -> None:
    model = run_config.model
    for other, said in (
        (replace(model, encoder_layers=2), "model.encoder_layers = 2: the export has 1; write"),
        (replace(model, ffn_token=32, ffn_concept=32), "model.ffn_token = 32: the export has 64, and 1 more fields"),
        (replace(model, norm_epsilon=1e-6), "model.norm_epsilon = 1e-06: the export has 1e-05"),
        (replace(model, mup=replace(model.mup, d_base=128)), "model.mup.d_base = 128: the export has 256"),
        (replace(model, boundary=BoundaryConfig(form="paper")), "model.boundary.form = 'paper': the export has 'both'"),
    ):
        refused(begun(run_config, exported, model=other), f"train.init_from = .*{said}")


def test_what_is_no_whole_export_is_refused(run_config: Config, exported: Path, tmp_path: Path) -> None:
    refused(begun(run_config, tmp_path / "nowhere"), r"is no folder, hence has no portable\.json; name what")
    (tmp_path / "empty").mkdir()
    refused(begun(run_config, tmp_path / "empty"), r"holds no portable\.json")
    content = bytearray((exported / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (exported / "model.safetensors").write_bytes(content)
    refused(begun(run_config, exported), r"model\.safetensors is damaged: its sha256 differs")
    (exported / "model.safetensors").unlink()
    refused(begun(run_config, exported), "not a whole exported model")
    with pytest.raises(ConfigError, match=r"train\.init_from = 's3://a/b': give a folder of this machine"):
        begun(run_config, Path("x"), train=replace(run_config.train, init_from="s3://a/b"))


def test_another_tokenizer_is_refused(run_config: Config, exported: Path) -> None:
    (exported / TOKENIZER).write_bytes((exported / TOKENIZER).read_bytes() + b" ")
    about = json.loads((exported / "portable.json").read_text())
    del about["files"][TOKENIZER], about["tokenizer"]
    (exported / "portable.json").write_text(json.dumps(about))
    refused(begun(run_config, exported), r"its tokenizer\.json is not that of data\.root.*data\.tokenizer for the")


def test_tensors_that_differ_from_what_the_export_says_are_named(run_config: Config, exported: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_weights, "_differing", lambda *_: [])
    wider = replace(run_config.model, ffn_token=32)
    refused(begun(run_config, exported, model=wider), "has the shape .*, in the model ")
    refused(begun(run_config, exported, model=replace(run_config.model, encoder_layers=2)), "is in the model only")
