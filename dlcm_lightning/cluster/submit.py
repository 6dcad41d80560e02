"""What a submission was: the package as it is now, the configuration with every field, who ran it with which packages.

A job may wait for days and be requeued for weeks. Its attempts take the package from here, so that an edit in between
changes nothing; whoever wants the edit submits again. The scripts are copied to be looked at: slurm/site.sh and
slurm/job.sh are read where they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

import dlcm_lightning
from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.cluster.slurm import SlurmError, call
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.run_directory import CONFIG_FILE, JOBS
from dlcm_lightning.shipped import FOLDERS, root

NAME = "DLCM_JOB"
"""Environment: the folder below jobs/, of the first job of a chain and for all that follow it."""
CODE = "code"
POINTERS = Path(".jobs")
"""Below the folder of submission: NAME leads to the folder of that job, whichever run it belongs to."""
SBATCH = "sbatch.json"
SECRET = re.compile(r"key|token|secret|passw|credential|auth|jwt|cookie|signature", re.IGNORECASE)
KEPT = re.compile(
    r"(SLURM|SBATCH|SRUN|CUDA|NVIDIA|NCCL|GLOO|UCX|FI|OMPI|PMI|PMIX|OMP|MKL|OPENBLAS|KMP|GOMP|TORCH|PYTORCH|TORCHINDUCTOR|"
    r"TRITON|PYTHON|DLCM|DS|LC|CONDA|XDG|MASTER|GROUP|LOCAL|NODE)_?\w*|PATH|LD_LIBRARY_PATH|LD_PRELOAD|HOME|HOSTNAME|USER|"
    r"LOGNAME|SHELL|LANG|TZ|TMPDIR|PWD|RANK|WORLD_SIZE|VIRTUAL_ENV|LOADEDMODULES|MODULEPATH|(?i:https?_proxy|no_proxy)")
"""Names of variables whose values are kept: what libraries, SLURM and this package read."""
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
IN_QUERY = re.compile(r"((?:key|token|secret|password|sig|signature|credential)=)[^&\s]+", re.IGNORECASE)


def job_folder(config: Config, name: str) -> Path:
    """A new one: numbers of jobs begin again when a cluster is set up anew."""
    jobs = Path(config.train.output_dir).resolve() / config.name / JOBS
    number, folder = 1, jobs / name
    while folder.exists():
        number += 1
        folder = jobs / f"{name}-{number}"
    return folder


def submit(script: str, config_file: str, overrides: Sequence[str], options: Sequence[str]) -> str:
    """Checks a configuration, takes the snapshot and submits; number of the job. options: of sbatch. ConfigError: a
    wrong configuration, or sbatch refuses."""
    config = load_config(config_file, overrides)
    folder = job_folder(config, time.strftime("%Y%m%d-%H%M%S"))
    made = [one for one in (folder, *folder.parents, POINTERS) if not one.exists()]
    take(folder, config)
    write_atomically(folder / SBATCH, (json.dumps({"options": list(options)}, indent=1) + "\n").encode())
    try:
        said = call("sbatch", "--parsable", f"--export=ALL,{NAME}={folder.name}", *options, script, config_file,
                    *overrides)
    except SlurmError as error:
        _undo(folder, made)
        raise ConfigError(f"{script}: sbatch refuses ({error}); correct its options, or slurm/site.sh") from error
    return said.strip().partition(";")[0]


def _undo(folder: Path, made: Iterable[Path]) -> None:
    """Nothing is left of a submission. made: folders that it found missing."""
    shutil.rmtree(folder)
    (POINTERS / folder.name).unlink(missing_ok=True)
    for one in made:
        with contextlib.suppress(OSError):  # something else stands in it by now
            one.rmdir()


def recorded_options(folder: Path) -> list[str]:
    """Those given to sbatch, where the submission was made here; none where it was made by sbatch itself."""
    file = folder / SBATCH
    return list(json.loads(file.read_text())["options"]) if file.is_file() else []


def take(folder: Path, config: Config) -> None:
    """Makes the folder of a job. config: as it was submitted. ConfigError: it cannot be written."""
    try:
        _take(folder, config)
    except OSError as error:
        raise ConfigError(f"train.output_dir = {config.train.output_dir!r}: {folder} cannot be written ({error}); "
                          f"correct the "
                          "permissions, free space, or choose another train.output_dir=...") from error


def _take(folder: Path, config: Config) -> None:
    package = Path(dlcm_lightning.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / CODE / package.name, ignore=skipped)
    if root() == package.parent:  # in a wheel they are inside the package
        for name in FOLDERS:
            if (root() / name).is_dir():
                shutil.copytree(root() / name, folder / CODE / name, ignore=skipped)
    save_config(config, folder / CONFIG_FILE)
    POINTERS.mkdir(exist_ok=True)
    pointer = POINTERS / folder.name
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.resolve())


def describe_attempt(attempt: Path, nodes: Iterable[str]) -> None:
    """Variables, packages and nodes of one attempt. Variables are for their owner to read; of those that are not known
    to matter there is the name alone."""
    variables = {name: masked_value(name, value) for name, value in os.environ.items()}
    handle = os.open(attempt / "environment.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        os.fchmod(handle, 0o600)  # where it was there before
        file.write(_lines(variables))
    installed = {one.metadata["Name"]: one.version for one in distributions()}
    (attempt / "packages.txt").write_text(_lines(installed))
    (attempt / "nodes.txt").write_text("".join(f"{node}\n" for node in nodes))


def masked_value(name: str, value: str) -> str:
    """The value of a variable as others may see it."""
    if not KEPT.fullmatch(name) or SECRET.search(name):
        return "(not kept)"
    return IN_QUERY.sub(r"\1***", IN_URL.sub("***", value))


def _lines(values: Mapping[str, str]) -> str:
    """Names and values, a line each, in order."""
    return "".join(f"{name}={value}\n" for name, value in sorted(values.items()))
