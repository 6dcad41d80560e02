"""`dlcm analyze`: everything together.

    RUN/analysis-STEP.html    the page
    RUN/analysis-STEP.json    every number on it
    RUN/analysis-STEP/        the same as TensorBoard events, which `tensorboard --logdir runs` finds

The page is made from the JSON alone: what stands on it stands there. Where a part makes no sense for a model, it says
why. The same model on the same rows gives the same files, byte for byte but for TensorBoard's times.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import CheckpointError, ConfigError
from dlcm_lightning.evaluation.analysis.absent import DENSE, absent
from dlcm_lightning.evaluation.analysis.alignment import alignment
from dlcm_lightning.evaluation.analysis.bits_per_byte import bits_per_byte
from dlcm_lightning.evaluation.analysis.compute import compute
from dlcm_lightning.evaluation.analysis.concept_lengths import concept_lengths
from dlcm_lightning.evaluation.analysis.concept_position import loss_by_position
from dlcm_lightning.evaluation.analysis.content_types import content_types
from dlcm_lightning.evaluation.analysis.documents import documents
from dlcm_lightning.evaluation.analysis.events import write_events
from dlcm_lightning.evaluation.analysis.observation import Answer, Tokens, observe, read_tokens
from dlcm_lightning.evaluation.analysis.page import page
from dlcm_lightning.evaluation.analysis.ratio_history import ratio_history
from dlcm_lightning.evaluation.analysis.stability import agreement
from dlcm_lightning.evaluation.analysis.subject import Subject, check_same_tokenizer, open_rows, open_subject
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import folders

FORMAT = 1
DOCUMENTS = 2
"""Shown of every domain."""


@dataclass(frozen=True)
class _Looked:
    """What all parts are made from."""

    subject: Subject
    tokens: Tokens
    answer: Answer
    other: Answer | None


def analyze(place: str | Path, *, step: int | None = None, against: str | Path | None = None,
            out: str | Path | None = None, rows: int | None = None, documents: int = DOCUMENTS,
            overrides: Sequence[str] = (), log: Log = print) -> Path:
    """Writes the page, its numbers and TensorBoard events; returns the page.

    place: a run's directory or an export. step: of a run's checkpoint, or the newest. against: another one with the
    same tokenizer, compared on the same tokens. out: the page, FILE.html. rows: validation rows of each source at most.
    documents: shown of each domain. overrides: fields of `data`, such as data.root=... if the data have moved.
    CheckpointError: there is no model, or a damaged one. ConfigError: what was asked cannot be. DataError: the rows
    cannot be read, or are those of another tokenizer.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows {rows}: at least one validation row of each source is needed")
    if documents < 0:
        raise ConfigError(f"--documents {documents}: cannot be negative; 0 shows none")
    subject = open_subject(place, step)
    file = Path(out) if out is not None else Path(place) / f"analysis-{subject.trained.step:08d}.html"
    _check_writable(file)
    compared = open_subject(against) if against is not None else None
    if compared is not None:
        check_same_tokenizer(subject.trained, compared.trained)
    reader = open_rows(subject.trained, rows, overrides, log)
    tokens = read_tokens(reader)
    looked = _Looked(subject, tokens, observe(subject.model, reader, "analyze"),
                     observe(compared.model, reader, "the other model") if compared else None)
    found = {"format": FORMAT, "run": _about(subject, place, looked.answer),
             "against": _about(compared, against, looked.other) if compared and against is not None else None,
             "rows": _rows(tokens, reader)}
    found |= _parts(looked, reader, documents)
    text = json.dumps(_plain(found), ensure_ascii=False, allow_nan=False, indent=1) + "\n"
    _write(file, text)
    log(f"{file}: {subject.name}, step {subject.trained.step:,}, {tokens.rows:,} validation rows; numbers in "
           f"{file.with_suffix('.json').name}, TensorBoard events in {file.with_suffix('').name}/")
    return file


