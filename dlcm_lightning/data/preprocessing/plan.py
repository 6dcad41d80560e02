"""What is to be built and from what: `recipe.json` of a build, which every process that works on it must agree with.

The work is cut into *tasks* by a rule that looks at nothing but the list of inputs: a file as large as task_bytes is
a task of its own, and consecutive smaller ones share a task up to that size, so that neither a few huge files nor a
million tiny ones are a burden. Tasks know nothing of each other; whoever does them, in whatever order, on however many
machines, writes the same bytes.

Which inputs those were, by content, stands beside it in `inputs.json` (continuing.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.config.checks import LONGEST_NAME, SAFE_NAME
from dlcm_lightning.data.preprocessing.kinds import AUTO, KINDS
from dlcm_lightning.errors import DataError

PLAN = "recipe.json"
FORMAT = 2
TASK_BYTES = 256 * 1024**2


class Input(NamedTuple):
    """Something to read."""

    place: str
    """Path, address, or pipe:command."""
    name: str
    """Relative to the folder that was named, with forward slashes."""
    size: int
    """Bytes; -1 where nobody knows."""
    stamp: str
    """Of the file as it was listed: the same stamp, the same content. Empty where there is none."""
    kind: str = ""
    """jsonl, parquet, text or webdataset."""


@dataclass(frozen=True)
class Plan:
    """Everything that the bytes of a source depend on."""

    source: str
    domain: str
    tokenizer: str
    """Fingerprint."""
    vocab_size: int
    text_field: str
    validation_share: float
    shard_bytes: int
    block_tokens: int
    task_bytes: int = TASK_BYTES
    about: dict[str, str] = field(default_factory=dict)
    reading: str = AUTO
    """Format of the inputs; auto: by their names."""
    format: int = FORMAT
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    """Of the inputs, in bytes. No inputs: the source is made of texts in memory, in one task."""

    def __post_init__(self) -> None:
        for name, what in (("source", "becomes the name of a folder"), ("domain", "becomes the name of a metric")):
            value = getattr(self, name)
            if not SAFE_NAME.fullmatch(value) or len(value) > LONGEST_NAME:
                raise DataError(f"{name} = {value!r}: {what}; use at most {LONGEST_NAME} letters, digits, -, _ and .")
        if self.reading not in (AUTO, *KINDS):
            raise DataError(f"format = {self.reading!r}: choose one of {', '.join((AUTO, *KINDS))}")
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share = {self.validation_share}: must lie in [0, 1)")
        if min(self.shard_bytes, self.block_tokens, self.task_bytes) < 1:
            raise DataError(f"shard_bytes = {self.shard_bytes}, task_bytes = {self.task_bytes}: must be positive")

    def tasks(self) -> list[range]:
        """The inputs of every task, as places in the list of inputs."""
        found: list[range] = []
        first = total = 0
        for place, stated in enumerate(self.sizes):
            size = stated if stated >= 0 else self.task_bytes
            if place > first and total + size > self.task_bytes:
                found.append(range(first, place))
                first, total = place, 0
            total += size
        return [*found, range(first, len(self.sizes))]

    def save(self, folder: Path) -> None:
        """Writes recipe.json, a line a property."""
        lines = [f'"{one.name}": {json.dumps(getattr(self, one.name), ensure_ascii=False)}' for one in fields(self)]
        write_atomically(folder / PLAN, ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "surrogateescape"))

    @staticmethod
    def load(folder: Path) -> Plan:
        """DataError: missing, or not what `save` writes."""
        path = folder / PLAN
        try:
            found: dict[str, Any] = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
            if found["format"] != FORMAT:
                raise ValueError(f"written by another version of this software, format {found['format']}; this one "
                                 f"writes {FORMAT}")
            return Plan(**{**found, "names": tuple(found["names"]), "sizes": tuple(found["sizes"])})
        except FileNotFoundError:
            raise DataError(f"{path}: missing, so {folder} is no build of this version; remove it or write "
                            "elsewhere") from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not the recipe of a build ({error}); remove {folder} and build again") from error

    def differences(self, begun: Plan) -> list[str]:
        """What stands against continuing `begun` with this plan, but for the inputs."""
        return [f"{one.name} was {getattr(begun, one.name)!r} and is {getattr(self, one.name)!r} now"
                for one in fields(self)
                if one.name not in ("names", "sizes") and getattr(self, one.name) != getattr(begun, one.name)]
