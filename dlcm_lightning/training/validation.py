"""Validation: thresholded boundaries, as at inference, over the validation rows of every source."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from tqdm import tqdm

from dlcm_lightning.batch import Batch
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.objective import Tally


@torch.no_grad()
def validate(module: PretrainModule, batches: Iterable[Batch], progress: bool = False) -> Tally:
    """The tally of `batches` over all ranks. The count of sampled boundaries uses the rows' noise and the same p."""
    whole = module.empty_tally()
    shown = progress and sys.stderr.isatty()
    for batch in tqdm(batches, desc="validate", unit="batch", disable=not shown, leave=False):
        _, local, _ = module.tally(batch.to(module.device), None)
        whole = whole + local
    return whole.all_reduced()
