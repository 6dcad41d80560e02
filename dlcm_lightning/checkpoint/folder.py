"""Checkpoints that are whole or not there, and that are known to be what they were when they were written.

    <run>/checkpoints/step-00000300/
        state-00000-of-00004.safetensors ...   weights, moments, buffers: tensors.py; one file a rank that wrote
        callbacks.json                         what watches the run, where it holds numbers
        config.yaml                            the resolved configuration of the run that wrote it
        manifest.json                          step, tokens, precision, strategy, what rows it was trained on, what the
                                               model says of a fixed text, size and sha256 of the other files

All ranks write into a folder with a temporary name and flush what they wrote; when all are done, one describes it and
renames it as the last act. Whatever moment a kill hits, a folder that is called `step-...` is complete; what a kill
leaves behind has another name and is swept away at the next start. On resuming, the newest one whose files agree with
its manifest is taken; a damaged one is named, and the one before it is tried. One that cannot be read, for want of
permission or because its disk fails, and one of another version are not damaged: they are named and left as they are.

The manifest is read, and the hashes compared, before anything else is opened. Nothing in a checkpoint can run code: it
is JSON, YAML of plain values, and safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import flush, sha256_of, write_atomically
from dlcm_lightning.checkpoint.tensors import SUFFIX, Tensors
from dlcm_lightning.compose import load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.errors import CheckpointError, DamagedCheckpoint
from dlcm_lightning.run_directory import CHECKPOINTS, UNFINISHED, finished, folders, unfinished

DAMAGED = "damaged-"
CALLBACKS = "callbacks.json"
CONFIG = "config.yaml"
MANIFEST = "manifest.json"
FORMAT = 3


@dataclass(frozen=True)
class Identity:
    """What a checkpoint continues, beside its configuration."""

    data_fingerprint: str
    """`Reader.fingerprint` of the rows it was trained on."""
    precision: str
    """Of the matrix products, as `train.precision: auto` resolved it."""
    attention: str = ""
    """The backend that `model.attention: auto` resolved to; empty where an older version has written it."""


@dataclass(frozen=True)
class Fingerprint:
    """What a model says of a fixed text: a checkpoint that loads but computes something else says something else."""

    loss: float
    """Nats per token."""
    boundaries: str
    """Thresholded, a 0 or 1 a token; empty for a dense model."""


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    step: int
    """Optimizer steps that the run had made."""
    tokens: int
    """Consumed up to it, over all ranks."""
    strategy: str
    ranks: int
    """That wrote it. Any number reads it, under any strategy."""
    identity: Identity
    fingerprint: Fingerprint
    files: dict[str, dict[str, Any]]
    """By name: bytes and sha256 of every other file."""
    format: int = FORMAT

    @staticmethod
    def load(folder: Path) -> Manifest:
        """DamagedCheckpoint: missing, or not a manifest. CheckpointError: another format, or it cannot be read."""
        file = folder / MANIFEST
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
            if found["format"] != FORMAT:
                raise CheckpointError(f"{file}: format {found['format']!r}, this version reads {FORMAT}: it was "
                                      "written by another version, which can go on with it; or choose another name=...")
            known = {one.name: found[one.name] for one in fields(Manifest)}
            return Manifest(**{**known, "identity": Identity(**found["identity"]),
                               "fingerprint": Fingerprint(**found["fingerprint"])})
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{file} is missing") from None
        except OSError as error:
            raise _unreadable(file, error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(f"{file} is damaged: no manifest ({error!r})") from error

    def damages(self, folder: Path, part: int = 0, parts: int = 1) -> list[str]:
        """What is wrong with every parts-th file from `part` on: readers share the hashing. CheckpointError: one cannot
        be read."""
        return [said for name in sorted(self.files)[part::parts] if (said := self.damage(folder / name))]

    def damage(self, file: Path) -> str:
        """What is wrong with one file, or nothing. CheckpointError: it cannot be read."""
        if file.name not in self.files:
            return f"{file} is not in {MANIFEST}"
        expected = self.files[file.name]
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{file} has {size} bytes instead of {expected['bytes']}"
            if sha256_of(file) != expected["sha256"]:
                return f"{file} is damaged: its sha256 differs from the manifest's"
        except FileNotFoundError:
            return f"{file} is missing"
        except OSError as error:
            raise _unreadable(file, error) from error
        return ""


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{file} cannot be read ({error}); nothing is wrong with the checkpoint for all that is "
                           "known: give this user the permission to read it, or see to the disk")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def config(self) -> Config:
        """Of the run that wrote it."""
        return load_saved_config(self.folder / CONFIG)

    @property
    def callbacks(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / CALLBACKS).read_bytes())
        return found

    def tensors(self) -> Tensors:
        return Tensors(self.folder / name for name in self.manifest.files if name.endswith(SUFFIX))


def open_checkpoint(run: Path, step: int | None) -> Checkpoint:
    """The newest checkpoint of a run, or that of a step, every byte compared. CheckpointError: none, damaged, or it
    cannot be read."""
    if step is not None and not finished(run, step).is_dir():
        kept = ", ".join(str(int(folder.name.rpartition("-")[2])) for folder in folders(run))
        raise CheckpointError(f"{run}: has no checkpoint of step {step}; there are {kept or 'none'}")
    found = [finished(run, step)] if step is not None else folders(run)[-1:]
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint; name the directory of a run, runs/NAME")
    checkpoint = Checkpoint(found[0], Manifest.load(found[0]))
    if damages := checkpoint.manifest.damages(found[0]):
        raise CheckpointError(f"{damages[0]}; choose another step")
    return checkpoint


def describe_file(file: Path) -> dict[str, Any]:
    """Flushes a file to the disk; its entry in the manifest."""
    flush(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def complete(run: Path, manifest: Manifest) -> Path:
    """The last act, when all files are written and flushed: manifest, rename."""
    folder, final = unfinished(run, manifest.step), finished(run, manifest.step)
    write_atomically(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode())
    shutil.rmtree(final, ignore_errors=True)  # one of the same step that was found damaged
    folder.rename(final)
    flush(final.parent)
    return final


def sweep(run: Path, keep_last: int, keep_every_tokens: int = 0) -> None:
    """Removes unfinished checkpoints and all complete ones but the newest `keep_last` and, of every
    `keep_every_tokens` consumed tokens, the first."""
    for folder in (run / CHECKPOINTS).glob(f"{UNFINISHED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    kept = folders(run)
    for_good = milestones(kept, keep_every_tokens)
    for folder in kept[:-keep_last]:
        if folder not in for_good:
            shutil.rmtree(folder, ignore_errors=True)


def milestones(kept: Iterable[Path], every_tokens: int) -> set[Path]:
    """The first checkpoint at or after every multiple of so many tokens, and whatever cannot be asked for them."""
    found: dict[int, Path] = {}
    unknown = set()
    for folder in kept if every_tokens else ():
        try:
            reached = Manifest.load(folder).tokens // every_tokens
        except DamagedCheckpoint:
            continue
        except CheckpointError:
            unknown.add(folder)
            continue
        if reached:
            found.setdefault(reached, folder)
    return {*found.values(), *unknown}


def set_aside(damaged: Iterable[Path]) -> None:
    """Gives damaged checkpoints names by which they no longer count."""
    for folder in damaged:
        target = folder.with_name(f"{DAMAGED}{folder.name}")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
