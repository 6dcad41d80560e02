"""`dlcm export`: a checkpoint of any engine and any number of ranks as a model that plain PyTorch loads.

    OUT/
        model.safetensors     weights and the boundary's buffers, named as in `LanguageModel.state_dict()`; above a size
                              model-00001-of-00003.safetensors ... and model.safetensors.index.json, which says where
        config.yaml           of the run that trained it
        tokenizer.json, tokenizer_config.json
        portable.json         step, tokens, dtype, what the model says of the probe text, sha256 of the other files

    from dlcm_lightning.export.portable import load_model
    model = load_model("OUT")                      # a torch.nn.Module on the CPU

Before it counts, what was written is loaded and asked for the probe text. In fp32 every number is the checkpoint's.
bf16 rounds the matrices; norms, buffers and the boundary stay fp32: they cost nothing, and the boundary compares what
is nearly equal.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dlcm_lightning.atomic_io import flush, sha256_of, write_atomically
from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.exported import ABOUT, CONFIG, Exported
from dlcm_lightning.checkpoint.folder import Checkpoint, Fingerprint, open_checkpoint
from dlcm_lightning.checkpoint.probe import Probe, difference
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.tokenizer import TOKENIZER, Tokenizer
from dlcm_lightning.errors import CheckpointError, ConfigError
from dlcm_lightning.model.dlcm import LanguageModel, assemble
from dlcm_lightning.model.mup import Role, RoleModule
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.run_directory import folders

INDEX = "model.safetensors.index.json"
SPLIT_BYTES = 5 * 1000**3
BOUNDARY = "boundary."


def model_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """By their names in the model."""
    with checkpoint.tensors() as stored:
        state = {name: stored.get(f"weight/{name}") for name in stored.names("weight/")}
        state |= {name: stored.get(f"buffer/model.{name}") for name in stored.names("buffer/model.")}
    return dict(sorted(state.items()))


@dataclass(frozen=True)
class Trained:
    """A trained model, wherever it stands."""

    place: Path
    """The checkpoint, or the export."""
    config: Config
    tokenizer: Tokenizer
    state: dict[str, Tensor]
    step: int
    tokens: int
    fingerprint: Fingerprint
    rough: bool
    """Whether it computed in half precision when the fingerprint was taken, or was rounded to it since."""
    tokenizer_fingerprint: str
    """sha256 of the tokenizer.json that it was trained with."""
    folder: Path | None = None
    """Of the run, where it is one."""
    upcycled: dict[str, Any] | None = None
    """What `dlcm upcycle` keeps of where the weights come from."""
    merged: tuple[int, ...] = ()
    """Steps of the checkpoints that `dlcm merge` took the mean of."""

    def check(self, model: LanguageModel) -> None:
        """CheckpointError: the model does not say of the probe text what was said when the fingerprint was taken."""
        now = Probe(self.tokenizer).fingerprint(model, model.where)
        rough = self.rough or model.compute_dtype not in (torch.float32, torch.float64)
        if differs := difference(self.fingerprint, now, torch.bfloat16 if rough else torch.float32):
            raise CheckpointError(f"{self.place} is read but computes something else: {differs}; it was written by "
                                  f"other code than this, or {TOKENIZER} is not the one that it was trained with")


def open_trained(place: str | Path, step: int | None = None) -> Trained:
    """place: a run's directory, or what `dlcm export` or `dlcm upcycle` wrote. step: of a run's checkpoint, or the
    newest. CheckpointError: there is no model, a damaged one, or no tokenizer. ConfigError: an export has one step."""
    place = Path(place)
    if (place / ABOUT).exists():
        exported = Exported(place)
        exported.check_whole()
        said = about(place)
        if step is not None:
            raise ConfigError(f"--step {step}: {place} is an exported model, of step {said['step']}")
        return Trained(place, exported.config, _tokenizer(place, exported.config), load_state(place), said["step"],
                       said["tokens"], Fingerprint(**said["fingerprint"]), said.get("rough", True),
                       exported.tokenizer_fingerprint(), upcycled=said.get("upcycled"),
                       merged=tuple(said.get("merged", ())))
    if folders(place) or step is not None:
        checkpoint = open_checkpoint(place, step)
        manifest, config = checkpoint.manifest, checkpoint.config
        tokenizer = _tokenizer(place, config)
        return Trained(checkpoint.folder, config, tokenizer, model_state(checkpoint), checkpoint.step, manifest.tokens,
                       manifest.fingerprint, manifest.identity.precision == "bfloat16", tokenizer.fingerprint, place)
    what = "holds no checkpoint and is no exported model" if place.is_dir() else "is not there"
    raise CheckpointError(f"{place}: {what}; name the directory of a run, runs/NAME, or what `dlcm export` wrote")


def _tokenizer(folder: Path, config: Config) -> Tokenizer:
    """CheckpointError: there is none, or one that cannot be the model's."""
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{folder / TOKENIZER}: missing; copy it there from the data.root that the model was "
                              "trained on")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(f"{folder / TOKENIZER}: {tokenizer.vocab_size:,} ids, but the model knows "
                              f"{config.model.vocab_size:,} (model.vocab_size); put its own tokenizer there")
    return tokenizer


