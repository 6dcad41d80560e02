"""Who is asked: a run's checkpoint, an export, or a model of transformers, made ready for lm-eval."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dlcm_lightning import __version__
from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.checkpoint.exported import ABOUT
from dlcm_lightning.checkpoint.folder import MANIFEST
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import ConfigError, DataError
from dlcm_lightning.evaluation.tasks.harness import ConceptLM, HubLM
from dlcm_lightning.evaluation.tasks.scoring import BATCH_TOKENS, Scorer
from dlcm_lightning.evaluation.tasks.sharing import Answers
from dlcm_lightning.export.portable import Trained, model_of, open_trained
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.model.dlcm import DLCM, LanguageModel
from dlcm_lightning.ops.collectives import rank
from dlcm_lightning.progress import progress_bar

HUB = "hf:"
COMPARED = 64
"""Batches of validation rows on which boundaries of half precision are compared with those of fp32."""


@dataclass(frozen=True)
class Question:
    """What a model is asked, and how."""

    tasks: tuple[str, ...]
    """Of lm-eval."""
    boundaries: Boundaries = "thresholded"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU, where it is exact."""
    fewshot: int = 0
    """Solved questions in front of each."""
    limit: int | None = None
    """Questions of every task (of every subject) at most: for a first look."""
    context: int | None = None
    """The most tokens of a text; that of the run's rows where nothing is said."""
    trust_remote_code: bool = False
    """Whether a Hugging Face folder may bring code of its own, as `dlcm export --hf` writes it."""
    batch_tokens: int = BATCH_TOKENS
    """Of a batch of ours; a Hugging Face model takes one sequence for each 1,024 of them."""


@dataclass(frozen=True)
class Asked:
    """A model, ready to be asked."""

    lm: ConceptLM | HubLM
    step: int | None
    """Of a run or an export."""
    out: Path
    """Where answers and results go."""
    facts: list[str]


def open_model(place: str, question: Question, step: int | None, out: Path | None, where: torch.device,
               group: dist.ProcessGroup | None) -> Asked:
    """See `evaluate`. group: of all ranks."""
    low = question.precision == "bf16" or (question.precision == "auto" and where.type == "cuda")
    dtype = torch.bfloat16 if low else torch.float32
    if place.startswith(HUB):
        return _hub_model(place, question, step, out, where, dtype, group)
    trained = open_trained(place, step)
    model = model_of(trained.config, trained.state, dtype, where, str(trained.place))
    trained.check(model)
    out = out or (trained.folder / f"tasks-{trained.step:08d}" if trained.folder
                  else Path(f"tasks-{Path(place).resolve().name}"))
    context = question.context or trained.config.data.sequence_length
    manifest = next(file for file in (trained.place / MANIFEST, trained.place / ABOUT) if file.is_file())
    asked = {"model": sha256_of(manifest), "tokenizer": trained.tokenizer.fingerprint, "version": __version__,
             "boundaries": question.boundaries, "dtype": str(dtype), "context": context,
             "batch": question.batch_tokens}
    scorer = Scorer(model, question.boundaries, batch_tokens=question.batch_tokens)
    lm = ConceptLM(scorer, trained.tokenizer, context, _answers(out, asked, group))
    facts = [f"{trained.place}, step {trained.step:,}, {trained.tokens:,} tokens; {_name(dtype)} on {where}, "
             f"boundaries {question.boundaries}"]
    if rank() == 0:
        facts += _of_validation_rows(trained, model, question)
    return Asked(lm, trained.step, out, facts)


def _hub_model(place: str, question: Question, step: int | None, out: Path | None, where: torch.device,
               dtype: torch.dtype, group: dist.ProcessGroup | None) -> Asked:
    path = Path(place.removeprefix(HUB))
    if step is not None or question.boundaries != "thresholded":
        raise ConfigError(f"{place}: --step and --boundaries are for models of this package; leave them out")
    out, batch = out or Path(f"tasks-{path.name}"), max(1, question.batch_tokens // 1024)
    files = sorted((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in path.glob("*") if one.is_file())
    try:
        lm = HubLM(str(path), str(where), _name(dtype), batch, question.context, question.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"{place}: transformers cannot load it ({first_line(error)}); give a folder with "
                          "config.json, or a name of the hub, and --trust-remote-code where it brings code") from error
    commit = lm.model.config.to_dict().get("_commit_hash")
    lm.answers = _answers(out, {"model": str(path), "files": files, "commit": commit, "dtype": str(dtype),
                                "batch": batch, "context": question.context}, group)
    return Asked(lm, None, out, [f"{place}, {_name(dtype)} on {where}"])


def _answers(out: Path, asked: dict[str, Any], group: dist.ProcessGroup | None) -> Answers:
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return Answers(out / "answers" / name, group)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """What went wrong, in short."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _of_validation_rows(trained: Trained, model: LanguageModel, question: Question) -> list[str]:
    """Bits per byte, cut as the tasks are; and how many boundaries half precision moves."""
    data = trained.config.data
    try:
        reader = Reader(data, trained.config.seed, trained.config.model.vocab_size, log=lambda line: None)
        if Tokenizer.load(reader.store).fingerprint != trained.tokenizer_fingerprint:
            return [f"bits per byte are left out: the rows of data.root = {data.root!r} are of another tokenizer"]
        facts = [bits_per_byte(model, reader, question.boundaries == "sampled")]
    except (DataError, ConfigError, OSError) as error:
        return [f"bits per byte are left out: its validation rows cannot be read ({first_line(error)})"]
    if model.compute_dtype != torch.float32 and isinstance(model, DLCM):
        exact = model_of(trained.config, trained.state, torch.float32, model.where, str(trained.place))
        exact.cut_by(question.boundaries)
        facts.append(flipped(model, exact, reader))
    return facts


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, reader: Reader, drawn: bool) -> str:
    """Of the validation rows, drawn: by boundaries of their noise."""
    sizes = torch.from_numpy(reader.token_bytes).to(model.where)
    nats, content = 0.0, 0
    for batch in progress_bar(ValidationBatches(reader), desc="bits per byte", unit="batch"):
        batch = batch.to(model.where)
        output = model(batch.tokens, batch.documents, batch.noise if drawn else None, batch.targets)
        nats += output.nll.double().sum().item()
        content += int(sizes[batch.targets.clamp(min=0)][batch.targets >= 0].sum())
    return f"{nats / content / math.log(2):.4f} bits per byte of its validation rows ({content:,} bytes)"


@torch.inference_mode()
def flipped(model: LanguageModel, exact: LanguageModel, reader: Reader) -> str:
    """Boundaries of the first validation rows that are not those of fp32."""
    moved = total = 0
    for batch, _ in zip(ValidationBatches(reader), range(COMPARED), strict=False):
        batch = batch.to(model.where)
        cuts = [one(batch.tokens, batch.documents).segmentation.boundaries for one in (model, exact)]
        moved += int((cuts[0] != cuts[1]).sum())
        total += cuts[0].numel()
    return (f"{100 * moved / max(1, total):.3f} % of {total:,} boundary decisions on its validation rows are not those "
            "of fp32")
