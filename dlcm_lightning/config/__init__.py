"""Every knob of a run: typed, frozen, documented; standard library only.

A run is one `Config`. It is composed from YAML by `compose.py`, checked here, saved with the run, and read by
everything else. A field's unit and meaning stand under it; what can be derived is a property, never a second
field. Checks run on construction and raise `ConfigError`, which names the field, the value found and the remedy,
so that a mistake is answered on a login node in milliseconds and not after torch has loaded.

Section and equation numbers are those of *Dynamic Large Concept Models* (arXiv 2512.24617v2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dlcm_lightning.config.checks import require, require_name, require_range
from dlcm_lightning.config.data import DataConfig, SourceConfig, WeightChange
from dlcm_lightning.config.job import JobConfig
from dlcm_lightning.config.model import (
    AttentionBackend,
    BoundaryConfig,
    BoundaryForm,
    ModelConfig,
    MupConfig,
    Threshold,
)
from dlcm_lightning.config.training import ClassConfig, OptimConfig, Recompute, Strategy, TrainConfig
from dlcm_lightning.errors import ConfigError

__all__ = [
    "AttentionBackend", "BoundaryConfig", "BoundaryForm", "ClassConfig", "Config", "ConfigError", "DataConfig",
    "JobConfig", "ModelConfig", "MupConfig", "OptimConfig", "Recompute", "SourceConfig", "Strategy",
    "Threshold", "TrainConfig", "WeightChange",
]


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = ""
    """Name of the run; its directory is <train.output_dir>/<name>."""
    seed: int = 0
    """Seeds initialisation, sample order and boundary noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    job: JobConfig = field(default_factory=JobConfig)

    def __post_init__(self) -> None:
        require_name("name", self.name)
        require_range("seed", self.seed, 0, 2**63 - 1)
        if self.data.corpus == "sample" and self.data.tokenizer == "deepseek":
            require(self.model.vocab_size >= 128_815, "model.vocab_size", self.model.vocab_size,
                    "data.tokenizer = 'deepseek' has 128815 ids; raise it or choose data.tokenizer = 'bpe'")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.optim.total_tokens // self.data.tokens_per_step)

    @property
    def uses_previous_rate(self) -> bool:
        """Whether the rate loss takes F of the step before: asked for, or because a step has several micro-batches."""
        return self.model.boundary.previous_rate or self.micro_batches > 1

    @property
    def micro_batches(self) -> int:
        """Forward passes of every rank in one optimizer step; padding rows complete the last where rows are short."""
        rows = -(-self.data.global_batch_size // self.train.ranks)
        return -(-rows // self.data.micro_batch_size)
