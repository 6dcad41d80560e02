"""A fit in a plain Trainer keeps what its numbers are computed with, and ends where they are not finite any more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from dlcm_lightning import PretrainData, PretrainModule
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import RunError
from dlcm_lightning.training import arithmetic
from tests.training.test_lightning import lightnings_own_advice, trainer_for
from tests.training.test_lightning_contract import not_the_last_word

__all__ = ["lightnings_own_advice", "not_the_last_word"]  # fixtures


def test_a_fit_goes_on_with_the_attention_that_it_has_begun_with(run_config: Config, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kernel rounds otherwise."""
    trainer = trainer_for(run_config, tmp_path, max_steps=3)
    trainer.fit(PretrainModule(run_config, backend="reference"), datamodule=PretrainData(run_config))
    trainer.save_checkpoint(path := tmp_path / "begun.ckpt")
    module = PretrainModule(run_config)
    trainer_for(run_config, tmp_path).fit(module, datamodule=PretrainData(run_config), ckpt_path=path)
    assert module.model.backend == "reference", "which auto keeps"

    with pytest.raises(ConfigError, match=r"step 3 was trained with reference, here it means sdpa"):
        trainer_for(run_config, tmp_path).fit(PretrainModule(run_config, backend="sdpa"),
                                              datamodule=PretrainData(run_config), ckpt_path=path)
    other = PretrainModule(run_config, backend="sdpa")
    trainer_for(run_config, tmp_path).validate(other, datamodule=PretrainData(run_config), ckpt_path=path,
                                               verbose=False)
    assert other.model.backend == "sdpa", "which kernel looks at weights is free"
    assert PretrainModule.load_from_checkpoint(path).model.backend == "reference"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["attention"]
    torch.save(checkpoint, path)
    trainer_for(run_config, tmp_path).fit(PretrainModule(run_config), datamodule=PretrainData(run_config),
                                          ckpt_path=path)  # of an earlier version


def test_the_attention_of_a_checkpoint_is_chosen_for_where_the_trainer_computes(
        run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning loads a checkpoint before it moves what is not the model's own, which would say that it is a CPU."""
    trainer = trainer_for(run_config, tmp_path, max_steps=3)
    trainer.fit(PretrainModule(run_config), datamodule=PretrainData(run_config))
    trainer.save_checkpoint(path := tmp_path / "begun.ckpt")
    asked: list[torch.device] = []
    honest = arithmetic.choose_backend

    def choose(wanted: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> str:
        asked.append(device)
        return honest(wanted, torch.device("cpu"), dtype, **options)

    monkeypatch.setattr(arithmetic, "choose_backend", choose)
    there = torch.device("cpu", 0)  # as a GPU is another than the CPU's buffers
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", property(lambda self: there))
    trainer_for(run_config, tmp_path).fit(PretrainModule(run_config), datamodule=PretrainData(run_config),
                                          ckpt_path=path)
    assert asked == [there, there], "when the model is made, and when the checkpoint is read"


def infinite_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PretrainModule.configure_gradient_clipping

    def poisoned(self: PretrainModule, optimizer: Any, **rest: Any) -> None:
        if self.trainer.global_step == step - 1:
            torch._foreach_mul_([one.grad for one in self.parameters() if one.grad is not None], math.inf)
        honest(self, optimizer, **rest)

    monkeypatch.setattr(PretrainModule, "configure_gradient_clipping", poisoned)


@pytest.mark.parametrize(("step", "every", "said"), [(4, 5, 4), (4, 1, 4), (12, 5, 12), (11, 0, 12)])
def test_a_gradient_that_is_not_finite_ends_a_plain_fit_and_is_never_saved(
        run_config: Config, tmp_path: Path, step: int, every: int, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next line of the log, or at the end; and no callback that saves on errors writes what is lost."""
    infinite_at(step, monkeypatch)
    saves = OnExceptionCheckpoint(str(tmp_path / "kept"))
    trainer = trainer_for(run_config, tmp_path, log_every_n_steps=every, callbacks=[saves],
                          enable_checkpointing=True)
    module = PretrainModule(run_config)
    with pytest.raises(RunError, match=rf"step {said}: the norm of the gradient is (nan|inf)"):
        trainer.fit(module, datamodule=PretrainData(run_config))
    assert not list((tmp_path / "kept").glob("*.ckpt"))
    monkeypatch.undo()
    trainer = trainer_for(run_config, tmp_path)
    fresh = PretrainModule(run_config)
    fresh.grad_norms = module.grad_norms
    trainer.fit(fresh, datamodule=PretrainData(run_config))
    assert trainer.global_step == run_config.total_steps, "another fit knows nothing of it"
