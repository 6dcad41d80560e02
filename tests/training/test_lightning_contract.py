"""What users of Lightning come to after the first afternoon: objects used again, checkpoints from anywhere, epochs,
callbacks with states, launchers; each does what Lightning promises, or is refused with a line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from safetensors.torch import load_file, save_file

from dlcm_lightning import PretrainData, PretrainModule, pretrain
from dlcm_lightning.batch import Batch
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import ClassConfig, Config, ConfigError
from dlcm_lightning.errors import CheckpointError, RunError, Stopped
from dlcm_lightning.run_directory import METRICS_FILE, REPORT_FILE, STOP
from dlcm_lightning.training.callback_state import callbacks_state, load_callbacks_state
from dlcm_lightning.training.report import Report
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


class Point(NamedTuple):
    x: int
    y: int


class PretrainDataOpened(PretrainData):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.open()


def run_folder(config: Config) -> Path:
    return Path(config.train.output_dir) / config.name


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


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


def test_callbacks_states_are_what_they_were(run_config: Config, tmp_path: Path) -> None:
    class Keeps(Callback):
        def __init__(self, key: str, state: dict[str, Any]) -> None:
            self.key, self.state, self.loaded = key, state, dict[str, Any]()

        @property
        def state_key(self) -> str:
            return self.key

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded = state_dict

    def state(number: int) -> dict[str, Any]:
        return {"none": None, "tuple": (1, (2.5, "x")), "numbers": {1: ("a", number), (2, 3): []}, "empty": {},
                "nested": {"best": {"tensor": torch.full((2,), float(number))}}, "tensor": torch.arange(number),
                "array": np.arange(3.0, dtype=np.float32), "scalar": np.float32(0.1), "inf": float("inf"),
                "set": {1, 2}, "bytes": b"\0\xff", "path": PurePosixPath("a/b"), "__odd__": {"__tuple__": [1]},
                "ordered": OrderedDict(b=1, a=True), "b/tensor": torch.zeros(5), "b": {"tensor": torch.ones(6)}}

    two = [Keeps("Keeps{'monitor': 'val/loss'}", state(3)), Keeps("Keeps{'monitor': 'val/loss'}/b", state(4))]
    trainer = trainer_for(run_config, tmp_path, callbacks=two)
    kept, tensors = callbacks_state(trainer)
    kept = json.loads(json.dumps(kept))
    load_callbacks_state(trainer, kept, {name: value.clone() for name, value in tensors.items()})
    for one in two:
        assert one.loaded.keys() == one.state.keys()
        for key, value in one.state.items():
            found = one.loaded[key]
            if key in ("tensor", "array", "b/tensor"):
                assert type(found) is type(value) and found.tolist() == value.tolist() and found.dtype == value.dtype
            elif key == "b":
                assert found["tensor"].tolist() == [1] * 6
            elif key == "nested":
                assert torch.equal(found["best"]["tensor"], value["best"]["tensor"])
            else:
                assert found == value and type(found) is (dict if key == "ordered" else
                                                           type(Path()) if key == "path" else type(value)), key
    shared = torch.ones(3)
    odd = Keeps("Odd", {(1, 2): "tuple", 3: "int", "views": {"one": shared, "same": shared, "part": shared[1:]},
                        "order": np.arange(4, dtype=">i4")[::-1]})
    kept, tensors = callbacks_state(trainer_for(run_config, tmp_path, callbacks=[odd]))
    save_file(tensors, tmp_path / "odd.safetensors")
    load_callbacks_state(trainer_for(run_config, tmp_path, callbacks=[odd]), json.loads(json.dumps(kept)),
                         load_file(tmp_path / "odd.safetensors"))
    assert odd.loaded[1, 2] == "tuple" and odd.loaded[3] == "int" and odd.loaded["order"].tolist() == [3, 2, 1, 0]
    assert [value.tolist() for value in odd.loaded["views"].values()] == [[1, 1, 1], [1, 1, 1], [1, 1]]
    for value, kind in ((object(), r"builtins\.object"), (np.complex64(1), r"numpy\.complex64"),
                        (np.datetime64("2020-01-01"), r"numpy\.datetime64"), (np.array(["x"]), r"numpy\.ndarray"),
                        (torch.eye(2).to_sparse(), r"torch\.Tensor"), (Point(1, 2), r".*Point"),
                        (np.longdouble(1), r"numpy\.longdouble")):
        bad = trainer_for(run_config, tmp_path, callbacks=[Keeps("Bad", {"a": [value]})])
        with pytest.raises(CheckpointError, match=rf"callback Bad/a/0: its state_dict holds a {kind}"):
            callbacks_state(bad)
    with pytest.raises(CheckpointError, match="callback Bad/a/0"):  # before the first step
        pretrain(run_config, lambda _: None, callbacks=[Keeps("Bad", {"a": [object()]})])
    assert not (run_folder(run_config) / METRICS_FILE).exists()

    class Late(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            self.seen = 0

        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

    assert pretrain(run_config, lambda _: None, callbacks=[Late()]).steps == run_config.total_steps
    with pytest.raises(CheckpointError, match=r"callback .*Late: its state_dict fails: AttributeError"):
        callbacks_state(trainer_for(run_config, tmp_path, callbacks=[Late()]))


def test_states_and_reports_of_earlier_versions_are_understood(run_config: Config, tmp_path: Path) -> None:
    """States under the name of the class, tensors named by nothing but where they lie; n-gram scores as `floors`."""
    class Own(Callback):
        loaded: dict[str, Any]

        @property
        def state_key(self) -> str:
            return "another key"

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.loaded = state_dict

    own = Own()
    load_callbacks_state(trainer_for(run_config, tmp_path, callbacks=[own]), {"Own": {"count": 3}},
                         {"Own/lengths": torch.arange(2), "Other/lengths": torch.arange(3)})
    assert own.loaded["count"] == 3 and own.loaded["lengths"].tolist() == [0, 1] and len(own.loaded) == 2
    report = pretrain(run_config, lambda _: None)
    file = run_folder(run_config) / REPORT_FILE
    fields = json.loads(file.read_text())
    fields["floors"] = fields.pop("baselines")
    file.write_text(json.dumps(fields))
    assert report.baselines and Report.load(run_folder(run_config)) == report


def test_two_callbacks_of_one_class_keep_their_states_apart(run_config: Config) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                raise KeyError("stop")

    def both() -> list[EarlyStopping]:
        return [EarlyStopping("val/loss", patience=50), EarlyStopping("val/R_thresholded", mode="max", patience=50)]

    config = replace(run_config, train=replace(run_config.train, validate_every_steps=2, checkpoint_every_steps=4))
    with pytest.raises(KeyError, match="stop"):
        pretrain(config, lambda _: None, callbacks=[*both(), Stop()])
    again, seen = both(), list[float]()

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
            seen.extend(float(one.best_score) for one in again)

    pretrain(config, lambda _: None, callbacks=[*again, Look()])
    lines = lines_of(run_folder(config))
    validated = [line for line in lines if line["kind"] == "validation" and line["step"] <= 4]
    assert seen == pytest.approx([min(line["loss"] for line in validated),
                                  max(line["R_thresholded"] for line in validated)])


@pytest.mark.parametrize(("callback", "said"), [
    (lambda: ModelCheckpoint(), "a run saves by itself"), (lambda: OnExceptionCheckpoint("x"), "a run saves by itself"),
    (lambda: RichProgressBar(), "a run shows its own"), (lambda: StochasticWeightAveraging(1e-4), "rates of its own"),
    (lambda: LambdaCallback(on_save_checkpoint=print), "keep it in state_dict"),
    (lambda: EMAWeightAveraging(), "keep it in state_dict, or use it with a plain Trainer"),
])
def test_callbacks_that_a_run_cannot_serve_are_refused_by_name(run_config: Config, callback: Any, said: str) -> None:
    made = callback()
    with pytest.raises(ConfigError, match=rf"^callbacks\[0\]: {type(made).__name__}: .*{said}"):
        pretrain(run_config, lambda _: None, callbacks=[made])
    assert not run_folder(run_config).exists()


def test_the_same_from_a_configuration_and_a_module_that_fails(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_callback.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for class_path, said in (("lightning.pytorch.callbacks.ModelCheckpoint", r"\[0\]: ModelCheckpoint: a run saves"),
                             ("broken_callback.Thing", r"ZeroDivisionError: division by zero; correct the name or")):
        config = replace(run_config, train=replace(run_config.train, callbacks=[ClassConfig(class_path)]))
        with pytest.raises(ConfigError, match=rf"train\.callbacks.*{said}"):
            pretrain(config, lambda _: None)


def test_averaging_weights_is_right_in_a_plain_trainer_and_setting_rates_is_refused(
    run_config: Config, tmp_path: Path
) -> None:
    data = PretrainData(run_config)
    trainer = trainer_for(run_config, tmp_path, callbacks=[EMAWeightAveraging(decay=0.9)])
    trainer.fit(PretrainModule(run_config), datamodule=data)
    with_average = trainer.callback_metrics
    assert data.reader.token_bytes.tolist() == PretrainDataOpened(run_config).reader.token_bytes.tolist()
    plain = trainer_for(run_config, tmp_path)
    plain.fit(PretrainModule(run_config), datamodule=PretrainData(run_config))
    nats_a_byte = [float(found["val/bits_per_byte"] / found["val/loss"])
                   for found in (with_average, plain.callback_metrics)]
    assert nats_a_byte[0] == pytest.approx(nats_a_byte[1], rel=1e-12)
    assert with_average["val/loss"] != plain.callback_metrics["val/loss"]
    with pytest.raises(ConfigError, match="StochasticWeightAveraging: it sets learning rates of its own"):
        trainer_for(run_config, tmp_path, callbacks=[StochasticWeightAveraging(1e-4)]).fit(
            PretrainModule(run_config), datamodule=PretrainData(run_config))
    two = replace(run_config, data=replace(run_config.data, micro_batch_size=2))
    with pytest.raises(ConfigError, match=r"Trainer\(fast_dev_run=True\): .* take fast_dev_run=2"):
        trainer_for(two, tmp_path, fast_dev_run=True).fit(PretrainModule(two), datamodule=PretrainData(two))


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

    for arguments in ({"accumulate_grad_batches": 1}, {"callbacks": [Early()]}):
        save = OnExceptionCheckpoint(tmp_path, "x")
        arguments["callbacks"] = [*arguments.get("callbacks", []), save]  # type: ignore[misc]
        with pytest.raises(CheckpointError, match="failed before it began"):
            trainer_for(accumulating, tmp_path, enable_checkpointing=True, **arguments).fit(
                PretrainModule(accumulating), datamodule=PretrainData(accumulating), ckpt_path=tmp_path / "x.ckpt")
        assert (tmp_path / "x.ckpt").read_bytes() == before


def test_a_model_that_cannot_have_its_first_weights_predicts_nothing(run_config: Config, tmp_path: Path) -> None:
    config = replace(run_config, train=replace(run_config.train, init_from=str(tmp_path / "nothing")))
    for act in ("validate", "predict"):
        with pytest.raises(CheckpointError, match="nothing"):
            getattr(trainer_for(config, tmp_path), act)(PretrainModule(config), datamodule=PretrainData(config))


def test_validation_sees_weights_that_a_callback_has_put_in(accumulating: Config) -> None:
    """In bf16 and several micro-batches, where matrices have copies that are made once a step."""
    class WithoutMatrices(Callback):
        """For each validation, and back; openly, or so that no version counter of a weight hears of it."""

        def __init__(self, hidden: bool) -> None:
            self.hidden, self.kept = hidden, dict[str, torch.Tensor]()

        def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
            assert isinstance(module, PretrainModule)
            named = {name: one for name, one in module.model.named_parameters()
                     if one.ndim == 2 and "embedding" not in name}
            self.kept = {name: one.detach().clone() for name, one in named.items()}
            self._put(named, {name: torch.zeros_like(one) for name, one in named.items()})

        def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
            assert isinstance(module, PretrainModule)
            self._put(dict(module.model.named_parameters()), self.kept)

        @torch.no_grad()
        def _put(self, named: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
            for name, value in values.items():
                (named[name].data if self.hidden else named[name]).copy_(value)

    config = replace(accumulating, train=replace(accumulating.train, precision="bf16", validate_every_steps=4))
    found = {}
    for name, callbacks in (("plain", []), ("openly", [WithoutMatrices(False)]), ("hidden", [WithoutMatrices(True)])):
        pretrain(replace(config, name=name), lambda _: None, callbacks=callbacks)
        lines = lines_of(run_folder(config).parent / name)
        found[name] = [[line["loss"] for line in lines if line["kind"] == kind and line["step"] < 12]
                       for kind in ("train", "validation")]
    assert found["hidden"] == found["openly"] and len(found["hidden"][1]) == 2
    assert found["hidden"][0] == found["plain"][0] and found["hidden"][1] != found["plain"][1]


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


class Numbers(Callback):
    """A user's numbers, at every step and after every validation."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
                           ) -> None:
        module.log("train/mine", float(trainer.global_step))

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        module.log("val/mine", float(trainer.global_step))


