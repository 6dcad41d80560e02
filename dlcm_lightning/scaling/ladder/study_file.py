"""From a YAML file to a checked `Study`.

Every value is checked against the dataclasses of `study.py` while its place in the file is still known. Where a list of
sections is asked for, a plain value may stand for one: a number for a size or a learning rate, a text for a variant.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.ladder.study import Rates, Size, Study, Variant
from dlcm_lightning.shipped import find, names

STUDIES = "configs/study"
SHORT: dict[type, str] = {Size: "parameters", Rates: "base", Variant: "name"}
"""The field that a plain value in the place of a section is."""
Section = TypeVar("Section")


def read_study(path: str) -> Study:
    """path: of a file, or the name of one that is shipped, such as ladder_cpu. ConfigError: the field, its value, where
    it stands, and the remedy."""
    file = find(path, STUDIES)
    if not file.is_file():
        known = sorted(str(one) for one in file.parent.glob("*.yaml")) or names(STUDIES)
        close = difflib.get_close_matches(path, known, 1)
        raise ConfigError(f"study {path!r}: there is no such file; " + (
            f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"))
    return study_of(_read_yaml(file), str(file))


def study_of(values: Any, origin: str) -> Study:
    """A study from plain containers. origin: where they stand."""
    return _section(Study, values, "", origin)


def _read_yaml(file: Path) -> Any:
    try:  # as run files are read: 1e5 is a number
        return OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"study {str(file)!r}: not readable as YAML, {error}; correct the file") from error


def _section(section: type[Section], values: Any, name: str, origin: str) -> Section:
    short = SHORT.get(section)
    if short is not None and not isinstance(values, Mapping):
        values = {short: values}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name or 'a study'} = {values!r} (in {origin}): this is a section; write fields below it")
    types = get_type_hints(section)
    for key in values:
        if key not in types:
            raise ConfigError(f"{_join(name, str(key))} = {values[key]!r} (in {origin}): there is no such field; "
                              f"{_suggestion(str(key), list(types))}")
    given = {key: _value(types[key], value, _join(name, key), origin) for key, value in values.items()}
    try:
        return section(**given)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {origin})") from error


def _value(expected: Any, value: Any, name: str, origin: str) -> Any:
    kind = get_origin(expected)
    if kind in (Union, UnionType):
        return None if value is None else _value(get_args(expected)[0], value, name, origin)
    if is_dataclass(expected) and isinstance(expected, type):
        return _section(expected, value, name, origin)
    if kind is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name} = {value!r} (in {origin}): expected a list; write {name}: [...]")
        return tuple(_value(get_args(expected)[0], one, f"{name}[{place}]", origin) for place, one in enumerate(value))
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} = {value!r} (in {origin}): this is a section; write names below it")
        return {str(key): _value(get_args(expected)[1], one, _join(name, str(key)), origin)
                for key, one in value.items()}
    return _scalar(expected, value, name, origin)


def _scalar(expected: Any, value: Any, name: str, origin: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind_is_text(expected):
        if isinstance(value, str):
            return value
        wanted = "text; put it in quotes"
    elif expected is int:
        if is_number and value == int(value):
            return int(value)
        wanted = "a whole number"
    else:
        if is_number:
            return float(value)
        wanted = "a finite number"
    raise ConfigError(f"{name} = {value!r} (in {origin}): expected {wanted}")


def kind_is_text(expected: Any) -> bool:
    """Whether a field of this type holds text; which texts a choice allows is checked by its section."""
    return expected is str or get_origin(expected) is Literal


def _suggestion(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
