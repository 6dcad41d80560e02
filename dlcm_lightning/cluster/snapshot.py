"""What a submission was: the package as it is now, the configuration with every field, who ran it with which packages.

A job may wait for days and be requeued for weeks. Its lives take the package from here, so that an edit in between
changes nothing; whoever wants the edit submits again. The scripts are copied to be looked at: slurm/site.sh and
slurm/job.sh are read where they are.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

import dlcm_lightning
from dlcm_lightning.cluster.slurm import SlurmError, call
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.layout import CONFIG_FILE, JOBS

NAME = "DLCM_JOB"
"""Environment: the folder below jobs/, of the first job of a chain and for all that follow it."""
CODE = "code"
POINTERS = Path(".jobs")
"""Below the folder of submission: NAME leads to the folder of that job, whichever run it belongs to."""
SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)


def job_folder(config: Config, name: str) -> Path:
    """A new one: numbers of jobs begin again when a cluster is set up anew."""
    jobs = Path(config.train.runs).resolve() / config.name / JOBS
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
    take(folder, config)
    try:
        said = call("sbatch", "--parsable", f"--export=ALL,{NAME}={folder.name}", *options, script, config_file,
                    *overrides)
    except SlurmError as error:
        shutil.rmtree(folder)
        raise ConfigError(f"{script}: sbatch refuses ({error}); correct its options, or slurm/site.sh") from error
    return said.strip().partition(";")[0]


def take(folder: Path, config: Config) -> None:
    """Makes the folder of a job. config: as it was submitted. ConfigError: it cannot be written."""
    try:
        _take(folder, config)
    except OSError as error:
        raise ConfigError(f"train.runs = {config.train.runs!r}: {folder} cannot be written ({error}); correct the "
                          "permissions, free space, or choose another train.runs=...") from error


def _take(folder: Path, config: Config) -> None:
    package = Path(dlcm_lightning.__file__).parent
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / CODE / package.name, ignore=skipped)
    if (package.parent / "slurm").is_dir():
        shutil.copytree(package.parent / "slurm", folder / CODE / "slurm", ignore=skipped)
    save_config(config, folder / CONFIG_FILE)
    POINTERS.mkdir(exist_ok=True)
    pointer = POINTERS / folder.name
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.resolve())


def describe_life(life: Path, nodes: Iterable[str]) -> None:
    """Variables, packages and nodes of one life."""
    variables = {name: "(not shown)" if SECRET.search(name) else value for name, value in os.environ.items()}
    (life / "environment.txt").write_text(_lines(variables))
    installed = {one.metadata["Name"]: one.version for one in distributions()}
    (life / "packages.txt").write_text(_lines(installed))
    (life / "nodes.txt").write_text("".join(f"{node}\n" for node in nodes))


def _lines(values: Mapping[str, str]) -> str:
    """Names and values, a line each, in order."""
    return "".join(f"{name}={value}\n" for name, value in sorted(values.items()))
