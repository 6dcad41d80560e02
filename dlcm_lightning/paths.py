"""What can stand where a path is asked for: a path, with ~ and variables, or an address; standard library only."""

from __future__ import annotations

import os
import re

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/|(?:file|memory|local):")
"""Of fsspec (s3://bucket/x, file:///x), and what is meant to be one (s3:/bucket)."""
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def is_address(text: str) -> bool:
    """Whether it is meant as an address and not as a path of this machine."""
    return ADDRESS.match(text) is not None


def expanded(text: str) -> str:
    """The path or address with a leading ~ and variables ($HOME, ${HOME}) replaced. ValueError: one that is not set, or
    the home of an unknown user."""
    for one in VARIABLE.finditer(text):
        name = one[1] or one[2]
        if name not in os.environ:
            raise ValueError(f"the variable {name} is not set; set it, or write the path out")
    found = os.path.expandvars(text)
    if found.startswith("~"):
        found = os.path.expanduser(found)
        if found.startswith("~"):
            raise ValueError("there is no home folder of that name; write the path out")
    return found
