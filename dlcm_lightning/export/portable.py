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
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dlcm_lightning.atomic_io import flush, sha256_of, write_atomically
from dlcm_lightning.checkpoint import tensors
from dlcm_lightning.checkpoint.folder import CONFIG, Checkpoint, open_checkpoint
from dlcm_lightning.checkpoint.probe import Probe, difference
from dlcm_lightning.compose import load_saved_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.tokenizer import SETTINGS, TOKENIZER, Tokenizer
from dlcm_lightning.errors import CheckpointError
from dlcm_lightning.model.dlcm import LanguageModel, assemble
from dlcm_lightning.model.mup import Role, RoleModule
from dlcm_lightning.ops.attention import choose_backend

ABOUT = "portable.json"
INDEX = "model.safetensors.index.json"
SPLIT_BYTES = 5 * 1000**3
BOUNDARY = "boundary."


def model_state(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """By their names in the model."""
    with checkpoint.tensors() as stored:
        state = {name: stored.get(f"weight/{name}") for name in stored.names("weight/")}
        state |= {name: stored.get(f"buffer/model.{name}") for name in stored.names("buffer/model.")}
    return {name: _rounded(name, tensor, dtype) for name, tensor in sorted(state.items())}


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dim() > 1 and not name.startswith(BOUNDARY) else tensor


def export(run: str | Path, out: str | Path, *, step: int | None = None, dtype: Literal["fp32", "bf16"] = "fp32",
           split_bytes: int = SPLIT_BYTES) -> Path:
    """Writes OUT whole or not at all. CheckpointError: no such checkpoint, a damaged one, OUT exists, no tokenizer."""
    run, out = Path(run), Path(out)
    if out.exists():
        raise CheckpointError(f"{out}: exists already; remove it or write elsewhere")
    checkpoint = open_checkpoint(run, step)
    if not (run / TOKENIZER).is_file():
        raise CheckpointError(f"{run / TOKENIZER}: missing; copy it there from the data.root the run was trained on")
    state = model_state(checkpoint, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    making = out.with_name(f".{out.name}.unfinished")
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        _write_state(state, making, split_bytes)
        shutil.copyfile(checkpoint.folder / CONFIG, making / CONFIG)
        for name in (TOKENIZER, SETTINGS):
            if (run / name).is_file():  # runs of older versions have no settings
                shutil.copyfile(run / name, making / name)
        for file in making.iterdir():
            flush(file)
        about = {"step": checkpoint.step, "tokens": checkpoint.manifest.tokens, "dtype": dtype,
                 "parameters": sum(tensor.numel() for name, tensor in state.items()),
                 "fingerprint": asdict(checkpoint.manifest.fingerprint),
                 "files": {file.name: sha256_of(file) for file in sorted(making.iterdir())}}
        write_atomically(making / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        _check(making, checkpoint, dtype)
        making.rename(out)
    except OSError as error:
        shutil.rmtree(making, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({error}); free space or correct the permissions") from error
    return out


def _check(folder: Path, checkpoint: Checkpoint, dtype: str) -> None:
    """What was written is loaded, and must say of the probe text what the run's model said when it was saved."""
    rough = "bf16" in dtype or checkpoint.manifest.identity.precision == "bfloat16"
    now = Probe(Tokenizer.load(folder)).fingerprint(load_model(folder), torch.device("cpu"))
    said = difference(checkpoint.manifest.fingerprint, now, torch.bfloat16 if rough else torch.float32)
    if said:
        shutil.rmtree(folder)
        raise CheckpointError(f"{checkpoint.folder} is read but computes something else: {said}; it was written by "
                              "other code than this: export with the version that wrote it")


def _write_state(state: dict[str, Tensor], folder: Path, split_bytes: int) -> None:
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
    """As stored."""
    with tensors.Tensors(sorted(Path(folder).glob("model*.safetensors"))) as stored:
        return {name: stored.get(name) for name in stored.names()}


def about(folder: str | Path) -> dict[str, Any]:
    """portable.json."""
    found: dict[str, Any] = json.loads((Path(folder) / ABOUT).read_bytes())
    return found


def load_model(folder: str | Path, compute_dtype: torch.dtype = torch.float32, device: str = "cpu") -> LanguageModel:
    """The model, in evaluation mode; its matrices in the dtype to compute in, all else in fp32 (fp64 for fp64).

    CheckpointError: a file is missing, cannot be read or is not as portable.json says; other tensors than the model's.
    """
    folder = Path(folder)
    try:
        for name, stated in about(folder)["files"].items():
            if sha256_of(folder / name) != stated:
                raise CheckpointError(f"{folder / name} is damaged: its sha256 differs from {ABOUT}'s")
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: not a whole exported model ({error!r}); export it again") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error}); correct the permissions") from error
    return model_of(load_config(folder), load_state(folder), compute_dtype, torch.device(device), str(folder))


def load_config(folder: str | Path) -> Config:
    """Of the run that trained it."""
    return load_saved_config(Path(folder) / CONFIG)


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
