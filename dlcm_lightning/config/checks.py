"""What a check of a field says when it fails."""

from __future__ import annotations

from typing import get_args


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the value and the remedy."""


def require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{field_name} = {value!r}: {remedy}")


def require_member(field_name: str, value: object, literal: object) -> None:
    allowed = get_args(literal)
    require(value in allowed, field_name, value, f"choose one of {', '.join(map(str, allowed))}")
