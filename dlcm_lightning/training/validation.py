"""Validation: thresholded boundaries, as at inference, over the validation rows of every source."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dlcm_lightning.batch import Batch, StepCounts
from dlcm_lightning.progress import progress_bar
from dlcm_lightning.training.metrics.sums import MetricSums, all_reduce_sums
from dlcm_lightning.training.module import PretrainModule


@torch.no_grad()
def validate(module: PretrainModule, batches: Iterable[Batch], progress: bool = False, sampled: bool = False
             ) -> MetricSums:
    """The sums of `batches` over all ranks. The count of sampled boundaries uses the rows' noise and the same p;
    sampled: the model is cut by them too, as in training."""
    whole = MetricSums.nothing(len(module.config.data.domains), module.device)
    for batch in progress_bar(batches, desc="validate", unit="batch", disable=not progress):
        batch = batch.to(module.device)
        whole = whole + module.measure(batch, batch.noise if sampled else None)[0]
    return all_reduce_sums(whole, StepCounts())[0]
