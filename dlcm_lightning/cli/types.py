"""Types of what is written after `dlcm`: each takes a word, and says what to write instead where it cannot be."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from dlcm_lightning.config.checks import CREDENTIALS, local_path, path_or_address
from dlcm_lightning.errors import ConfigError

QUICKSTART = "quickstart"


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number between these, both included."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from {least:,} to {most:,}")
        return int(text)

    return parse


def real(least: float, most: float) -> Callable[[str], float]:
    """A number between these, both included; not a number is outside."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: write a number from {least:g} to {most:g}")
        return value

    return parse


def path(text: str) -> str:
    """A path of this machine, ~ and variables replaced."""
    return _checked(local_path, text)


def path_or_address_text(text: str) -> str:
    return _checked(path_or_address, text)


def input_text(text: str) -> str:
    """The variables of a command are the shell's."""
    if text.startswith("pipe:"):
        if CREDENTIALS.search(text):
            raise argparse.ArgumentTypeError("a password in a command would stand in the files of the source; give "
                                             "it by the environment")
        return text
    return path_or_address_text(text)


def run_file_text(text: str) -> str:
    """In its place may stand an override, or for some commands an address."""
    return text if is_override(text) else _checked(path_or_address, text)


def is_override(text: str) -> bool:
    """Whether it sets a field, and is not the path of a file with such a name."""
    name, equals, _ = text.partition("=")
    return bool(equals and re.fullmatch(r"[\w.\[\]]+", name)) and not Path(text).exists()


def _checked(check: Callable[[str, str], str], text: str) -> str:
    try:
        return check("path", text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n with 0 <= i < n, such as 0/16")
    return int(number), int(of)


def add_run_file(command: argparse.ArgumentParser, text: str = "run file, or the name of a shipped one") -> None:
    command.add_argument("config", nargs="?", default=QUICKSTART, type=run_file_text,
                         help=f"{text} (default {QUICKSTART})")
    command.add_argument("--config", dest="run_file", metavar="FILE", type=path, help="the same, as an option")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as optim.total_tokens=1000000")
