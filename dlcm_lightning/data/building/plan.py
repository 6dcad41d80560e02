"""What is to be built and from what: `recipe.json` of a build, which every process that works on it must agree with.

The work is cut into *tasks* by a rule that looks at nothing but the list of inputs: a file as large as task_bytes is
a task of its own, and consecutive smaller ones share a task up to that size, so that neither a few huge files nor a
million tiny ones are a burden. Tasks know nothing of each other; whoever does them, in whatever order, on however many
machines, writes the same bytes.

Inputs are known by their path below the folder that was named, and by their size: a build may continue on another
mount. Correcting a damaged input is no reason to begin anew: sizes may change where the tasks stay what they are and
the input's own task is unfinished, whose finished shards the writer compares with the texts, document by document.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dlcm_lightning.durable import write_atomically
from dlcm_lightning.errors import DataError

PLAN = "recipe.json"
FORMAT = 1
TASK_BYTES = 256 * 1024**2


class Input(NamedTuple):
    """A file to read."""

    path: Path
    name: str
    """Relative to the folder that was named, with forward slashes."""
    size: int


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
    format: int = FORMAT
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    """Of the inputs, in bytes. No inputs: the source is made of texts in memory, in one task."""

    def __post_init__(self) -> None:
        if not self.source or self.source.startswith(".") or any(sign in self.source for sign in "/\\\0"):
            raise DataError(f"source = {self.source!r}: becomes the name of a folder; use letters, digits, - and _")
        if not 0 <= self.validation_share < 1:
            raise DataError(f"validation_share = {self.validation_share}: must lie in [0, 1)")
        if min(self.shard_bytes, self.block_tokens, self.task_bytes) < 1:
            raise DataError(f"shard_bytes = {self.shard_bytes}, task_bytes = {self.task_bytes}: must be positive")

    def tasks(self) -> list[range]:
        """The inputs of every task, as places in the list of inputs."""
        found: list[range] = []
        first = total = 0
        for place, size in enumerate(self.sizes):
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
                raise ValueError(f"format {found['format']}, this version writes {FORMAT}")
            return Plan(**{**found, "names": tuple(found["names"]), "sizes": tuple(found["sizes"])})
        except FileNotFoundError:
            raise DataError(f"{path}: missing, so {folder} is no build of this version; remove it or write "
                            "elsewhere") from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not the recipe of a build ({error}); remove {folder} and build again") from error

    def differences(self, begun: Plan, finished: Collection[int] | None = None) -> list[str]:
        """What stands against continuing `begun` with this plan. finished: tasks; None: all of them."""
        found = [f"{one.name} was {getattr(begun, one.name)!r} and is {getattr(self, one.name)!r} now"
                 for one in fields(self)
                 if one.name not in ("names", "sizes") and getattr(self, one.name) != getattr(begun, one.name)]
        if self.names != begun.names:
            fewer, more = sorted(set(begun.names) - set(self.names)), sorted(set(self.names) - set(begun.names))
            found += [f"{len(names)} inputs {word}, such as {names[0]}"
                      for names, word in ((fewer, "are gone"), (more, "are new")) if names]
            return found if fewer or more else [*found, "the inputs come in another order"]
        changed = [place for place, (old, new) in enumerate(zip(begun.sizes, self.sizes, strict=True)) if old != new]
        tasks = self.tasks()
        if finished is not None and tasks == begun.tasks():
            done = {place for number in finished for place in tasks[number]}
            changed = [place for place in changed if place in done]
        if changed:
            first = changed[0]
            found.append(f"{len(changed)} inputs have another size, such as {self.names[first]} with "
                         f"{self.sizes[first]} bytes, {begun.sizes[first]} before")
        return found


def list_inputs(inputs: Iterable[str | Path], glob: str = "**/*") -> list[Input]:
    """The files named, and those below the folders named that `glob` fits, in the order of their paths.

    Hidden files, and what lies in hidden folders, are left out. DataError: nothing there, nothing found, a bad glob.
    """
    found: list[Input] = []
    for item in map(Path, inputs):
        if item.is_file():
            found.append(Input(item, item.name, item.stat().st_size))
            continue
        if not item.is_dir():
            raise DataError(f"{item}: no such file or folder")
        try:
            below = sorted((path.relative_to(item).parts, path) for path in set(item.glob(glob)))
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"glob = {glob!r}: not a pattern below the input folder ({error}); such as **/*.jsonl.gz"
                            ) from error
        found += [Input(path, "/".join(parts), path.stat().st_size) for parts, path in below
                  if ".." not in parts and not any(part.startswith(".") for part in parts) and path.is_file()]
    if not found:
        raise DataError(f"{', '.join(map(str, inputs))}: no files to read" + (
            f" that {glob!r} fits" if glob != "**/*" else ""))
    return found
