"""`dlcm upcycle`: a dense model's weights as the beginning of a DLCM, or of a dense model of ours.

    OUT/    an export of ours (export/portable.py), and the tokenizer's tokenizer_config.json; portable.json says at
            "upcycled" where it comes from and what became of it

    dlcm upcycle SOURCE OUT --config RUN_FILE
    dlcm pretrain RUN_FILE train.init_from=OUT

What goes where: placement.py. Our logits are multiplied by 1 / s_token, hence the unembedding begins as the source's
times s_token. Before OUT has its name, what was written is loaded, and its loss on the probe texts has to be that of
the source, computed by a dense model of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dlcm_lightning.checkpoint.probe import LOSS_TOLERANCE, Probe
from dlcm_lightning.config import Config
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export.portable import SPLIT_BYTES, Trained, finish, making, write_state
from dlcm_lightning.model import mup
from dlcm_lightning.model.dlcm import LanguageModel, assemble
from dlcm_lightning.upcycling.filling import Filling
from dlcm_lightning.upcycling.placement import place_layers
from dlcm_lightning.upcycling.source import DenseSource
from dlcm_lightning.upcycling.spelling import Spelling

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Upcycled:
    """What became of a source."""

    report: list[str]
    """What was copied, widened, made and left out, a line each."""
    source_loss: float
    """Nats per token of the probe texts, of the source as a dense model."""
    loss: float
    """The same of what was written."""


def upcycle(source: DenseSource, config: Config, out: str | Path, *, spelling: Spelling | None = None,
            skip_layers: bool = False, seed: int | None = None, split_bytes: int = SPLIT_BYTES) -> Upcycled:
    """Writes OUT whole or not at all. spelling: in place of the source's. skip_layers: layers between encoder and
    decoder may be left out. seed: of what is made; None: that of the configuration.

    ConfigError: the model does not fit the source. CheckpointError: OUT exists or cannot be written, no tokenizer, what
    was written computes something else than the source.
    """
    with making(Path(out)) as folder:
        return _write(folder, source, config, spelling, skip_layers, seed, split_bytes)


def _write(folder: Path, source: DenseSource, config: Config, spelling: Spelling | None, skip_layers: bool,
           seed: int | None, split_bytes: int) -> Upcycled:
    placement = place_layers(source, config, skip_layers)
    tokenizer, said = _spelling(source, spelling)
    probe = Probe(tokenizer)
    source_loss = probe.fingerprint(dense_model(source), HOST).loss
    model = assemble(config.model, torch.float32, "sdpa")
    seed = config.seed if seed is None else seed
    mup.initialise(model, config.model, seed)
    report = list(Filling(model, source, placement, seed).report())
    report += [f"{'tokenizer':<30}  {said}"] if said else []
    fingerprint = probe.fingerprint(model.eval(), HOST)
    same = math.isclose(fingerprint.loss, source_loss, rel_tol=LOSS_TOLERANCE[torch.float32])
    if not same and not placement.skipped(source.shape.layers):
        raise CheckpointError(f"{source.origin}: not written, for its loss on the probe texts would be "
                              f"{fingerprint.loss:.6g} and is {source_loss:.6g}; this is a fault of upcycling/")
    state = dict(model.state_dict())
    write_state(state, folder, split_bytes)
    tokenizer.save(folder)
    origin = {"source": source.origin, "source_loss": source_loss, "report": report}
    finish(folder, Trained(folder, config, tokenizer, state, 0, 0, fingerprint, False, tokenizer.fingerprint,
                           upcycled=origin), "fp32")
    return Upcycled(report, source_loss, fingerprint.loss)


@torch.no_grad()
def dense_model(source: DenseSource, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The source as a dense model of ours, parameters and arithmetic in a dtype."""
    model = assemble(source.shape.config(), dtype, "sdpa")
    for name, owner in mup.role_parameters(model):
        owner.weight.copy_(source.get(name))
    return model.eval()


def _spelling(source: DenseSource, given: Spelling | None) -> tuple[Tokenizer, str]:
    """The tokenizer of what is written, and what was changed in it."""
    spelling = given or source.spelling
    found = spelling.tokenizer
    if found is None:
        raise CheckpointError(f"{spelling.said}; give the source's tokenizer with --tokenizer FOLDER, which holds "
                              "tokenizer.json and a tokenizer_config.json that names bos_token and eos_token")
    if found.vocab_size > source.shape.vocab_size:
        raise CheckpointError(f"--tokenizer: it has {found.vocab_size} ids, and the source {source.shape.vocab_size}; "
                              "give the source's own tokenizer")
    return found, spelling.said
