"""What users of Lightning come to after the first afternoon: objects used again, checkpoints from anywhere, epochs,
launchers; each does what Lightning promises, or is refused with a line."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
)

from dlcm_lightning import PretrainData, PretrainModule
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import CheckpointError, RunError
from tests.training.test_lightning import Seen, accumulating, lightnings_own_advice, trainer_for

__all__ = ["accumulating", "lightnings_own_advice"]  # fixtures


@pytest.fixture(autouse=True)
def not_the_last_word() -> Iterator[None]:
    """Lightning's advice on epochs and exceptions."""
    with warnings.catch_warnings():
        for said in (".*resuming from a checkpoint that ended.*", ".*is smaller than the logging interval.*",
                     ".*was configured with.*", ".*predict.*", ".*was called without a model.*",
                     ".*there is no last checkpoint.*", ".*have no `val_dataloader`.*", ".*WeightAveraging.*"):
            warnings.filterwarnings("ignore", said)
        yield


def run_folder(config: Config) -> Path:
    return Path(config.train.output_dir) / config.name


def same_weights(one: PretrainModule, other: PretrainModule) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trained(config: Config, folder: Path) -> tuple[PretrainModule, Seen]:
    """Without interruption."""
    module, seen = PretrainModule(config), Seen()
    trainer_for(config, folder, callbacks=[seen]).fit(module, datamodule=PretrainData(config))
    return module, seen


class Boom(Callback):
    """Raises in a hook, in the last micro-batch of the optimizer step that follows so many."""

    def __init__(self, hook: str, after: int = 4) -> None:
        def raise_in_it(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == after and trainer.fit_loop.epoch_loop._accumulated_batches_reached():
                raise KeyError("boom")
        setattr(self, hook, raise_in_it)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_after_backward",
                                  "on_before_optimizer_step"])
@pytest.mark.parametrize("rows", [4, 2])
def test_a_checkpoint_from_anywhere_in_a_step_continues_with_the_rows_of_that_step(
    accumulating: Config, tmp_path: Path, hook: str, rows: int
) -> None:
    config = replace(accumulating, data=replace(accumulating.data, micro_batch_size=rows))
    whole, _ = trained(config, tmp_path)
    with pytest.raises(KeyError, match="boom"):
        trainer_for(config, tmp_path, enable_checkpointing=True,
                    callbacks=[OnExceptionCheckpoint(tmp_path, "x"), Boom(hook)]
                    ).fit(PretrainModule(config), datamodule=PretrainData(config))
    module, seen = PretrainModule(config), Seen()
    trainer = trainer_for(config, tmp_path, callbacks=[seen])
    trainer.fit(module, datamodule=PretrainData(config), ckpt_path=tmp_path / "x.ckpt")
    assert seen.samples == list(range(16, 48)) and trainer.global_step == config.total_steps
    assert same_weights(module, whole)


def test_a_datamodule_that_was_used_before_begins_where_the_trainer_stands(run_config: Config, tmp_path: Path) -> None:
    whole, seen_whole = trained(run_config, tmp_path)
    data = PretrainData(run_config)
    first = trainer_for(run_config, tmp_path)
    first.fit(PretrainModule(run_config), datamodule=data)
    first.save_checkpoint(tmp_path / "end.ckpt")
    trainer_for(run_config, tmp_path).validate(PretrainModule(run_config), datamodule=data, verbose=False,
                                               ckpt_path=tmp_path / "end.ckpt")
    for again in (data, PretrainData.load_from_checkpoint(tmp_path / "end.ckpt")):
        module, seen = PretrainModule(run_config), Seen()
        trainer_for(run_config, tmp_path, callbacks=[seen]).fit(module, datamodule=again)
        assert seen.samples == seen_whole.samples and same_weights(module, whole)


