"""Objects of classes that a configuration names: callbacks and loggers of Lightning's, or of the user's.

Modules are looked for where Python looks, and then in the current folder, where a user's own may lie.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from dlcm_lightning.config import ClassConfig, Config, ConfigError

T = TypeVar("T")


def check_installed(config: Config) -> None:
    """ConfigError: a class of a package that is not here. Imports nothing, so that it is said before torch is
    loaded."""
    _look_here()
    for field, classes in (("train.callbacks", config.train.callbacks), ("train.loggers", config.train.loggers)):
        for number, wanted in enumerate(classes):
            package = wanted.class_path.partition(".")[0]
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"{field}[{number}].class_path = {wanted.class_path!r}: there is no package "
                                  f"{package}; "
                                  "correct the name, or install it beside this package")


def _look_here() -> None:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def build_all(field: str, wanted: Sequence[ClassConfig], kind: type[T]) -> list[T]:
    """One object of each. ConfigError: a class that there is not, that is none of this kind, or that cannot be made
    of its arguments; it names the field."""
    _look_here()
    return [_build(f"{field}[{number}]", one, kind) for number, one in enumerate(wanted)]


def _build(field: str, wanted: ClassConfig, kind: type[T]) -> T:
    module, _, name = wanted.class_path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever a module of the user's does while it is imported
        raise ConfigError(f"{field}.class_path = {wanted.class_path!r}: {type(error).__name__}: {error}; correct the "
                          "name or the module, or install it beside this package") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{field}.class_path = {wanted.class_path!r}: {'no such class' if found is None else found}; "
                          f"name a class that is a {kind.__module__}.{kind.__name__}")
    try:
        built: T = found(**wanted.init_args)
    except Exception as error:
        raise ConfigError(f"{field}.init_args = {wanted.init_args!r}: {wanted.class_path} cannot be made of them: "
                          f"{error}") from error
    return built
