"""Callbacks of Lightning's and of users': their states in a run's checkpoints, which are refused, what they change and
what they log."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
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
from dlcm_lightning.config import ClassConfig, Config, ConfigError
from dlcm_lightning.errors import CheckpointError, Stopped
from dlcm_lightning.run_directory import METRICS_FILE, REPORT_FILE, STOP
from dlcm_lightning.training.callback_state import callbacks_state, load_callbacks_state
from dlcm_lightning.training.report import Report
from tests.training.test_lightning import accumulating, lightnings_own_advice, trainer_for
from tests.training.test_lightning_contract import not_the_last_word, run_folder

__all__ = ["accumulating", "lightnings_own_advice", "not_the_last_word"]  # fixtures


class Point(NamedTuple):
    x: int
    y: int


class PretrainDataOpened(PretrainData):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.open()


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]


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
