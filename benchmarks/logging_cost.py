"""What logging costs an optimizer step: `python -m benchmarks.logging_cost`, a minute.

Two runs of the quickstart's steps. `command` is `pretrain`, with what it writes by itself: metrics.jsonl, TensorBoard.
`trainer` is a plain Trainer with what people add: self.log at every step, TensorBoardLogger, CSVLogger,
LearningRateMonitor and ModelCheckpoint on a metric. Every function of ours and of Lightning's that computes or passes
on numbers for people is timed from outside; inside another one of them it counts once. On a CPU nothing runs later
than it is called, so these times are all there is.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

from dlcm_lightning import PretrainData, PretrainModule, load_config, pretrain, trainer_arguments
from dlcm_lightning.cluster.world import World
from dlcm_lightning.config import Config
from dlcm_lightning.training.callbacks.metrics import Metrics
from dlcm_lightning.training.device import choose_device, describe_hardware

RESULTS = Path("benchmarks/results/logging_cost.json")
WARM_UP = 3
"""Steps that are not counted."""
TIMED = (
    (PretrainModule, "_log_step"), (LightningModule, "log"), (LightningModule, "log_dict"),
    (Metrics, "on_train_batch_end"),
    (_LoggerConnector, "update_train_step_metrics"), (_LoggerConnector, "log_metrics"),
    (LearningRateMonitor, "on_train_batch_start"), (ModelCheckpoint, "on_train_batch_end"),
)


class Spent:
    """Seconds in the functions of TIMED, and of whole steps."""

    def __init__(self) -> None:
        self.inside, self.logging = 0, 0.0
        self.steps: list[tuple[float, float]] = []
        """Of each step that ended: when, and `logging` by then."""

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            self.inside += 1
            try:
                return function(*arguments, **options)
            finally:
                self.inside -= 1
                if not self.inside:
                    self.logging += time.perf_counter() - began
        return call

    def noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.steps.append((time.perf_counter(), self.logging))
            return function(*arguments, **options)
        return call

    def share(self) -> dict[str, float]:
        """From the end of the last step of the warm-up to that of the last one."""
        (began, before), (ended, after) = self.steps[WARM_UP], self.steps[-1]
        count = len(self.steps) - 1 - WARM_UP
        return {"steps": count, "step_seconds": (ended - began) / count,
                "logging_milliseconds": 1000 * (after - before) / count, "share": (after - before) / (ended - began)}


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Of one run."""
    spent = Spent()
    honest = {(owner, name): owner.__dict__[name] for owner, name in TIMED}
    first = PretrainModule.on_before_optimizer_step
    try:
        for (owner, name), function in honest.items():
            setattr(owner, name, spent.timed(function))
        PretrainModule.on_before_optimizer_step = spent.noted(first)
        run()
    finally:
        for (owner, name), function in honest.items():
            setattr(owner, name, function)
        PretrainModule.on_before_optimizer_step = first
    return spent.share()


def with_trainer(config: Config) -> None:
    """As somebody who knows Lightning would train."""
    folder = config.train.output_dir
    trainer = Trainer(**trainer_arguments(config), default_root_dir=folder, enable_progress_bar=False,
                      enable_model_summary=False, logger=[TensorBoardLogger(folder), CSVLogger(folder)],
                      callbacks=[LearningRateMonitor(), ModelCheckpoint(folder, monitor="train/loss",
                                                                        every_n_train_steps=10**6)])
    trainer.fit(PretrainModule(config), datamodule=PretrainData(config))


def main() -> None:
    """Prints both, and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=16, help="counted ones, of each run")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("quickstart")
        steps = arguments.steps + WARM_UP + 1
        config = load_config("quickstart", [
            f"train.output_dir={folder}", f"optim.total_tokens={steps * config.data.tokens_per_step}",
            f"optim.warmup_tokens={config.data.tokens_per_step}", f"train.validate_every_steps={10**6}"])
        found["hardware"] = describe_hardware(config.train, choose_device(World()))
        for name, run in (("command", lambda: pretrain(config)), ("trainer", lambda: with_trainer(config))):
            found[name] = measure(run)
    for name in ("command", "trainer"):
        one = found[name]
        print(f"{name:8} {one['logging_milliseconds']:.2f} ms of {one['step_seconds']:.2f} s a step: "
              f"{100 * one['share']:.2f} %")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
