"""`dlcm merge`: one model whose weights are the mean of several checkpoints of a run.

Where the learning rate is held, weights wander around where a decay would take them; their mean is nearer to it and
costs no training. It stands in for `dlcm anneal` while a run is under way, and does not replace it: compare both
(`dlcm evaluate`). The boundary's buffers, among them its threshold, are averaged as the weights are.

The mean is taken in float64, one tensor at a time, and stored in float32 in the folder of `dlcm export`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from dlcm_lightning.checkpoint.folder import Checkpoint, open_checkpoint
from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.errors import CheckpointError, ConfigError
from dlcm_lightning.export.portable import (
    SPLIT_BYTES,
    Trained,
    finish,
    making,
    model_of,
    open_trained,
    rounded,
    write_state,
)
from dlcm_lightning.run_directory import folders

HOST = torch.device("cpu")


def merge_checkpoints(run: Path, out: Path, *, last: int | None = None, steps: Sequence[int] = (),
                      dtype: Literal["fp32", "bf16"] = "fp32", split_bytes: int = SPLIT_BYTES) -> Trained:
    """Writes OUT whole or not at all; what it holds. last: so many of the newest checkpoints; steps: or those of these
    optimizer steps.

    ConfigError: fewer than two are named, or one twice. CheckpointError: one is not there, damaged, or of other
    tensors; OUT exists, or cannot be written."""
    chosen = chosen_steps(run, last, steps)
    with making(out) as folder:
        checkpoints = [open_checkpoint(run, step) for step in chosen]
        newest = open_trained(run, chosen[-1])
        state = mean_state(checkpoints, newest)
        model = model_of(newest.config, state, torch.float32, HOST, str(run))
        fingerprint = Probe(newest.tokenizer).fingerprint(model, HOST)
        merged = replace(newest, state=state, fingerprint=fingerprint, rough=False, place=folder, merged=tuple(chosen))
        write_state(rounded(state, dtype), folder, split_bytes)
        merged.tokenizer.save(folder)
        finish(folder, merged, dtype)
    return merged


def chosen_steps(run: Path, last: int | None, steps: Sequence[int]) -> list[int]:
    """Oldest first. ConfigError, CheckpointError: see `merge_checkpoints`."""
    if (last is None) == (not steps):
        raise ConfigError("dlcm merge: say --last K or --steps A B ..., one of the two")
    kept = [int(folder.name.rpartition("-")[2]) for folder in folders(run)]
    if last is not None:
        if last > len(kept):
            raise CheckpointError(f"--last {last}: {run} keeps {len(kept)} checkpoints; train.keep_last or "
                                  "train.keep_every_tokens keeps more of them")
        return kept[-last:]
    if len(set(steps)) < len(steps):
        raise ConfigError(f"--steps {' '.join(map(str, steps))}: one of them stands there twice")
    return sorted(steps)


@torch.no_grad()
def mean_state(checkpoints: Sequence[Checkpoint], like: Trained) -> dict[str, torch.Tensor]:
    """By their names in the model, float32."""
    state: dict[str, torch.Tensor] = {}
    with ExitStack() as opened:
        stored = [opened.enter_context(checkpoint.tensors()) for checkpoint in checkpoints]
        for name, known in like.state.items():
            where = next(one for one in (f"weight/{name}", f"buffer/model.{name}") if one in stored[-1].names())
            try:
                total = sum((one.get(where).double() for one in stored), torch.zeros(known.shape, dtype=torch.float64))
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(f"{checkpoints[0].folder.parent}: its checkpoints hold other tensors ({error}); "
                                      "name some of one model") from error
            state[name] = (total / len(stored)).to(known.dtype)
    return state