class Interrupt(Callback):
    """After five steps: at once, or asked to save first."""

    def __init__(self, stop: Path | None) -> None:
        self.stop = stop

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5 and self.stop is None:
            raise KeyError("interrupted")
        if trainer.global_step == 4 and self.stop is not None:
            self.stop.touch()


@pytest.mark.parametrize("graceful", [False, True])
@pytest.mark.parametrize(("every", "rows"), [(1, 4), (2, 4), (1, 2)])
def test_numbers_of_the_users_stand_at_the_step_that_they_are_of_once(
    run_config: Config, every: int, rows: int, graceful: bool
) -> None:
    train = replace(run_config.train, log_every_steps=every, validate_every_steps=4, checkpoint_every_steps=3)
    config = replace(run_config, train=train, data=replace(run_config.data, micro_batch_size=rows))
    stop = run_folder(config) / STOP

    def callbacks() -> list[Callback]:
        return [Numbers(), LearningRateMonitor("step")]

    with pytest.raises(Stopped if graceful else KeyError):
        pretrain(config, lambda _: None, callbacks=[*callbacks(), Interrupt(stop if graceful else None)])
    stop.unlink(missing_ok=True)
    pretrain(config, lambda _: None, callbacks=callbacks())
    lines = lines_of(run_folder(config))
    for kind, steps in (("train", list(range(every, 13, every))), ("validation", [4, 8, 12])):
        mine = [(line["step"], line["mine"]) for line in lines if line["kind"] == kind and "mine" in line]
        # The validation of the run's end is the run's.
        assert mine == [(step, float(step)) for step in steps if (kind, step) != ("validation", 12)]
        own = [line["step"] for line in lines if line["kind"] == kind and "loss" in line]
        assert own == steps
    ours = {line["step"]: line["lr_token"] for line in lines if line["kind"] == "train" and "lr_token" in line}
    theirs = [(line["step"], line["lr/token"]) for line in lines if "lr/token" in line]
    assert theirs == list(ours.items())
