"""`dlcm evaluate`: the validation table of any checkpoint that is kept, on one process, beside n-gram baselines.

The numbers are those that the run itself logs at a validation: bits per byte and tokens per concept by domain. They may
be asked for other rows (`data.validation_rows=...`) or other shards (`data.root=...`) than the run's own, or in another
precision; what the model is, nothing on the command line can change.

The answer is kept in the run's directory, with what was asked. The run's own question has the plain name
`evaluation-STEP.json`; any other one has a name of its own, so that no answer replaces that to another question. Where
the directory cannot be written, the table is shown all the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dlcm_lightning.atomic_io import sha256_of, write_atomically
from dlcm_lightning.checkpoint.exported import ABOUT
from dlcm_lightning.checkpoint.folder import CONFIG, Checkpoint, open_checkpoint
from dlcm_lightning.checkpoint.probe import Probe
from dlcm_lightning.compose import differences, load_saved_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import CheckpointError, DataError
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.progress import Log
from dlcm_lightning.run_directory import TOKENIZER_FILE
from dlcm_lightning.training.checkpoint_manager import check_fingerprint, load_weights
from dlcm_lightning.training.device import choose_device, resolve_precision
from dlcm_lightning.training.metrics.numbers import metrics_of
from dlcm_lightning.training.metrics.table import baselines_of, validation_table
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.validation import validate

MAY_BE_ASKED = ("data.", "train.precision", "model.attention")
"""Fields, or beginnings of them, that leave the model what it is."""


def evaluate(run: Path, step: int | None, overrides: Sequence[str], log: Log,
             boundaries: Boundaries = "thresholded") -> dict[str, Any]:
    """Metrics of all domains, and of each under "domains". boundaries: how the documents are cut, by the noise of the
    rows where they are sampled. ConfigError: an override of what the model is; other boundaries of a dense model.
    CheckpointError: no such checkpoint, a damaged one, or one of another model. DataError: the rows cannot be read, or
    are those of another tokenizer."""
    if (run / ABOUT).is_file():
        raise CheckpointError(f"{run}: an exported model; dlcm evaluate {run} --tasks ... gives its scores, dlcm "
                              f"analyze {run} its bits per byte")
    checkpoint = open_checkpoint(run, step)
    config, asked = _asked(checkpoint, overrides)
    where = choose_device()
    dtype, why = resolve_precision(config.train.precision, where)
    backend = choose_backend(config.model.attention, where, dtype)
    log(f"{checkpoint.folder} in {dtype}".replace("torch.", "") + f" ({why}), attention {backend}")
    reader = Reader(config.data, config.seed, config.model.vocab_size, log=log)
    _check_tokenizer(run, reader)
    module = PretrainModule(config, dtype, backend, torch.from_numpy(reader.token_bytes))
    module.configure_model()
    load_weights(checkpoint, module)
    module.to(where)
    check_fingerprint(checkpoint, Probe(Tokenizer.load(reader.store)), module)
    module.model.cut_by(boundaries)
    sums = validate(module, ValidationBatches(reader), progress=True, sampled=boundaries == "sampled")
    boundary = module.boundary
    if boundary is not None and boundaries in ("calibrated", "half"):
        boundary = replace(boundary, threshold=boundaries)
    metrics = metrics_of(sums, config.data.domains, boundary)
    counted = baselines_of(reader, log)
    log(validation_table(metrics, counted))
    if boundaries != "thresholded":
        asked["boundaries"] = boundaries
    question = {"overrides": asked, "precision": str(dtype).removeprefix("torch."), "attention": backend,
                "rows": reader.validation_fingerprint}
    content = {"step": checkpoint.step, "tokens": checkpoint.manifest.tokens, "question": question,
               "validation": metrics, "baselines": [asdict(one) for one in counted]}
    kept = _keep(run, checkpoint, question, content)
    log(f"step {checkpoint.step}, {checkpoint.manifest.tokens:,} tokens; {kept}")
    return metrics


def _asked(checkpoint: Checkpoint, overrides: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration to evaluate by, and the fields in which it differs from the run's own, with their values."""
    config = load_saved_config(checkpoint.folder / CONFIG, overrides)
    fields = differences(checkpoint.config, config)
    refused = [name for name in fields if not name.startswith(MAY_BE_ASKED)]
    if refused:
        raise ConfigError(f"{refused[0]} = {_value(config, refused[0])!r}: dlcm evaluate answers for the model as it "
                          "was trained; give fields of data (data.root, data.validation_rows, ...), train.precision or "
                          "model.attention")
    asked = {name: _value(config, name) for name in fields}
    return replace(config, train=replace(config.train, devices=1, nodes=1)), asked


def _value(config: Config, name: str) -> Any:
    """Of a field by its dotted name, as a plain value."""
    found: Any = asdict(config)
    for part in name.replace("[", ".").replace("]", "").split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


def _check_tokenizer(run: Path, reader: Reader) -> None:
    """DataError: the rows are written in other ids than the model was trained on."""
    own = run / TOKENIZER_FILE
    if own.is_file() and sha256_of(own) != Tokenizer.load(reader.store).fingerprint:
        raise DataError(f"data.root = {reader.config.root!r}: its tokenizer.json is not that of {run}, so its ids mean "
                        f"other texts to this model; tokenise the texts with --tokenizer {run}")


def _keep(run: Path, checkpoint: Checkpoint, question: dict[str, Any], content: dict[str, Any]) -> str:
    """Where the answer is kept, or why it is not."""
    file = run / f"evaluation-{checkpoint.step:08d}.json"
    own = not question["overrides"] and question["precision"] == checkpoint.manifest.identity.precision
    if not own or _question_of(file) not in (None, question):
        digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        file = file.with_name(f"{file.stem}-{digest[:8]}.json")
    try:
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())
        return str(file)
    except OSError as error:
        return f"not kept: {file} cannot be written ({error})"


def _question_of(file: Path) -> dict[str, Any] | None:
    """What an answer that is there was given to; None where there is none."""
    try:
        found: dict[str, Any] = json.loads(file.read_bytes())["question"]
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return {}