def test_loaders_that_are_asked_for_again_go_on(run_config: Config, tmp_path: Path) -> None:
    seen = Seen()
    trainer_for(run_config, tmp_path, limit_train_batches=4, reload_dataloaders_every_n_epochs=1, callbacks=[seen]).fit(
        PretrainModule(run_config), datamodule=PretrainData(run_config))
    assert seen.samples == list(range(48))
    seen, data, module = Seen(), PretrainData(run_config), PretrainModule(run_config)
    trainer = trainer_for(run_config, tmp_path, max_steps=4, callbacks=[seen])
    trainer.fit(module, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = run_config.total_steps
    trainer.fit(module, datamodule=data)
    assert seen.samples == list(range(48))


def test_loaders_that_the_module_makes_anew_go_on(run_config: Config, tmp_path: Path) -> None:
    data, seen = PretrainData(run_config), Seen()
    data.open()

    class Own(PretrainModule):
        def train_dataloader(self) -> Any:
            return data.train_dataloader()

    trainer_for(run_config, tmp_path, limit_train_batches=4, reload_dataloaders_every_n_epochs=1, callbacks=[seen]
                ).fit(Own(run_config))
    assert seen.samples == list(range(48))


def test_loaders_without_their_datamodule_stand_where_the_trainer_does(run_config: Config, tmp_path: Path) -> None:
    data = PretrainData(run_config)
    data.open()
    trainer = trainer_for(run_config, tmp_path, max_steps=5)
    trainer.fit(PretrainModule(run_config), data.train_dataloader())
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    seen = Seen()
    trainer_for(run_config, tmp_path, callbacks=[seen]).fit(
        PretrainModule(run_config), data.train_dataloader(), ckpt_path=tmp_path / "five.ckpt")
    assert seen.samples == list(range(20, 48))
    other = replace(run_config, seed=8)
    with pytest.raises(ConfigError, match="differ in seed"):
        trainer_for(other, tmp_path).fit(PretrainModule(other), data.train_dataloader())


@pytest.mark.parametrize(("field", "factor"), [
    ("data.micro_batch_size", 0.5), ("data.global_batch_size", 2), ("data.sequence_length", 0.5), ("seed", 1)])
def test_rows_of_another_configuration_are_refused(run_config: Config, tmp_path: Path, field: str, factor: float
                                                   ) -> None:
    name = field.removeprefix("data.")
    other = replace(run_config, seed=8) if field == "seed" else replace(
        run_config, data=replace(run_config.data, **{name: int(factor * getattr(run_config.data, name))}))
    with pytest.raises(ConfigError, match=rf"differ in .*{field}"):
        trainer_for(run_config, tmp_path).fit(PretrainModule(run_config), datamodule=PretrainData(other))
    trainer_for(run_config, tmp_path).validate(PretrainModule(run_config), datamodule=PretrainData(other))
    elsewhere = replace(run_config, data=replace(run_config.data, workers=1))
    trainer_for(run_config, tmp_path, max_steps=1).fit(PretrainModule(run_config), datamodule=PretrainData(elsewhere))


def test_rows_that_a_model_cannot_be_judged_by_are_refused(run_config: Config, tmp_path: Path) -> None:
    small = replace(run_config, model=replace(run_config.model, vocab_size=300))
    named = replace(run_config, data=replace(run_config.data, sources=[
        replace(source, domain="another") for source in run_config.data.sources]))
    for other, said in ((small, r"model\.vocab_size"), (named, r"data\.sources\[\]\.domain")):
        with pytest.raises(ConfigError, match=rf"differ in {said}; make both of one, such as PretrainModule.load_from"):
            trainer_for(other, tmp_path).validate(PretrainModule(other), datamodule=PretrainData(run_config))


class Epochs(Seen):
    def __init__(self) -> None:
        super().__init__()
        self.validated: list[int] = []
        self.epochs: list[int] = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.validated.append(trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.epochs.append(trainer.current_epoch)


@pytest.mark.parametrize("at", [2, 3, 4, 6, 8, 10])
@pytest.mark.parametrize("rows", [4, 2])
def test_short_epochs_are_counted_across_a_checkpoint(accumulating: Config, tmp_path: Path, rows: int, at: int) -> None:
    """Three epochs of four steps; a checkpoint inside one, or at its last step."""
    config = replace(accumulating, data=replace(accumulating.data, micro_batch_size=rows),
                     optim=replace(accumulating.optim, total_tokens=40 * accumulating.data.tokens_per_step))
    arguments = {"limit_train_batches": 4 * config.micro_batches, "max_epochs": 3, "max_steps": -1,
                 "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    whole, module, kept = PretrainModule(config), PretrainModule(config), Epochs()
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=at, save_top_k=-1)
    trainer_for(config, tmp_path, **arguments, callbacks=[kept, save], enable_checkpointing=True).fit(
        whole, datamodule=PretrainData(config))
    assert kept.validated == [4, 8, 12] and kept.epochs == [0, 1, 2]
    seen = Epochs()
    trainer = trainer_for(config, tmp_path, **arguments, callbacks=[seen])
    trainer.fit(module, datamodule=PretrainData(config), ckpt_path=tmp_path / f"step={at}.ckpt")
    assert trainer.global_step == 12 and trainer.current_epoch == 3
    assert seen.samples == list(range(4 * at, 48)) and same_weights(module, whole)
    assert [step for step in seen.validated if step > at] == [step for step in kept.validated if step > at]


@pytest.mark.parametrize("after", [2, 3, 5, 7])
@pytest.mark.parametrize("rows", [4, 2])
def test_short_epochs_are_counted_across_an_exception(accumulating: Config, tmp_path: Path, rows: int, after: int
                                                      ) -> None:
    """Inside a step of an epoch of four, also of its last one."""
    config = replace(accumulating, data=replace(accumulating.data, micro_batch_size=rows))
    arguments = {"limit_train_batches": 4 * config.micro_batches, "max_epochs": 3, "max_steps": -1}
    whole, seen = PretrainModule(config), Epochs()
    trainer_for(config, tmp_path, **arguments).fit(whole, datamodule=PretrainData(config))
    with pytest.raises(KeyError, match="boom"):
        trainer_for(config, tmp_path, **arguments, enable_checkpointing=True,
                    callbacks=[OnExceptionCheckpoint(tmp_path, "x"), Boom("on_after_backward", after)]
                    ).fit(PretrainModule(config), datamodule=PretrainData(config))
    module = PretrainModule(config)
    trainer = trainer_for(config, tmp_path, **arguments, callbacks=[seen])
    trainer.fit(module, datamodule=PretrainData(config), ckpt_path=tmp_path / "x.ckpt")
    assert seen.samples == list(range(4 * after, 48)) and same_weights(module, whole)
    assert seen.epochs == [0, 1, 2][after // 4:] and trainer.current_epoch == 3


def test_an_epoch_that_was_saved_at_its_end_is_over(run_config: Config, tmp_path: Path) -> None:
    arguments = {"limit_train_batches": 4, "max_epochs": 3, "max_steps": -1, "val_check_interval": 1.0,
                 "check_val_every_n_epoch": 1}
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, module, seen = PretrainModule(run_config), PretrainModule(run_config), Epochs()
    trainer_for(run_config, tmp_path, **arguments, enable_checkpointing=True, callbacks=[save]).fit(
        whole, datamodule=PretrainData(run_config))
    trainer = trainer_for(run_config, tmp_path, **arguments, callbacks=[seen])
    trainer.fit(module, datamodule=PretrainData(run_config), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert seen.samples == list(range(32, 48)) and seen.epochs == [2] and trainer.current_epoch == 3
    assert seen.validated == [12]
    assert same_weights(module, whole)


def test_a_fit_that_fails_before_it_begins_leaves_the_checkpoint_that_it_was_to_continue(
    accumulating: Config, tmp_path: Path
) -> None:
    trainer = trainer_for(accumulating, tmp_path, max_steps=4)
    trainer.fit(PretrainModule(accumulating), datamodule=PretrainData(accumulating))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    before = (tmp_path / "x.ckpt").read_bytes()

    class Early(Callback):
        def on_fit_start(self, *_: Any) -> None:
            raise KeyError("early")

    wrong: dict[str, Any] = {"accumulate_grad_batches": 1}
    for arguments, callbacks in ((wrong, []), ({}, [Early()])):
        with pytest.raises(CheckpointError, match="failed before it began"):
            trainer_for(accumulating, tmp_path, enable_checkpointing=True, **arguments,
                        callbacks=[*callbacks, OnExceptionCheckpoint(tmp_path, "x")]).fit(
                PretrainModule(accumulating), datamodule=PretrainData(accumulating), ckpt_path=tmp_path / "x.ckpt")
        assert (tmp_path / "x.ckpt").read_bytes() == before


def test_a_model_that_cannot_have_its_first_weights_predicts_nothing(run_config: Config, tmp_path: Path) -> None:
    config = replace(run_config, train=replace(run_config.train, init_from=str(tmp_path / "nothing")))
    for act in ("validate", "predict"):
        with pytest.raises(CheckpointError, match="nothing"):
            getattr(trainer_for(config, tmp_path), act)(PretrainModule(config), datamodule=PretrainData(config))


def test_an_optimizer_of_the_users_own(run_config: Config, tmp_path: Path) -> None:
    class Own(PretrainModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Own(run_config)
    trainer = trainer_for(run_config, tmp_path)
    trainer.fit(module, datamodule=PretrainData(run_config))
    assert trainer.global_step == run_config.total_steps and module.learning_rates == {"0": 1e-3}
    assert float(trainer.callback_metrics["train/lr_0"]) == pytest.approx(1e-3, rel=1e-6)


def test_a_module_is_loaded_with_another_configuration_and_by_hand(run_config: Config, tmp_path: Path) -> None:
    module = PretrainModule(run_config)
    trainer = trainer_for(run_config, tmp_path, max_steps=2)
    trainer.fit(module, datamodule=PretrainData(run_config))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = replace(run_config, optim=replace(run_config.optim, lr_token=1.0))
    for given in (run_config, asdict(run_config), other, asdict(other)):
        found = PretrainModule.load_from_checkpoint(tmp_path / "two.ckpt", config=given)
        assert same_weights(found, module)
        assert found.config == (given if isinstance(given, Config) else {1.0: other}.get(
            given["optim"]["lr_token"], run_config))
    with pytest.raises(ConfigError, match=r"differs in optim\.lr_token"):  # a run that continues may not
        trainer_for(other, tmp_path).fit(PretrainModule(other), datamodule=PretrainData(other),
                                         ckpt_path=tmp_path / "two.ckpt")
    fresh = PretrainModule(run_config)
    fresh.load_state_dict(torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"])
    assert same_weights(fresh, module)
    tokens = torch.arange(8)
    assert PretrainModule(run_config)(tokens).shape == (8, run_config.model.vocab_size)


def test_predicting_gives_what_the_model_says_of_each_token(run_config: Config, tmp_path: Path) -> None:
    module, data = PretrainModule(run_config), PretrainData(run_config)
    trainer = trainer_for(run_config, tmp_path)
    found: Any = trainer.predict(module, datamodule=data)
    [validated] = trainer.validate(module, datamodule=data, verbose=False)
    nll = torch.cat([one["nll"] for one in found])
    targets = torch.cat([one["targets"] for one in found])
    assert float(nll[targets >= 0].mean()) == pytest.approx(validated["val/loss"], rel=1e-5)
    cut = torch.cat([one["boundaries"] for one in found])
    real = torch.cat([(one["samples"] >= 0).repeat_interleave(run_config.data.sequence_length) for one in found])
    assert float(real.sum() / cut[real].sum()) == pytest.approx(validated["val/R_thresholded"], rel=1e-5)
    with pytest.raises(RunError, match="its shards are not open; call open"):
        PretrainData(run_config).val_dataloader()


def test_a_datamodule_can_be_copied_and_sent(run_config: Config, tmp_path: Path) -> None:
    data = PretrainData(run_config)
    trainer_for(run_config, tmp_path, max_steps=1).fit(PretrainModule(run_config), datamodule=data)
    copied = copy.deepcopy(data)
    seen = Seen()
    trainer_for(run_config, tmp_path, max_steps=1, callbacks=[seen]).fit(PretrainModule(run_config), datamodule=copied)
    assert seen.samples == [0, 1, 2, 3]


SPAWNED = """
import sys
from dlcm_lightning import PretrainData, PretrainModule, load_config, trainer_arguments
from lightning.pytorch import Trainer
if __name__ == "__main__":
    config = load_config(sys.argv[1], ["train.devices=2"])
    module = PretrainModule(config)
    trainer = Trainer(**trainer_arguments(config), accelerator="cpu", devices=2, strategy=sys.argv[2], logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, datamodule=PretrainData(config))
    print("TRAINED", sum(float(one.detach().double().abs().sum()) for one in module.parameters()))
"""


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_processes_that_are_spawned_or_forked_give_the_weights_back(
    accumulating: Config, tmp_path: Path, strategy: str
) -> None:
    boundary = replace(accumulating.model.boundary, previous_rate=True)  # one micro-batch a step on two ranks
    config = replace(accumulating, model=replace(accumulating.model, boundary=boundary),
                     optim=replace(accumulating.optim, total_tokens=3 * 256, warmup_tokens=256))
    save_config(config, tmp_path / "run.yaml")
    (tmp_path / "train.py").write_text(SPAWNED)
    done = subprocess.run([sys.executable, "train.py", "run.yaml", strategy], cwd=tmp_path, capture_output=True,
                          text=True, timeout=240)
    assert "TRAINED" in done.stdout, done.stderr
    module, _ = trained(config, tmp_path)
    expected = sum(float(one.detach().double().abs().sum()) for one in module.parameters())
    assert float(done.stdout.split("TRAINED")[1]) == pytest.approx(expected, rel=1e-6)
