"""`dlcm estimate --dry-run`: everything a run does, once, on whatever machine is at hand.

The model of the configuration is made without memory, to count what it really has. Then the same configuration at debug
width runs two real steps with validation, saves after each, is put back after the first, loads that, and must make the
second step again bit for bit; its end is exported and loaded. Strategy, boundary form, schedule, mixture and all else
are the run's own. So are the rows, where its shards are at hand; else some text of Python's own library stands in for
every source.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.config import Config, ModelConfig
from dlcm_lightning.data.preprocessing.stand_in import rows_at_hand
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.export.portable import export, load_model
from dlcm_lightning.model.dlcm import assemble
from dlcm_lightning.run_directory import REPORT_FILE, finished
from dlcm_lightning.scaling.memory import parameters
from dlcm_lightning.training.run import pretrain

STEPS, ROWS = 2, 4


def dry_run(config: Config) -> Iterator[str]:
    """Lines, as far as it comes. Raises whatever the run would raise."""
    with torch.device("meta"):
        model = assemble(config.model, torch.bfloat16, "reference")
    counted = sum(parameter.numel() for parameter in model.parameters())
    if counted != parameters(config.model):
        raise CheckpointError(f"the model has {counted:,} parameters and not {parameters(config.model):,} as counted "
                              "from its shapes; this is a fault of scaling/memory.py")
    yield f"\ndry run      {counted:,} parameters, made without memory"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, stand_in = at_debug_width(config, folder)
        said = "text of Python's library, the run's shards not being at hand" if stand_in else "the run's own shards"
        yield f"rows         {said}; {small.train.strategy}, {small.micro_batches} micro-batches a step"
        report = pretrain(small, _nothing)
        run = Path(small.train.output_dir) / small.name
        yield f"trained      {STEPS} steps, validated, saved: {report.validation['bits_per_byte']:.2f} bits per byte"
        before = folder / "before"
        finished(run, STEPS).rename(before)
        (run / REPORT_FILE).unlink()
        pretrain(small, _nothing)
        yield _compared(Checkpoint(before, Manifest.load(before)),
                        Checkpoint(finished(run, STEPS), Manifest.load(finished(run, STEPS))))
        loaded = sum(one.numel() for one in load_model(export(run, folder / "exported")).parameters())
        yield f"exported     and loaded in plain PyTorch: {loaded:,} parameters"


def _compared(before: Checkpoint, after: Checkpoint) -> str:
    with before.tensors() as mine, after.tensors() as theirs:
        differing = [name for name in mine.names() if not torch.equal(mine.get(name), theirs.get(name))]
        if differing or mine.names() != theirs.names():
            raise CheckpointError(f"loaded and trained on, {len(differing)} tensors differ, {differing[:1]} first")
        return f"loaded       and made the last step again: {len(mine.names())} tensors bit-identical"


def at_debug_width(config: Config, folder: Path) -> tuple[Config, bool]:
    """The configuration with narrow stacks, few short rows and two steps, below a folder; whether other text than its
    own stands in."""
    model = _narrow(config.model)
    data = replace(config.data, sequence_length=min(config.data.sequence_length, 256), global_batch_size=ROWS,
                   micro_batch_size=2,
                   validation_rows=2, workers=0)
    own = data
    data, vocabulary = rows_at_hand(data, config.seed, model.vocab_size, folder / "data")
    stand_in, model = data is not own, replace(model, vocab_size=vocabulary)
    data = replace(data, block_rows=min(data.block_rows, 64), weight_changes=[])
    optim = replace(config.optim, total_tokens=STEPS * data.tokens_per_step, warmup_tokens=0)
    train = replace(config.train, output_dir=str(folder / "runs"), init_from="", devices=1, nodes=1, log_every_steps=1,
                    validate_every_steps=1, checkpoint_every_steps=1, keep_last=2, keep_every_tokens=0)
    return replace(config, name="dry-run", model=model, data=data, optim=optim, train=train), stand_in


def _narrow(model: ModelConfig) -> ModelConfig:
    """Widths of a few dozen; as many layers as two, heads shared as before."""
    def kv(heads: int, kv_heads: int) -> int:
        return max(1, 4 * kv_heads // heads)

    return replace(
        model, d_token=64, d_concept=128, encoder_layers=min(2, model.encoder_layers),
        backbone_layers=min(2, model.backbone_layers), decoder_layers=min(2, model.decoder_layers), heads_token=4,
        kv_heads_token=kv(model.heads_token, model.kv_heads_token), heads_concept=4,
        kv_heads_concept=kv(model.heads_concept, model.kv_heads_concept), head_dim=16, ffn_token=128, ffn_concept=128,
        attention="auto")


def _nothing(message: str) -> None:
    del message
