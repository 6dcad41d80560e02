"""Checkpoints that are whole or not there.

    <run>/checkpoints/step-00001000/
        state.ckpt       weights, optimizer, loops, loader position, callbacks: Lightning's file
        config.yaml      the resolved configuration of the run that wrote it
        manifest.json    step, precision, what rows it was trained on, and size and sha256 of the other files

A checkpoint is written in a folder with a temporary name, flushed to the disk, described by its manifest, and renamed
as the last act. Whatever moment a kill hits, a folder that is called `step-...` is complete; what a kill leaves behind
has another name and is swept away at the next start. On resuming, the newest one whose files agree with its manifest
is taken; a damaged one is named, and the one before it is tried.

The manifest is read, and the hashes compared, before the file is opened; it is opened weights-only, so that nothing
in it can run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config
from dlcm_lightning.durable import flush, sha256_of

FOLDER = "checkpoints"
PREFIX = "step-"
UNFINISHED = ".unfinished-"
DAMAGED = "damaged-"
STATE = "state.ckpt"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or none that can be read. Names the file and the remedy."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint continues, beside its configuration."""

    data_fingerprint: str
    """`Reader.fingerprint` of the rows it was trained on."""
    precision: str
    """Of the matrix products, as `train.precision: auto` resolved it."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files agree with its manifest."""

    folder: Path
    step: int
    """Optimizer steps behind it."""
    identity: Identity

    @property
    def state(self) -> Path:
        return self.folder / STATE

    @property
    def config(self) -> Config:
        """Of the run that wrote it."""
        return load_config(self.folder / CONFIG)


def unfinished_state(run: Path, step: int) -> Path:
    """Where the state file of a step is written before it counts."""
    return run / FOLDER / f"{UNFINISHED}{step}" / STATE


def write_checkpoint(
    run: Path, step: int, config: Config, identity: Identity, save: Callable[[Path], None]
) -> Path:
    """Lets `save` write the state file and makes a checkpoint of it. Rank 0 alone.

    Raises CheckpointError where the disk is full or not writable; earlier checkpoints are left as they are.
    """
    parent = run / FOLDER
    unfinished, final = unfinished_state(run, step).parent, parent / f"{PREFIX}{step:08d}"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save(unfinished / STATE)
        save_config(config, unfinished / CONFIG)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(unfinished.iterdir())
        }
        manifest = {"format": FORMAT, "step": step, **asdict(identity), "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for file in unfinished.iterdir():
            flush(file)
        flush(unfinished)
        shutil.rmtree(final, ignore_errors=True)  # one of the same step that was found damaged
        unfinished.rename(final)
        flush(parent)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = [folder.name for folder in checkpoint_folders(run)]
        raise CheckpointError(
            f"checkpoint of step {step} could not be written to {parent}: {error}. Complete ones kept there: "
            f"{', '.join(kept) or 'none'}. Free space or correct the permissions, then start the run again: it "
            "continues from the newest."
        ) from error
    return final


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    return sorted(folder for folder in (run / FOLDER).glob(f"{PREFIX}*") if folder.is_dir())


def sweep(run: Path, keep_last: int) -> None:
    """Removes unfinished checkpoints and all but the newest `keep_last` complete ones."""
    for folder in (run / FOLDER).glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in checkpoint_folders(run)[:-keep_last]:
        shutil.rmtree(folder, ignore_errors=True)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Compares a checkpoint with its manifest. Raises CheckpointError that names what is wrong with which file."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{folder / MANIFEST}: format {manifest['format']}, this version reads {FORMAT}")
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}")
            if sha256_of(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its sha256 differs from the manifest's")
        identity = Identity(str(manifest["data_fingerprint"]), str(manifest["precision"]))
        return Checkpoint(folder, int(manifest["step"]), identity)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error!r}") from error


def newest_checkpoint(run: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run, None where there is none.

    Each damaged one that it passes over is named and set aside under another name, so that it no longer counts among
    those that are kept. Raises CheckpointError where all are damaged: starting anew would overwrite them.
    """
    folders, damaged = checkpoint_folders(run), []
    for folder in reversed(folders):
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError as error:
            report(f"checkpoint {folder.name} is not used: {error}")
            damaged.append(folder)
            continue
        for other in damaged:
            other.replace(other.with_name(f"{DAMAGED}{other.name}"))
        return checkpoint
    if folders:
        raise CheckpointError(f"all {len(folders)} checkpoints in {run / FOLDER} are damaged; move the folder away to "
                              "train from the beginning")
    return None
