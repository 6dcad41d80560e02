"""Knobs of a job on a cluster: what counts as hanging, as no progress, as a slow node."""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config.checks import require, require_positive, require_range


@dataclass(frozen=True)
class JobConfig:
    """How a SLURM job looks after a run; nothing here changes what is computed."""

    max_restarts_without_progress: int = 3
    """A run that crashes, hangs or vanishes so many times in a row without a newer checkpoint is not started again."""
    heartbeat_seconds: float = 5.0
    """Between two signs of life of a rank; the job looks as often."""
    start_minutes: float = 30.0
    """Longest silence of a rank from its start to its first step: imports, comparing shards, restoring."""
    data_minutes: float = 10.0
    """Longest wait for rows."""
    step_minutes: float = 10.0
    """Longest forward, backward, or update."""
    save_minutes: float = 30.0
    """Longest write of a checkpoint."""
    validate_minutes: float = 60.0
    """Longest validation, and longest end of a run: the last validation, the n-gram baselines, the report."""
    check_minutes: float = 5.0
    """Longest time that all ranks together may take for the checks before the first step."""
    exclude_hours: float = 24.0
    """How long a node that was found bad, twice in a row, is left out. 0: as long as this chain of jobs goes on."""
    slowest_share: float = 0.5
    """A node whose matrix products or all-reduce run below this share of the nodes' median is left out; 0 leaves none
    out."""

    def __post_init__(self) -> None:
        require_range("job.max_restarts_without_progress", self.max_restarts_without_progress, 1, 10**6)
        for name in ("heartbeat_seconds", "start_minutes", "data_minutes", "step_minutes", "save_minutes",
                     "validate_minutes", "check_minutes"):
            require_positive(f"job.{name}", getattr(self, name), 10**6)
        require_range("job.exclude_hours", self.exclude_hours, 0, 10**6)
        require(0 <= self.slowest_share < 1, "job.slowest_share", self.slowest_share, "a share lies in [0, 1)")