def _parts(looked: _Looked, reader: Reader, count: int) -> dict[str, Any]:
    """By name, in the order of the page."""
    subject, tokens, answer, other = looked.subject, looked.tokens, looked.answer, looked.other
    tokenizer, config = subject.trained.tokenizer, subject.trained.config.model
    shown = documents(tokens, answer, tokenizer, count)
    quality = bits_per_byte(tokens, answer, other)
    if answer.boundaries is None:
        names = ("content_types", "loss_by_position", "ratio_history", "concept_lengths", "alignment", "stability")
        return {"documents": shown, **{name: absent(DENSE) for name in names}, "bits_per_byte": quality,
                "compute": compute(config, None)}
    return {"documents": shown, "content_types": content_types(subject),
            "loss_by_position": loss_by_position(tokens, answer, other),
            "ratio_history": ratio_history(subject.trained.folder, config.boundary.target_ratio, subject.trained.step),
            "concept_lengths": concept_lengths(tokens, answer), "alignment": alignment(tokens, answer, tokenizer),
            "stability": _stability(looked, reader), "bits_per_byte": quality,
            "compute": compute(config, len(tokens) / int(answer.boundaries.sum()))}


def _stability(looked: _Looked, reader: Reader) -> dict[str, Any]:
    """Of the kept checkpoints of a run. One that cannot be read is named and left out."""
    trained = looked.subject.trained
    if trained.folder is None:
        return absent("an export is one model; name the directory of the run to compare its checkpoints")
    steps = [int(folder.name.rpartition("-")[2]) for folder in folders(trained.folder)]
    if len(steps) < 2:
        return absent("the run keeps one checkpoint only; train.keep_last and train.keep_every_tokens keep more")
    decisions, skipped = {}, []
    for step in steps:
        try:
            answer = looked.answer if step == trained.step else observe(
                open_subject(trained.folder, step).model, reader, f"step {step}")
        except (CheckpointError, ConfigError, OSError) as error:  # a running job may remove it meanwhile
            skipped.append({"step": step, "reason": str(error)})
            continue
        if answer.boundaries is not None:
            decisions[step] = answer.boundaries
    newest = max(decisions)
    return {"newest": newest, "skipped": skipped, "checkpoints": [
        {"step": step, **agreement(looked.tokens.first, found, decisions[newest])}
        for step, found in decisions.items() if step != newest]}


def _about(subject: Subject, place: str | Path, answer: Answer | None) -> dict[str, Any]:
    trained, config = subject.trained, subject.trained.config.model
    assert answer is not None
    found: dict[str, Any] = {
        "name": subject.name, "place": str(place), "step": trained.step, "tokens": trained.tokens,
        "kind": config.kind, "parameters": sum(one.numel() for one in subject.model.parameters()),
        "precision": "float32", "attention": subject.model.backend}
    if answer.boundaries is not None:
        found |= {"form": config.boundary.form, "target_ratio": config.boundary.target_ratio,
                  "tokens_per_concept": len(answer.boundaries) / int(answer.boundaries.sum()),
                  "threshold": answer.threshold}
    return found


def _rows(tokens: Tokens, reader: Reader) -> dict[str, Any]:
    return {"rows": tokens.rows, "sequence_length": reader.config.sequence_length, "tokens": len(tokens),
            "pieces": int(tokens.first.sum()), "documents": int(tokens.documents[-1]) + 1,
            "per_source": reader.config.validation_rows, "fingerprint": reader.validation_fingerprint,
            "domains": [tokens.names[domain] for domain in tokens.present]}


def _plain(value: Any) -> Any:
    """Numbers that JSON knows; None for those it does not."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_writable(file: Path) -> None:
    """ConfigError: the page cannot be written there. Asked before minutes are spent."""
    remedy = "give --out FILE.html in a folder that can be written"
    if file.suffix != ".html" or file.is_dir():
        raise ConfigError(f"--out {file}: name a file that ends in .html; its numbers go beside it as .json")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}; {remedy}")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{file}: {file.parent} may only be read; {remedy}")


def _write(file: Path, text: str) -> None:
    """ConfigError: the disk is full, or what is there cannot be replaced."""
    numbers = json.loads(text)
    try:
        write_atomically(file.with_suffix(".json"), text.encode())
        write_atomically(file, page(numbers).encode())
        write_events(file.with_suffix(""), numbers)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error}); free space, or give --out FILE.html elsewhere"
                          ) from error
