"""Configurations, recipes of corpora and SLURM templates that come with the package: where they are, and by what name.

In the project they are the folders `configs/`, `data/sources/` and `slurm/`; a wheel carries them below
`dlcm_lightning/shipped_files/`. A file of the user's always comes first: a name means a shipped file only where there
is no such file here.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dlcm_lightning.errors import ConfigError, RunError

FOLDERS = ("configs", "data/sources", "slurm")
IN_WHEEL = "shipped_files"
RUNS = "configs/run"
RECIPES = "data/sources"
LOCAL_PYTHON = '"${DLCM_PYTHON:=$PWD/.venv/bin/python}"'
"""The line of slurm/site.sh that names the interpreter of the jobs."""


def root() -> Path:
    """The folder that holds FOLDERS."""
    package = Path(__file__).resolve().parent
    return package / IN_WHEEL if (package / IN_WHEEL).is_dir() else package.parent


def find(name: str, folder: str) -> Path:
    """The file that is meant: a path that exists; else the shipped one of this name in `folder`, or of this path. Where
    there is neither, the path as it was written, for whoever reads it to refuse."""
    path = Path(name)
    if not path.is_file():
        for candidate in (root() / folder / path, root() / path):
            for shipped in (candidate, candidate.with_name(candidate.name + ".yaml")):
                if shipped.is_file() and shipped.is_relative_to(root()):
                    return shipped
    return path


def names(folder: str) -> list[str]:
    """Of the files in a shipped folder, without their ending."""
    return sorted(file.stem for file in (root() / folder).glob("*.yaml"))


def run_files() -> Iterator[str]:
    """A line for each shipped run file: its name, and what its first comment says of it."""
    for name in names(RUNS):
        first = (root() / RUNS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        yield f"{name:<16}{first.lstrip('# ') if first.startswith('#') else ''}"


def copy_run_file(name: str, to: Path) -> None:
    """ConfigError: there is none of this name. RunError: something stands at `to`, or it cannot be written."""
    if name not in names(RUNS):
        close = difflib.get_close_matches(name, names(RUNS), 1)
        raise ConfigError(f"{name!r}: no shipped run file; " + (f"did you mean {close[0]}?" if close else
                                                               f"there are {', '.join(names(RUNS))}"))
    _write(to, (root() / RUNS / f"{name}.yaml").read_bytes())


def write_slurm_templates(folder: Path) -> list[Path]:
    """The templates below `folder`/slurm, which start this Python. RunError: one of them is there already."""
    written = []
    for file in sorted((root() / "slurm").glob("*.sh")):
        text = file.read_text(encoding="utf-8")
        if file.name == "site.sh":
            assert LOCAL_PYTHON in text
            text = text.replace(LOCAL_PYTHON, f'"${{DLCM_PYTHON:={sys.executable}}}"')
        to = folder / "slurm" / file.name
        _write(to, text.encode())
        written.append(to)
    return written


def _write(to: Path, content: bytes) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise RunError(f"{to} is there already; move it away, or choose another place") from None
    except OSError as error:
        raise RunError(f"{to} cannot be written: {error}; choose a folder that is yours") from error
    with os.fdopen(handle, "wb") as file:
        file.write(content)
