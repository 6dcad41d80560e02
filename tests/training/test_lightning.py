"""A Lightning user's first afternoon: a Trainer of one's own, with Lightning's loggers and callbacks."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dlcm_lightning
from dlcm_lightning import PretrainData, PretrainModule, pretrain, trainer_arguments
from dlcm_lightning.batch import Batch
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import ClassConfig, Config, ConfigError
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.contract import check_trainer
from dlcm_lightning.training.lr_schedule import learning_rate_factor
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.module import EVERY_STEP

MONITORED = {"train/loss", "train/bits_per_byte", "train/bits_per_byte/en", "train/bits_per_byte/zh", "train/F",
             "train/G", "train/R_sampled", "train/R_thresholded", "train/rate_loss", "train/grad_norm",
             "train/lr_token"}


@pytest.fixture(autouse=True)
def lightnings_own_advice() -> Iterator[None]:
    """Of Lightning to its users, where nothing is wrong."""
    with warnings.catch_warnings():
        for said in (".*Checkpoint directory.*", ".*callbacks used to create the checkpoint.*"):
            warnings.filterwarnings("ignore", said)
        yield


def table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def trainer_for(config: Config, folder: Path, **arguments: Any) -> Trainer:
    plain: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "logger": False,
                             "enable_checkpointing": False, "enable_progress_bar": False,
                             "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**plain | trainer_arguments(config) | arguments)


class Seen(Callback):
    """Which samples were trained on, step by step, and the loss of each step."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.losses: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
                           ) -> None:
        self.samples += [int(sample) for sample in batch.samples if sample >= 0]
        assert isinstance(module, PretrainModule)
        if module.finishes_step(batch_idx):
            self.losses[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


@pytest.fixture
def accumulating(run_config: Config) -> Config:
    """Two micro-batches a step, ranks left open, as in the configurations that are shipped."""
    return replace(run_config, data=replace(run_config.data, micro_batch_size=2),
                   train=replace(run_config.train, devices=0, nodes=0))


def test_a_plain_trainer_trains_what_the_command_trains(accumulating: Config, tmp_path: Path) -> None:
    config = accumulating
    module, seen = PretrainModule(config), Seen()
    trainer = trainer_for(config, tmp_path, callbacks=[seen])
    trainer.fit(module, datamodule=PretrainData(config))
    assert trainer.global_step == config.total_steps
    assert seen.samples == list(range(config.total_steps * config.data.global_batch_size))
    assert trainer.callback_metrics.keys() >= MONITORED
    by_command = pretrain(config, lambda _: None)
    trainer.validate(module, datamodule=PretrainData(config), verbose=False)
    assert trainer.callback_metrics["val/bits_per_byte"] == by_command.validation["bits_per_byte"]
    assert trainer.callback_metrics["val/R_thresholded/zh"] == by_command.validation["domains"]["zh"]["R_thresholded"]
    [tested] = trainer.test(module, datamodule=PretrainData(config), verbose=False)
    assert tested["test/loss"] == pytest.approx(by_command.validation["loss"], rel=1e-6)


def test_lightnings_loggers_and_callbacks_do_what_they_do(accumulating: Config, tmp_path: Path) -> None:
    config = replace(accumulating, train=replace(accumulating.train, log_every_steps=1, validate_every_steps=4))
    best = ModelCheckpoint(tmp_path / "best", monitor="val/bits_per_byte", save_top_k=1, filename="{step}")
    every = ModelCheckpoint(tmp_path / "every", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    seen, timer = Seen(), Timer()
    loggers = [CSVLogger(tmp_path, "csv", ""), TensorBoardLogger(tmp_path, "tb", "")]
    trainer = trainer_for(config, tmp_path, logger=loggers, enable_checkpointing=True, enable_progress_bar=True,
                          enable_model_summary=True, num_sanity_val_steps=2,
                          callbacks=[best, every, seen, timer, LearningRateMonitor("step"), ModelSummary(2),
                                     DeviceStatsMonitor(), RichProgressBar(),
                                     EarlyStopping("val/bits_per_byte", patience=9)])
    trainer.fit(PretrainModule(config), datamodule=PretrainData(config))
    assert sorted(file.name for file in (tmp_path / "every").iterdir()) == ["step=10.ckpt", "step=5.ckpt"]
    assert best.best_model_score == pytest.approx(float(trainer.callback_metrics["val/bits_per_byte"]), rel=0.2)
    assert timer.time_elapsed("train") > timer.time_elapsed("validate") > 0

    rows = table(tmp_path / "csv" / "metrics.csv")
    logged = {int(row["step"]) + 1: float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert logged == pytest.approx(seen.losses, rel=1e-6)
    assert logged.keys() == set(range(1, config.total_steps + 1))
    assert [int(row["step"]) + 1 for row in rows if row["val/bits_per_byte"]] == [4, 8, 12]

    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    base = PretrainModule(config)
    base.configure_model()
    peak = {group["name"]: group["initial_lr"] for group in base.configure_optimizers()["optimizer"].param_groups}
    factors = [learning_rate_factor((step + 1) * config.data.tokens_per_step, config.optim)
               for step in range(config.total_steps)]
    for role in ("token", "concept", "boundary"):
        rates = {event.step: event.value for event in events.Scalars(f"lr/{role}")}  # of every micro-batch
        assert list(rates.values()) == pytest.approx([peak[role] * factor for factor in factors], rel=1e-6)
        assert {event.step: event.value for event in events.Scalars(f"train/lr_{role}")} == rates


def test_early_stopping_stops_a_plain_fit(accumulating: Config, tmp_path: Path) -> None:
    config = replace(accumulating, train=replace(accumulating.train, validate_every_steps=2))
    stopping = EarlyStopping("val/bits_per_byte", patience=1, min_delta=100.0)
    trainer = trainer_for(config, tmp_path, callbacks=[stopping])
    trainer.fit(PretrainModule(config), datamodule=PretrainData(config))
    assert trainer.global_step == 4


@pytest.mark.parametrize("micro_batch_size", [4, 2, 1])
def test_fit_from_a_checkpoint_reads_the_rows_that_are_left_and_ends_with_the_same_bits(
    run_config: Config, micro_batch_size: int, tmp_path: Path
) -> None:
    config = replace(run_config, data=replace(run_config.data, micro_batch_size=micro_batch_size))
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    whole, seen = PretrainModule(config), Seen()
    trainer_for(config, tmp_path, callbacks=[saving, seen], enable_checkpointing=True
                ).fit(whole, datamodule=PretrainData(config))
    resumed, rest = PretrainModule(config), Seen()
    trainer = trainer_for(config, tmp_path, callbacks=[rest])
    trainer.fit(resumed, datamodule=PretrainData(config), ckpt_path=tmp_path / "step=5.ckpt")
    assert trainer.global_step == config.total_steps
    assert rest.samples == seen.samples[5 * config.data.global_batch_size:]
    assert {step: seen.losses[step] for step in rest.losses if step > 5} == {
        step: loss for step, loss in rest.losses.items() if step > 5}
    state, expected = resumed.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class SaveInside(Callback):
    """Writes a checkpoint after a micro-batch that does not end its step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
                           ) -> None:
        if batch_idx == 13:  # of four a step, the second of the fourth
            trainer.save_checkpoint(self.file)


def test_a_checkpoint_from_inside_a_step_stands_at_the_step_before(run_config: Config, tmp_path: Path) -> None:
    config = replace(run_config, data=replace(run_config.data, micro_batch_size=1))
    whole, seen = PretrainModule(config), Seen()
    trainer_for(config, tmp_path, callbacks=[SaveInside(tmp_path / "inside.ckpt"), seen]).fit(
        whole, datamodule=PretrainData(config))
    resumed, rest = PretrainModule(config), Seen()
    trainer_for(config, tmp_path, callbacks=[rest]).fit(
        resumed, datamodule=PretrainData(config), ckpt_path=tmp_path / "inside.ckpt")
    assert rest.samples == seen.samples[3 * config.data.global_batch_size:]
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_several_fits_and_short_epochs_go_on_where_the_run_stands(run_config: Config, tmp_path: Path) -> None:
    seen = Seen()
    trainer = trainer_for(run_config, tmp_path, callbacks=[seen], limit_train_batches=5)
    trainer.fit(PretrainModule(run_config), datamodule=PretrainData(run_config))
    assert seen.samples == list(range(run_config.total_steps * run_config.data.global_batch_size))


def test_a_second_fit_knows_nothing_of_where_the_first_one_stood(run_config: Config, tmp_path: Path) -> None:
    boundary = replace(run_config.model.boundary, rate_scope="document", rate_weight=1.0)  # divides by documents
    config = replace(run_config, model=replace(run_config.model, boundary=boundary))
    used, fresh = PretrainModule(config), PretrainModule(config)
    trainer_for(config, tmp_path, max_steps=3).fit(used, datamodule=PretrainData(config))
    fresh.configure_model()
    fresh.load_state_dict(used.state_dict())
    for module in (used, fresh):
        trainer_for(config, tmp_path, max_steps=2).fit(module, datamodule=PretrainData(config))
    assert all(torch.equal(used.state_dict()[name], value) for name, value in fresh.state_dict().items())


def test_a_checkpoint_says_what_model_it_holds(run_config: Config, tmp_path: Path) -> None:
    module = PretrainModule(run_config)
    trainer = trainer_for(run_config, tmp_path)
    data = PretrainData(run_config)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    held = torch.load(tmp_path / "end.ckpt", weights_only=True)  # plain containers and tensors
    assert held["PretrainData"]["step"] == run_config.total_steps
    found = PretrainModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert found.config == run_config
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        expected = module(batch.tokens, batch.documents)
        assert expected.shape == (len(batch.tokens), run_config.model.vocab_size)
        assert torch.equal(found(batch.tokens, batch.documents), expected)
    assert PretrainData.load_from_checkpoint(tmp_path / "end.ckpt").config == run_config


def test_a_checkpoint_of_another_run_or_of_other_shards_is_refused(run_config: Config, tmp_path: Path) -> None:
    trainer = trainer_for(run_config, tmp_path, max_steps=2)
    trainer.fit(PretrainModule(run_config), datamodule=PretrainData(run_config))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = replace(run_config, optim=replace(run_config.optim, lr_token=1e-4))
    with pytest.raises(ConfigError, match=r"differs in optim\.lr_token"):
        trainer_for(other, tmp_path).fit(PretrainModule(other), datamodule=PretrainData(other),
                                         ckpt_path=tmp_path / "two.ckpt")
    held = torch.load(tmp_path / "two.ckpt", weights_only=True)
    held["PretrainData"]["data"] = "other shards"
    torch.save(held, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="not those of the checkpoint"):
        trainer_for(run_config, tmp_path).fit(PretrainModule(run_config), datamodule=PretrainData(run_config),
                                              ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(("arguments", "said"), [
    ({"accumulate_grad_batches": 1}, r"Trainer\(accumulate_grad_batches=1\): .* are 2 on 1 ranks"),
    ({"accumulate_grad_batches": 3}, r"set accumulate_grad_batches=2"),
    ({"gradient_clip_val": 0.5}, r"Trainer\(gradient_clip_val=0.5\): optim.max_grad_norm = 1.0 clips"),
    ({"gradient_clip_algorithm": "value"}, "by their global norm"),
    ({"precision": "bf16-mixed"}, r"Trainer\(precision='bf16-mixed'\): .* leave the Trainer at '32-true'"),
    ({"precision": "64-true"}, "leave the Trainer at '32-true'"),
    ({"max_steps": 13}, r"Trainer\(max_steps=13\): .* ends after 12 steps"),
    ({"overfit_batches": 2}, r"Trainer\(overfit_batches=2\)"),
    ({"limit_train_batches": 3}, "inside an optimizer step of 2 micro-batches"),
    ({"limit_train_batches": 0.4}, "inside an optimizer step of 2 micro-batches"),
    ({"callbacks": [GradientAccumulationScheduler({0: 2})], "accumulate_grad_batches": 1}, "leave the callback out"),
])
def test_a_trainer_that_would_train_something_else_is_refused(
    accumulating: Config, tmp_path: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        trainer_for(accumulating, tmp_path, **arguments).fit(
            PretrainModule(accumulating), datamodule=PretrainData(accumulating))


def test_other_ranks_and_unknown_strategies_are_refused(run_config: Config, tmp_path: Path) -> None:
    two = replace(run_config, train=replace(run_config.train, devices=2))
    with pytest.raises(ConfigError, match=r"1 processes, but train\.devices = 2 on train\.nodes = 1"):
        trainer_for(two, tmp_path, accumulate_grad_batches=1).fit(PretrainModule(two), datamodule=PretrainData(two))
    trainer = trainer_for(run_config, tmp_path)
    trainer.strategy.__class__ = FSDPStrategy  # which needs a GPU to be made
    with pytest.raises(ConfigError, match=r"Trainer\(strategy=FSDPStrategy\)"):
        check_trainer(trainer, run_config, fitting=True)


def test_validating_first_leaves_training_as_it_is(run_config: Config, tmp_path: Path) -> None:
    module, other = PretrainModule(run_config), PretrainModule(run_config)
    trainer_for(run_config, tmp_path).validate(module, datamodule=PretrainData(run_config), verbose=False)
    for one in (module, other):
        trainer_for(run_config, tmp_path, num_sanity_val_steps=int(one is module)).fit(
            one, datamodule=PretrainData(run_config))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in other.state_dict().items())


class Own(Callback):
    """A user's, with a state of its own."""

    def __init__(self, every: int = 1) -> None:
        self.every, self.count = every, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def test_callbacks_and_loggers_of_the_configuration_are_the_runs(run_config: Config, tmp_path: Path) -> None:
    extra = replace(
        run_config.train,
        callbacks=[ClassConfig("tests.training.test_lightning.Own", {"every": 2}),
                   ClassConfig("lightning.pytorch.callbacks.LearningRateMonitor", {"logging_interval": "step"})],
        loggers=[ClassConfig("lightning.pytorch.loggers.CSVLogger", {"save_dir": str(tmp_path), "name": "csv",
                                                                    "version": ""})])
    seen = Seen()
    pretrain(replace(run_config, train=extra), lambda _: None, callbacks=[seen])
    assert len(seen.losses) == run_config.total_steps
    [newest] = folders(Path(run_config.train.output_dir) / run_config.name)[-1:]
    assert json.loads((newest / "callbacks.json").read_text())["Own"] == {"count": run_config.total_steps}
    rows = table(tmp_path / "csv" / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [2, 4, 6, 8, 10, 12]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [5, 10, 12]
    assert any(row["lr/token"] for row in rows)


def test_early_stopping_ends_a_run_with_a_checkpoint_and_a_report(run_config: Config) -> None:
    train = replace(run_config.train, validate_every_steps=2, callbacks=[ClassConfig(
        "lightning.pytorch.callbacks.EarlyStopping",
        {"monitor": "val/bits_per_byte", "patience": 2, "min_delta": 100.0})])
    config = replace(run_config, train=train)
    assert pretrain(config, lambda _: None).steps == 6
    heard: list[str] = []
    assert pretrain(config, heard.append).steps == 6
    assert "is finished: 6 of 12 steps" in heard[0]


@pytest.mark.parametrize(("wanted", "said"), [
    (ClassConfig("no_such_package.Thing"), "class_path = 'no_such_package.Thing': .*No module named"),
    (ClassConfig("lightning.pytorch.callbacks.NoSuch"), "no such class"),
    (ClassConfig("lightning.pytorch.loggers.CSVLogger"), "name a class that is a .*Callback"),
    (ClassConfig("lightning.pytorch.callbacks.EarlyStopping", {"monitr": "x"}), "cannot be made of them"),
])
def test_a_callback_that_cannot_be_made_is_refused(run_config: Config, wanted: ClassConfig, said: str) -> None:
    config = replace(run_config, train=replace(run_config.train, callbacks=[wanted]))
    with pytest.raises(ConfigError, match=rf"train.callbacks\[0\].*{said}"):
        pretrain(config, lambda _: None)


def test_the_command_finds_a_callback_in_the_current_folder_and_misses_a_package_before_torch_is_loaded(
    run_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Say(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        print('mine ends at', trainer.global_step)\n")
    save_config(run_config, tmp_path / "run.yaml")
    root = str(Path(dlcm_lightning.__file__).parents[1])

    def run(class_path: str, *before: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.remove(''); {''.join(before)}from dlcm_lightning.cli import entry; entry()"
        field = f"train.callbacks=[{{class_path: {class_path}}}]"
        return subprocess.run([sys.executable, "-c", code, "pretrain", "run.yaml", field], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": root, "DLCM_DEVICE": "cpu"})

    found = run("mine.Say")
    assert found.returncode == 0 and "mine ends at 12" in found.stdout, found.stderr
    missing = run("no_such_package.Say", "sys.modules['torch'] = None; ")
    assert missing.returncode == 2
    assert "train.callbacks[0].class_path = 'no_such_package.Say': there is no package" in missing.stderr


def test_the_numbers_that_are_logged_are_those_that_are_written(run_config: Config, tmp_path: Path) -> None:
    found: dict[str, float] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            assert isinstance(module, PretrainModule) and module.last_step is not None
            metrics = metrics_of(module.last_step, module.config.data.domains, module.boundary)
            for name, value in metrics.items():
                if name != "domains":
                    found[name] = value
                    if name in EVERY_STEP or trainer.global_step % 2 == 0:
                        assert float(trainer.callback_metrics[f"train/{name}"]) == pytest.approx(value, rel=1e-12)
            for domain, values in metrics["domains"].items() if trainer.global_step % 2 == 0 else ():
                for name, value in values.items():
                    logged = float(trainer.callback_metrics[f"train/{name}/{domain}"])
                    assert logged == pytest.approx(value, rel=1e-12, nan_ok=True)

    trainer_for(run_config, tmp_path, callbacks=[Look()]).fit(
        PretrainModule(run_config), datamodule=PretrainData(run_config))
    assert {"loss", "F", "G", "rate_loss", "concept_imbalance"} <= found.keys()


def test_the_library_is_what_it_says() -> None:
    for name in dlcm_lightning.__all__:
        assert getattr(dlcm_lightning, name).__module__.startswith("dlcm_lightning.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dlcm_lightning.nothing  # noqa: B018
    assert lightning.__version__.startswith("2.")
