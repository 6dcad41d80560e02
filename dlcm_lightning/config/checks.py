"""Checks of fields: bounds, choices, names that become files, paths. What fails names the field, value and remedy."""

from __future__ import annotations

import re
from typing import get_args

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.paths import expanded, is_address

LARGEST_COUNT = 10**18
"""Of anything that is counted: numbers of samples and tokens below it, and their sums, stay in 64 bits."""
LONGEST_NAME = 128
SAFE_NAME = re.compile(r"\w[\w.-]*")
CREDENTIALS = re.compile(r"://[^/@\s]*:[^/@\s]*@")


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{field_name} = {value!r}: {remedy}")


def require_member(field_name: str, value: object, literal: object) -> None:
    allowed = get_args(literal)
    require(value in allowed, field_name, value, f"choose one of {', '.join(map(str, allowed))}")


def require_range(field_name: str, value: float, least: float, most: float) -> None:
    """Both ends are allowed. Not a number is outside of every range."""
    if value != value or value < least:
        remedy = "must be positive" if least == 1 else "use 0 or more" if least == 0 else f"must be at least {least:g}"
        require(False, field_name, value, remedy)
    require(value <= most, field_name, value, f"must be at most {most:,}")


def require_positive(field_name: str, value: float, most: float) -> None:
    """A real number above zero."""
    require(value > 0, field_name, value, "must be positive")
    require(value <= most, field_name, value, f"must be at most {most:,}")


def require_name(field_name: str, value: str) -> None:
    """A name becomes a file or a folder: it must not lead elsewhere, hide, or need quotes in a shell or in SLURM."""
    require(bool(SAFE_NAME.fullmatch(value)) and len(value) <= LONGEST_NAME, field_name, value,
            f"give a name of at most {LONGEST_NAME} letters, digits, -, _ and ., which begins with a letter or a digit")


def local_path(field_name: str, value: str) -> str:
    """The path with ~ and variables replaced. ConfigError: empty, an address, an unknown variable."""
    require(bool(value.strip()), field_name, value, "give a path")
    require(not is_address(value), field_name, value, "give a folder of this machine's file systems; addresses such as "
                                                      "s3://... are read as data.root, and not written to")
    return path_or_address(field_name, value)


def path_or_address(field_name: str, value: str) -> str:
    """The same for what may also be an address that fsspec knows."""
    require(bool(value.strip()), field_name, value, "give a path or an address")
    require(not CREDENTIALS.search(value), field_name, CREDENTIALS.sub("://***@", value),
            "a password in an address would stand in every file of the run; give it to the store by the environment")
    try:
        return expanded(value)
    except ValueError as error:
        raise ConfigError(f"{field_name} = {value!r}: {error}") from None
