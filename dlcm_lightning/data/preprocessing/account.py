"""What became of everything that was read: the closing account of a build, on the screen and as `account.json`.

A task keeps its own account beside its shards, the merge adds them up. Every input file is in it, by its format or by
the reason for which it was left out; so is every text, as a document, as null, as blank or as a copy of another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.data.manifest import Manifest
from dlcm_lightning.errors import DataError

ACCOUNT = "account.json"
SHOWN = 3
"""Names that stand on the screen; the file holds more of them."""


@dataclass
class Account:
    """Of a task, or of a whole source. By format: jsonl, parquet, text, webdataset."""

    files: dict[str, int] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    """As they lie on the disk, compressed or not."""
    texts: dict[str, int] = field(default_factory=dict)
    """Documents that were written, copies among them."""
    text_bytes: int = 0
    """Of these, in UTF-8."""
    nulls: int = 0
    """Lines, rows and members whose text is null."""
    blanks: int = 0
    """Those that hold nothing but whitespace, and empty lines."""
    replaced_characters: int = 0
    """Lone surrogates, which became U+FFFD."""
    other_members: dict[str, int] = field(default_factory=dict)
    """Files in tars that hold no text, by the end of their names."""
    other_member_bytes: int = 0
    longest_bytes: int = 0
    longest_place: str = ""

    def begin_file(self, kind: str) -> None:
        self.files[kind] = self.files.get(kind, 0) + 1

    def end_file(self, kind: str, size: int) -> None:
        self.file_bytes[kind] = self.file_bytes.get(kind, 0) + size

    def other_member(self, ending: str, size: int) -> None:
        self.other_members[ending] = self.other_members.get(ending, 0) + 1
        self.other_member_bytes += size

    def document(self, kind: str, size: int, place: str) -> None:
        self.texts[kind] = self.texts.get(kind, 0) + 1
        self.text_bytes += size
        if size > self.longest_bytes:
            self.longest_bytes, self.longest_place = size, place

    def add(self, other: Account) -> None:
        """All that another one holds. Of two longest documents of a length the first stays."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            elif not one.name.startswith("longest"):
                setattr(self, one.name, mine + theirs)
        if other.longest_bytes > self.longest_bytes:
            self.longest_bytes, self.longest_place = other.longest_bytes, other.longest_place


def write_account(folder: Path, account: Account, left_out: dict[str, Any], train: Manifest, validation: Manifest
                  ) -> None:
    """account.json of a source: the counts, and what the manifests make of them. left_out: of the list of inputs."""
    kept = {split.split: {"documents": split.documents, "tokens": split.tokens, "text_bytes": split.text_bytes}
            for split in (train, validation)}
    documents, size = (sum(split[name] for split in kept.values()) for name in ("documents", "text_bytes"))
    found = {
        "source": train.source, "domain": train.domain, "splits": kept, "documents": documents,
        "tokens": sum(split["tokens"] for split in kept.values()), "text_bytes": size,
        "copies": sum(account.texts.values()) - documents, "copied_bytes": account.text_bytes - size,
        "left_out": left_out,
        "read": {name: dict(sorted(value.items())) if isinstance(value, dict) else value
                 for name, value in asdict(account).items()},
    }
    write_atomically(folder / ACCOUNT, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(
        "utf-8", "surrogateescape"))


def read_account(folder: Path) -> dict[str, Any]:
    """DataError: missing, or none."""
    path = folder / ACCOUNT
    try:
        found: dict[str, Any] = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        Account(**found["read"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: no account of a build ({error!r}); remove the source and build it again") from error
    return found


def told(account: dict[str, Any], seconds: float | None = None) -> Iterator[str]:
    """The lines of an account. seconds: that this command took to read it all."""
    read = Account(**account["read"])
    splits = account["splits"]
    yield (f"{account['documents']:,d} documents, {splits['train']['tokens']:,d} training and "
           f"{splits['validation']['tokens']:,d} validation tokens; {account['copies']:,d} copies are left out")
    yield (f"text      {account['text_bytes']:,d} bytes, {account['text_bytes'] / account['tokens']:.2f} a token; "
           f"{account['copied_bytes']:,d} bytes in copies")
    for kind in sorted(read.files):
        yield (f"read      {read.files[kind]:,d} {kind} {_files(read.files[kind])}, {read.file_bytes.get(kind, 0):,d} "
               f"bytes, {read.texts.get(kind, 0):,d} documents")
    for reason, found in account["left_out"].items():
        more = ", ..." if found["count"] > SHOWN else ""
        yield f"left out  {found['count']:,d} {reason}: {', '.join(found['names'][:SHOWN])}{more}"
    if read.other_members:
        shown = ", ".join(f"{count:,d} {ending}" for ending, count in sorted(read.other_members.items()))
        yield f"left out  members of tars without text, {read.other_member_bytes:,d} bytes: {shown}"
    yield f"left out  {read.nulls:,d} null texts, {read.blanks:,d} blank texts or lines"
    if read.replaced_characters:
        yield f"replaced  {read.replaced_characters:,d} lone surrogates, by U+FFFD"
    yield f"longest   {read.longest_bytes:,d} bytes" + (f": {read.longest_place}" if read.longest_place else "")
    if seconds is not None:
        yield (f"speed     {read.text_bytes / 1e6 / max(seconds, 1e-3):.1f} MB of text a second in {seconds:,.1f} s")


def _files(count: int) -> str:
    return "file" if count == 1 else "files"
