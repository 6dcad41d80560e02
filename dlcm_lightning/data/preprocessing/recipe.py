"""A published corpus in a few lines of YAML: what its files are called, which field holds the text, its licence.

    name: nemotron-cc
    domain: web-en
    glob: "**/*.jsonl.zstd"        # of the files, below the input folder
    text_field: text
    format: jsonl                  # where the names of the files do not say it
    licence: Common Crawl terms of use
    home_page: https://...

`dlcm tokenize FOLDER --recipe FILE` reads one; `data/sources/` holds those of the paper, which go by their names too.
Licence and home page
go into the manifests, so that they stay with the shards. The flags of the command stand over the recipe.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from dlcm_lightning.data.preprocessing.kinds import AUTO
from dlcm_lightning.errors import DataError
from dlcm_lightning.shipped import RECIPES, find, names


@dataclass(frozen=True)
class Recipe:
    """Every key is text. name and domain must be given."""

    name: str
    domain: str
    glob: str = "**/*"
    text_field: str = "text"
    licence: str = ""
    home_page: str = ""
    format: str = AUTO

    @property
    def about(self) -> dict[str, str]:
        """For `Manifest.about`."""
        return {key: value for key, value in (("licence", self.licence), ("home_page", self.home_page)) if value}


def load_recipe(path: str | Path) -> Recipe:
    """Reads one. DataError: missing, not YAML, a key that is unknown, empty or no text, name or domain not given."""
    path = find(str(path), RECIPES)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such recipe; shipped are {', '.join(names(RECIPES))}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    known = [one.name for one in fields(Recipe)]
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds {found!r}, no recipe; write `key: value` lines with {', '.join(known)}")
    for key, value in found.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            raise DataError(f"{path}: {key} = {value!r}: no key of a recipe; "
                            + (f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"))
        if not isinstance(value, str) or not value:
            raise DataError(f"{path}: {key} = {value!r}: must be text that is not empty; quote it")
    for key in ("name", "domain"):
        if key not in found:
            raise DataError(f"{path}: {key} is not given; add a line `{key}: ...`")
    return Recipe(**found)
