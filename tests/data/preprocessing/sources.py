"""Building small sources from small inputs, and what was built, for the tests beside."""

from __future__ import annotations

from pathlib import Path

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.data.preprocessing.build import tokenize
from dlcm_lightning.data.preprocessing.merge import Built
from dlcm_lightning.data.preprocessing.recipe import Recipe

RECIPE = Recipe("s", "d")
SMALL = {"shard_bytes": 6000, "task_bytes": 20_000, "validation_share": 0.2}
"""Many shards and tasks out of little text."""


def say_nothing(_: str) -> None:
    pass


def sums(folder: Path) -> dict[str, str]:
    """Of all files but inputs.json, which holds the inodes and times of the inputs."""
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "inputs.json"}


def run(inputs: Path, out: Path, home: str | None, **options: object) -> Built | None:
    return tokenize([inputs], out, RECIPE, tokenizer_folder=home, log=say_nothing,
                    **{"workers": 1, **SMALL, **options})  # type: ignore[arg-type]
