"""How fast a run is, beside what its machine could do: MFU, and the share of the rate that was measured.

FLOPs are those of the concepts and documents that really came: causal attention counted half, the head counted, the
embedding not, recomputation not (flops.py). MFU is their share of what the data sheet of a GPU promises, and no number
where that is not known. A data sheet promises what no card reaches; so the rate at which this device multiplies large
matrices is measured at the start of a run, and the share of that is shown beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config import Config
from dlcm_lightning.flops import training_flops_per_token
from dlcm_lightning.training.metrics.sums import MetricSums


@dataclass(frozen=True)
class Machine:
    """FLOP/s of the processes of a run together: of their GPUs, or of the cores that they share."""

    product_rate: float
    """Of large matrix products, measured."""
    peak: float | None
    """By the data sheet; None where it is not known."""


@dataclass(frozen=True)
class Speed:
    """Of some steps."""

    tokens_per_second: float
    """Steps only: validation and checkpoints do not count."""
    flops_per_token: float
    """Forward and backward, of the concepts and documents that really came."""
    matrix_product_rate: float
    """FLOP/s of large products on this machine."""
    data_wait: float
    """Share of the steps' time in which the model waited for data."""
    peak: float | None = None
    """FLOP/s by the data sheet."""

    @property
    def share(self) -> float:
        """Of the machine's matrix-product rate that steps reached."""
        return self.tokens_per_second * self.flops_per_token / self.matrix_product_rate

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the share of the peak; None where that is not known."""
        return self.tokens_per_second * self.flops_per_token / self.peak if self.peak else None


def speed_of(config: Config, sums: MetricSums, seconds: float, waited: float, machine: Machine) -> Speed | None:
    """sums: of whole steps, over all ranks, that took `seconds`, `waited` of them for data. Reads numbers that a logged
    line reads too. None where there was no token."""
    if seconds == 0 or not (tokens := sums.total("tokens").item()):
        return None
    concepts = sums.rate.item() if config.model.kind == "dlcm" else None
    flops = training_flops_per_token(config.model, max(1.0, sums.scalar("squared_lengths").item() / tokens), concepts)
    return Speed(tokens / seconds, flops, machine.product_rate, waited / seconds, machine.peak)
