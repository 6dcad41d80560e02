"""The two loggers of a run, behind Lightning's `Logger` interface: `metrics.jsonl` and TensorBoard.

Whoever logs, we or a callback of Lightning's, gives names such as `train/loss` or `val/loss/web-en`, and the optimizer
step. The loggers make of it what their reader wants. A line of `metrics.jsonl` holds step, consumed tokens, and the
metrics of one kind, those of a domain under "domains". TensorBoard's axis is consumed tokens, which means the same for
every batch size; its tags are sorted into few groups, the loss first, since it shows groups by their names.

Both end where the checkpoint ends that a run continues from: `begin` cuts a file back and has TensorBoard purge what
lies after, so that no point is written twice.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.config import Config
from dlcm_lightning.run_directory import METRICS_FILE

KINDS = {"train": "train", "val": "validation", "test": "test"}
"""What the first part of a name is called in `metrics.jsonl`."""
OTHER = "other"
"""The kind of what callbacks of others log."""
DIGESTS = ("samples", "noise")
"""Whole numbers that say which rows a line is of; no curve."""
GROUPS = {
    "boundary": ("F", "G", "R_sampled", "R_thresholded", "R_half", "p_sd", "p_near_half", "rate_loss",
                 "concept_imbalance", "concept_length"),
    "optimizer": ("grad_norm", "clipped", "lr_"),
    "system": ("tokens_per_second", "mfu", "share_of_product_rate", "step_seconds", "data_wait", "peak_memory_gib",
               "unreadable_rows", "step", "save_seconds", "validation_seconds", "attempts"),
}
"""Names, or their beginnings where they end in _, by group; the rest is the kind's own group."""
BAND = 0.1
"""Around the target of R, as a share of it: how far the band goes that its page shows."""


