"""Who saves a run can be replaced: by a class of the user's, in the configuration or in Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lightning.pytorch import Trainer

from dlcm_lightning import pretrain
from dlcm_lightning.config import ClassConfig, Config, ConfigError
from dlcm_lightning.run_directory import folders
from dlcm_lightning.training.callbacks.checkpoint import Checkpoints
from dlcm_lightning.training.module import PretrainModule
from tests.training.test_run import quiet, run_folder


class AtStepsOfTwo(Checkpoints):
    """Saves at 2, 4 and 8, and notes where."""

    noted: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.noted = []

    def due(self, trainer: Trainer, module: PretrainModule) -> bool:
        return trainer.global_step in (2, 4, 8) or trainer.global_step == module.config.total_steps

    def save(self, trainer: Trainer, module: PretrainModule) -> None:
        super().save(trainer, module)
        self.noted.append(trainer.global_step)


@pytest.mark.parametrize("named", [True, False], ids=["in the configuration", "in Python"])
def test_a_subclass_takes_the_place_of_the_runs_own(run_config: Config, named: bool) -> None:
    mine, config = AtStepsOfTwo(), replace(run_config, train=replace(run_config.train, keep_last=10))
    if named:
        wanted = ClassConfig("tests.training.test_checkpoints.AtStepsOfTwo")
        pretrain(replace(config, train=replace(config.train, callbacks=[wanted])), quiet)
    else:
        pretrain(config, quiet, callbacks=[mine])
        assert mine.noted == [2, 4, 8, 12]
    kept = [int(folder.name.partition("-")[2]) for folder in folders(run_folder(config))]
    assert kept == [2, 4, 8, 12], "and not at every third step, as the configuration says"


def test_a_finished_run_is_left_as_it_is(run_config: Config) -> None:
    mine, config = AtStepsOfTwo(), replace(run_config, train=replace(run_config.train, keep_last=10))
    pretrain(config, quiet, callbacks=[mine])
    again = AtStepsOfTwo()
    report = pretrain(config, quiet, callbacks=[again])
    assert report.steps == 12 and not again.noted, "it is finished"


def test_two_that_both_save_are_refused(run_config: Config) -> None:
    with pytest.raises(ConfigError, match="AtStepsOfTwo and Checkpoints both save"):
        pretrain(run_config, quiet, callbacks=[AtStepsOfTwo(), Checkpoints()])
