"""What a run has consumed, and when it meets a document: from its configuration and its position alone.

No log of samples is needed. The order of samples is a function of the configuration, its inverse is one too
(position.py), and a checkpoint states the step and the fingerprint of the text that it was trained on. An audit of
other text than the run's would be a lie, so a fingerprint that differs is an error.

    <run>/config.yaml                           the plan
    <run>/checkpoints/step-*/manifest.json      step, identity; config.yaml beside it: what held until then
    <run>/unreadable-*.jsonl                    rows that were consumed but could not be read: sample, source

A position is a number of steps; what it has consumed are the samples before it, and those alone.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dlcm_lightning.compose import load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.inspection.lookup import Place, streams_of
from dlcm_lightning.data.inspection.position import samples_of
from dlcm_lightning.data.inspection.weights import promised
from dlcm_lightning.data.mixture import Mixture, Stretch
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log

CONFIG, MANIFEST = "config.yaml", "manifest.json"


@dataclass(frozen=True)
class Consumed:
    """What a run has taken from a source."""

    name: str
    domain: str
    rows: int
    exact: Fraction
    """Rows that the weights promise. A block rounds it, so it may be off by a row in each."""
    epochs: Fraction
    """Rows consumed over rows of the source."""
    begun: int
    """Epochs of which a row has been consumed."""
    unreadable: int
    """Rows among them that could not be read."""


@dataclass(frozen=True)
class Appearance:
    """A row that holds some of a document, at one of its places in the order."""

    row: int
    tokens: int
    """Of the document, in this row."""
    epoch: int
    sample: int


@dataclass(frozen=True)
class Audit:
    """A run at a position."""

    run: Path
    config: Config
    reader: Reader
    checkpoint: Path
    """The newest one."""
    checkpoint_step: int
    step: int
    """The position that is looked at, in optimizer steps."""

    @property
    def samples(self) -> int:
        return self.step * self.config.data.global_batch_size

    @property
    def planned_samples(self) -> int:
        return self.config.total_steps * self.config.data.global_batch_size

    @cached_property
    def unreadable(self) -> dict[int, str]:
        """Source by sample, of the rows before the position that the run has found unreadable."""
        found = {}
        for file in sorted(self.run.glob("unreadable-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # a kill may have cut the last one off
                    row = _parsed(line, file)
                    if row["sample"] < self.samples:
                        found[int(row["sample"])] = str(row["source"])
        return found

    def consumed(self) -> list[Consumed]:
        """In the order of `reader.sources`."""
        mixture = self.reader.mixture
        unreadable = Counter(self.unreadable.values())
        exact, begun = promised(mixture, self.config.data, self.samples), self._begun()
        given = mixture.given(self.samples)
        return [Consumed(source.name, source.domain, given[number], exact[number],
                         Fraction(given[number], mixture.parts[number].order.rows), begun[number],
                         unreadable[source.name])
                for number, source in enumerate(self.reader.sources)]

    def _begun(self) -> list[int]:
        """Epochs begun by every source. Within a block a later epoch may come before an earlier one is through."""
        mixture = self.reader.mixture
        whole = self.samples - self.samples % mixture.block_rows
        begun = np.array([-(-rows // part.order.rows)
                          for rows, part in zip(mixture.given(whole), mixture.parts, strict=True)])
        if whole < self.samples:
            drawn = mixture.draw(np.arange(whole, self.samples))
            np.maximum.at(begun, drawn.sources, drawn.epochs + 1)
        found: list[int] = begun.tolist()
        return found

    def appearances(self, place: Place) -> list[Appearance]:
        """Every time that the planned budget reads a document of a training stream, in the order of samples."""
        found = [Appearance(row, tokens, epoch, sample)
                 for row, tokens in self.rows_of(place)
                 for epoch, sample in samples_of(self.reader.mixture, self._number(place), row, self.planned_samples)]
        return sorted(found, key=lambda one: one.sample)

    def rows_of(self, place: Place) -> list[tuple[int, int]]:
        """Rows of its stream that hold some of a document, and how many of its tokens. The tail fills no row."""
        length = self.config.data.sequence_length
        first, end = place.first, place.first + place.tokens
        rows = range(first // length, min((end - 1) // length + 1, place.source.rows(length)))
        return [] if place.skipped else [
            (row, min(end, (row + 1) * length) - max(first, row * length)) for row in rows]

    def _number(self, place: Place) -> int:
        return next(number for number, stream in enumerate(streams_of(self.reader, "train"))
                    if stream is place.source)


def open_audit(run: str | Path, overrides: Sequence[str] = (), at_step: int | None = None,
               log: Log = print) -> Audit:
    """Opens the data of a run. overrides: of its configuration, data.root=... where they have moved.

    DataError: no run, no checkpoint, a step beyond its end, other text or another order than it was trained on.
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise DataError(f"{run}: holds no {CONFIG}, so it is no run; name its directory, runs/NAME")
    folder, found = _newest(run)
    config = load_saved_config(run / CONFIG, overrides)
    written = load_saved_config(folder / CONFIG, [f"data.root={json.dumps(config.data.root)}"])
    step, reached = int(found["step"]), int(found["step"]) * written.data.global_batch_size
    position = step if at_step is None else at_step
    if not 0 <= position <= config.total_steps:
        raise DataError(f"--at-step {position}: the run has {config.total_steps} steps")
    reader = Reader(config.data, config.seed, config.model.vocab_size, verify_all=False, log=log)
    if reader.fingerprint != found["identity"]["data_fingerprint"]:
        raise DataError(f"data.root = {config.data.root!r}: its shards or their order are not those that {folder} was "
                        "trained on; give the data of the run as data.root=..., or restore them")
    reader.check_lasts(config.total_steps * config.data.global_batch_size)
    before = reader
    if (written.data.sources, written.data.weight_changes) != (config.data.sources, config.data.weight_changes):
        before = Reader(written.data, written.seed, written.model.vocab_size, verify_all=False, log=log)
    if written.data.global_batch_size != config.data.global_batch_size or (
            _stretches(before.mixture, reached) != _stretches(reader.mixture, reached)):
        raise DataError(f"{run / CONFIG}: gives other rows before step {step} than {folder / CONFIG}, by which they "
                        "were read; restore it, and leave out overrides that change the past")
    return Audit(run, config, reader, folder, step, position)


def _stretches(mixture: Mixture, samples: int) -> list[Stretch]:
    starts = [stretch.first_block * mixture.block_rows for stretch in mixture.stretches]
    return mixture.stretches[:bisect_right(starts, max(0, samples - 1))]


def _newest(run: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose manifest can be read, and the manifest. A running job may remove old ones."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            found = json.loads((folder / MANIFEST).read_bytes())
            if isinstance(found["step"], int) and isinstance(found["identity"]["data_fingerprint"], str):
                return folder, found
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
        except OSError as error:
            raise DataError(f"{folder / MANIFEST} cannot be read ({error}); give this user the permission, or see to "
                            "the disk") from error
    raise DataError(f"{run / 'checkpoints'}: holds no checkpoint, so the run has consumed nothing that would last; "
                    "wait for its first one")


def _parsed(line: str, file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(line)
        if isinstance(found["sample"], int) and isinstance(found["source"], str):
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{file}: {line[:80]!r} is no record of an unreadable row; remove the line")