class JsonLinesLogger(Logger):
    """`metrics.jsonl` of a run's directory."""

    def __init__(self, run: Path, tokens_per_step: int) -> None:
        super().__init__()
        self.file, self.tokens_per_step = run / METRICS_FILE, tokens_per_step

    @property
    def name(self) -> str:
        return self.file.parent.name

    @property
    def version(self) -> str:
        return ""

    def begin(self, step: int, total_steps: int) -> None:
        """The run goes on after optimizer step `step`: the lines after it are dropped, the final validation's, which
        the end of the run writes, and a half-written last one."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                read = json.loads(line)
                if read["step"] <= step and (read["kind"], read["step"]) != ("validation", total_steps):
                    kept.append(line)
            except TypeError:  # of no step, by a callback of the user's
                kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break
        write_atomically(self.file, "".join(f"{line}\n" for line in kept).encode())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One line for each kind in it."""
        lines: dict[str, dict[str, Any]] = {}
        for full_name, value in metrics.items():
            kind, _, rest = full_name.partition("/")
            name, _, domain = rest.partition("/") if kind in KINDS else (full_name, "", "")
            line = lines.setdefault(KINDS.get(kind, OTHER), {})
            (line.setdefault("domains", {}).setdefault(domain, {}) if domain else line)[name] = value
        with self.file.open("a") as file:
            for kind, line in lines.items():
                domains = {"domains": line.pop("domains")} if "domains" in line else {}
                tokens = (step or 0) * self.tokens_per_step
                file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens, **line, **domains}) + "\n")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They stand in config.yaml."""


def tag(full_name: str) -> str:
    """Of a metric, in TensorBoard: GROUP/NAME, where the groups of a kind sort after its own."""
    kind, _, rest = full_name.partition("/")
    if kind not in KINDS:
        return full_name
    name, _, domain = rest.partition("/")
    group = next((group for group, names in GROUPS.items() if any(
        name == one or (one.endswith("_") and name.startswith(one)) for one in names)), "")
    if domain:
        return f"{kind}_domains/{name}_{domain}"
    return f"{kind}_{group}/{name}" if group else f"{kind}/{name}"


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's files, in the run's directory itself, so that the run has its own name there."""

    def __init__(self, run: Path, config: Config) -> None:
        super().__init__(save_dir=run, name="", version="", default_hp_metric=False)
        self.run, self.config = run, config
        self.tokens_per_step = config.data.tokens_per_step
        self.attempts = 0
        """How often the run was started or continued, this time included: each writes a file."""
        self._begun = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """torch's SummaryWriter; None until `begin`, since Lightning asks before it is known where the run stands."""
        return super().experiment if self._begun else None

    def begin(self, step: int) -> None:
        """The run goes on after optimizer step `step`; comes before anything is logged, on rank 0."""
        if (older := self.run / "tensorboard").is_dir():  # where earlier versions kept them
            for file in older.iterdir():
                file.rename(self.run / file.name)
            shutil.rmtree(older)
        self.attempts = 1 + len(list(self.run.glob("events.out.tfevents.*")))
        self._kwargs["purge_step"], self._begun = step * self.tokens_per_step + 1, True
        self.experiment.add_text("configuration", f"```yaml\n{yaml.safe_dump(asdict(self.config), sort_keys=False)}```")
        self.experiment.add_custom_scalars(custom_scalars(self.config))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        tokens = None if step is None else step * self.tokens_per_step
        for name, value in metrics.items():
            if name.rpartition("/")[2] not in DIGESTS and math.isfinite(value):
                self.experiment.add_scalar(tag(name), value, tokens)
        if step is not None and any(name.startswith("train/") for name in metrics):
            self.experiment.add_scalar(tag("train/step"), step, tokens)
            self.experiment.add_scalar(tag("train/attempts"), self.attempts, tokens)
        boundary = self.config.model.boundary
        if "train/R_sampled" in metrics and boundary.learned:
            for side, share in (("low", 1 - BAND), ("high", 1 + BAND)):
                self.experiment.add_scalar(f"train_boundary/R_target_{side}", share * boundary.target_ratio, tokens)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """As the columns of TensorBoard's table of runs, beside the bits per byte of the last validation."""
        flat = self._sanitize_params(_flatten_dict(self._convert(params)))
        for summary in hparams(flat, {"val/bits_per_byte": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)

    @staticmethod
    def _convert(params: Any) -> dict[str, Any]:
        return dict(params) if isinstance(params, Mapping) else dict(vars(params))

    @rank_zero_only
    def save(self) -> None:
        """What was written is on its way to the disk."""
        if self._experiment is not None:
            self._experiment.flush()


def custom_scalars(config: Config) -> dict[str, dict[str, list[Any]]]:
    """The page "Custom Scalars": chart by chart what one wants to see beside what."""
    domains = config.data.domains

    def by_domain(kind: str, name: str) -> list[Any]:
        return ["Multiline", [tag(f"{kind}/{name}/{domain}") for domain in domains]]

    def together(*names: str) -> list[Any]:
        return ["Multiline", [tag(name) for name in names]]

    quality = {
        "bits per byte": together("train/bits_per_byte", "val/bits_per_byte"),
        "bits per byte by domain": by_domain("train", "bits_per_byte"),
        "validation bits per byte by domain": by_domain("val", "bits_per_byte"),
        "loss": together("train/loss", "val/loss"),
        "loss by domain": by_domain("train", "loss"),
    }
    optimizer = {
        "gradient norm": together("train/grad_norm"),
        "share of clipped steps": together("train/clipped"),
        "learning rates": ["Multiline", ["train_optimizer/lr_.*"]],
    }
    system = {
        "tokens per second": together("train/tokens_per_second"),
        "share of the peak (MFU), of the measured rate": together("train/mfu", "train/share_of_product_rate"),
        "seconds per step": together("train/step_seconds"),
        "share of time that waits for data": together("train/data_wait"),
        "peak memory (GiB)": together("train/peak_memory_gib"),
        "seconds of a checkpoint, of a validation": together("train/save_seconds", "train/validation_seconds"),
        "attempts": together("train/attempts"),
        "optimizer step": together("train/step"),
    }
    pages = {"1 quality": quality, "3 optimizer": optimizer, "4 system": system}
    if config.model.kind == "dlcm":
        pages["2 boundary"] = {
            "R, tokens per concept, and its target": ["Margin", [
                "train_boundary/R_sampled", "train_boundary/R_target_low", "train_boundary/R_target_high"]],
            "R sampled and thresholded": together("train/R_sampled", "train/R_thresholded"),
            "R by domain": by_domain("train", "R_sampled"),
            "F and G": together("train/F", "train/G"),
            "rate loss": together("train/rate_loss"),
            "spread of p, share near one half": together("train/p_sd", "train/p_near_half"),
            "concepts of the busiest rank over the mean": together("train/concept_imbalance"),
        }
    return dict(sorted(pages.items()))