def export(place: str | Path, out: str | Path, *, step: int | None = None, dtype: Literal["fp32", "bf16"] = "fp32",
           split_bytes: int = SPLIT_BYTES) -> Path:
    """Writes OUT whole or not at all. place, step: see `open_trained`. CheckpointError: OUT exists, or it cannot be
    written."""
    out = Path(out)
    with making(out) as folder:
        trained = open_trained(place, step)
        write_state(rounded(trained.state, dtype), folder, split_bytes)
        trained.tokenizer.save(folder)
        finish(folder, trained, dtype)
    return out


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A folder that becomes OUT when all has gone well, and is gone when not."""
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or write elsewhere")
    folder = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        folder.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); free space or correct the permissions") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def finish(folder: Path, trained: Trained, dtype: str) -> None:
    """Writes config.yaml and, last, portable.json; then loads what was written, which must say of the probe text what
    the model said when it was saved."""
    save_config(trained.config, folder / CONFIG)
    for file in folder.iterdir():
        flush(file)
    said = {"step": trained.step, "tokens": trained.tokens, "dtype": dtype,
            "parameters": sum(tensor.numel() for tensor in trained.state.values()),
            "fingerprint": asdict(trained.fingerprint), "rough": trained.rough or dtype == "bf16",
            "tokenizer": trained.tokenizer_fingerprint,
            **({"upcycled": trained.upcycled} if trained.upcycled else {}),
            **({"merged": list(trained.merged)} if trained.merged else {}),
            "files": {file.name: sha256_of(file) for file in sorted(folder.iterdir())}}
    write_atomically(folder / ABOUT, (json.dumps(said, indent=1) + "\n").encode())
    open_trained(folder).check(load_model(folder))


def rounded(state: dict[str, Tensor], dtype: Literal["fp32", "bf16"]) -> dict[str, Tensor]:
    """Matrices in that dtype, but for the boundary's."""
    low = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return {name: tensor.to(low) if tensor.dim() > 1 and not name.startswith(BOUNDARY) else tensor
            for name, tensor in state.items()}


def write_state(state: dict[str, Tensor], folder: Path, split_bytes: int = SPLIT_BYTES) -> None:
    """As model.safetensors, or in parts with an index."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        bytes_of = tensor.numel() * tensor.element_size()
        if size and size + bytes_of > split_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += bytes_of
    if len(parts) == 1:
        tensors.write(state, folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors.write(part, folder / file)
        where |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))


def load_state(folder: str | Path) -> dict[str, Tensor]:
    """As stored, by their names in the model."""
    with Exported(folder).tensors() as stored:
        return {name: stored.get(name) for name in stored.names()}


def about(folder: str | Path) -> dict[str, Any]:
    """portable.json."""
    found: dict[str, Any] = json.loads((Path(folder) / ABOUT).read_bytes())
    return found


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """The model, in evaluation mode; its matrices in the dtype to compute in, all else in fp32 (fp64 for fp64).

    CheckpointError: a file is missing, cannot be read or is not as portable.json says; other tensors than the model's.
    """
    exported = Exported(folder)
    exported.check_whole()
    return model_of(exported.config, load_state(folder), compute_dtype, torch.device(device), str(folder))


def model_of(config: Config, state: dict[str, Tensor], compute_dtype: torch.dtype, device: torch.device, place: str
             ) -> LanguageModel:
    """A model with these numbers, in evaluation mode. Matrices are stored in the dtype that they are multiplied in, the
    boundary's and everything else in fp32: it computes what a model computes that casts them at every use. place: where
    they are from, for the words of a CheckpointError: they are not those of the configuration's model."""
    model = assemble(config.model, compute_dtype, choose_backend(config.model.attention, device, compute_dtype))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{place}: its tensors are not those of its model ({' '.join(str(error).split())}); "
                              "export it again with the version that trained it") from error
    for module in model.modules():
        if isinstance(module, RoleModule) and module.weight.dim() > 1 and module.role is not Role.BOUNDARY:
            module.weight.data = module.weight.data.to(compute_dtype)
    return model.to(device).eval()
