"""Which files a build reads: every one that lies below what was named is read, left out by a stated rule, or refused.

Given can be files, folders, addresses of fsspec (s3://bucket/folder), lists in braces (part-{000..099}.jsonl.gz) and
commands (pipe:aws s3 cp s3://bucket/x.tar -). Folders are walked here: links are followed, but not in circles. Left
out, and counted, are hidden files, what the glob does not fit, and what a build itself has put there. A dangling link,
a folder that cannot be read, a device or a named pipe would be a hole in the corpus, and end the build instead.
"""

from __future__ import annotations

import errno
import fnmatch
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from dlcm_lightning.data.preprocessing.kinds import AUTO, RECORDS, TEXT_ENDINGS, is_card, is_sum, kind_of
from dlcm_lightning.data.preprocessing.plan import PLAN, Input
from dlcm_lightning.data.store import patiently
from dlcm_lightning.data.tokenizer import SETTINGS, TOKENIZER
from dlcm_lightning.errors import DataError
from dlcm_lightning.paths import is_address

PIPE = "pipe:"
MOST_IN_BRACES = 1_000_000
NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)")
NAMES_KEPT = 10_000
"""Of files left out for one reason; the others are counted."""
SHOWN = 5
HIDDEN, UNFIT, OURS = "hidden", "not fitting the glob", "of this corpus itself"
CIRCLES, DANGLING = "links to a folder they lie in", "dangling links that the glob does not fit"
CARD, SUM = "descriptions of the records beside them", "sums and marks"


@dataclass
class LeftOut:
    """Files for one reason."""

    count: int = 0
    size: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, size: int) -> None:
        self.count += 1
        self.size += size
        if len(self.names) < NAMES_KEPT:
            self.names.append(name)


@dataclass
class Listing:
    """The files to read, and the others."""

    files: list[Input] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str, size: int = 0) -> None:
        self.left_out.setdefault(reason, LeftOut()).add(name, size)


def list_inputs(inputs: Iterable[str | Path], glob: str = "**/*", reading: str = AUTO, out: str | Path | None = None
                ) -> Listing:
    """The files named, and those below the folders named that `glob` fits, in the order of their paths.

    reading: the format of all of them (kinds.py), or auto: by their names. out: where the source will be; what a build
    writes there is no input. DataError: nothing there, nothing found, a bad glob, what cannot be read, unknown formats.
    """
    fits = Glob(glob)
    listing = Listing()
    given = list(inputs)
    for item in given:
        for one in _braces(str(item)):
            if one.startswith(PIPE):
                listing.files.append(Input(one, one, -1, "", "webdataset"))
            elif is_address(one) and not one.startswith("file:"):
                _remote(one, fits, listing)
            else:
                _local(Path(one.removeprefix("file:") if not one.startswith("file://") else one[7:]), fits,
                       Path(out) if out is not None else None, listing)
    listing.files = list(_of_known_kind(listing, reading))
    if not listing.files:
        raise DataError(f"{', '.join(map(str, given))}: no files to read" + (
            f" that {glob!r} fits" if glob != "**/*" else ""))
    return listing


class Glob:
    """A pattern of paths below a folder: * ? [..] within a name, ** for any number of folders."""

    def __init__(self, pattern: str) -> None:
        """DataError: it is absolute, empty or leads upwards."""
        parts = pattern.split("/")
        if not pattern or pattern.startswith("/") or ".." in parts or "\0" in pattern:
            raise DataError(f"glob = {pattern!r}: not a pattern below the input folder; such as **/*.jsonl.gz")
        self.pattern = pattern
        self._parts = [part for part in parts if part not in ("", ".")]
        if self._parts and self._parts[-1] == "**":
            self._parts.append("*")

    def fits(self, parts: Sequence[str]) -> bool:
        """Whether a file is meant."""
        return len(self._parts) in self._reached(parts)

    def leads_into(self, parts: Sequence[str]) -> bool:
        """Whether files below a folder may be meant."""
        return any(place < len(self._parts) for place in self._reached(parts))

    def _reached(self, parts: Sequence[str]) -> set[int]:
        """How many parts of the pattern may be used up by those of a path."""
        places = self._without_names({0})
        for part in parts:
            after: set[int] = set()
            for place in places:
                if place < len(self._parts):
                    if self._parts[place] == "**":
                        after.add(place)
                    elif _name_fits(self._parts[place], part):
                        after.add(place + 1)
            places = self._without_names(after)
        return places

    def _without_names(self, places: set[int]) -> set[int]:
        """`**` may stand for no folder at all."""
        found = set(places)
        for place in places:
            while place < len(self._parts) and self._parts[place] == "**":
                place += 1
                found.add(place)
        return found


@lru_cache(maxsize=256)
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def _name_fits(pattern: str, name: str) -> bool:
    return _expression(pattern).match(name) is not None


def _braces(text: str) -> Iterator[str]:
    """What a list in braces stands for; a path that exists is meant as it is. DataError: too many, not closed."""
    if "{" not in text or (not is_address(text) and not text.startswith(PIPE) and os.path.lexists(text)):
        yield text
        return
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in NUMBERS.findall(text))
    if count > MOST_IN_BRACES:  # before the library makes a list of them
        raise DataError(f"{text}: stands for {count:,} files, more than {MOST_IN_BRACES:,}; name their folder and a "
                        "glob")
    try:
        yield from braceexpand(text)
    except ValueError as error:
        raise DataError(f"{text}: not a list in braces ({error}); such as part-{{000..099}}.tar") from error


def stamp_of(found: os.stat_result) -> str:
    """Changes whenever the content of a file does, and sometimes when it does not."""
    return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _local(item: Path, fits: Glob, out: Path | None, listing: Listing) -> None:
    try:
        found = item.stat()
    except OSError as error:
        if item.is_symlink() and (isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP):
            raise DataError(f"{item}: a link that leads nowhere; mend it or leave it out") from error
        raise DataError(f"{item}: no such file or folder" if isinstance(error, FileNotFoundError | NotADirectoryError)
                        else f"{item}: cannot be read ({error})") from error
    if stat.S_ISREG(found.st_mode):
        listing.files.append(Input(str(item), item.name, found.st_size, stamp_of(found)))
    elif stat.S_ISDIR(found.st_mode):
        if (item / PLAN).is_file() and (item / "train").is_dir():
            raise DataError(f"{item}: a source of shards; its documents are tokenised already. Name it in "
                            "data.sources, or give the texts that it was made of")
        _Walk(fits, out, listing).below(item, frozenset(((found.st_dev, found.st_ino),)))
    else:
        raise DataError(f"{item}: {_what(found.st_mode)} and no file; give a file, or a command as 'pipe:cat ...'")


def _what(mode: int) -> str:
    for test, name in ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"),
                       (stat.S_ISBLK, "a device")):
        if test(mode):
            return name
    return "something else"


class _Found(NamedTuple):
    """Something in a folder."""

    path: Path
    parts: tuple[str, ...]
    """Below the folder that was named."""
    above: frozenset[tuple[int, int]]
    """Device and number of the folders that lead here."""
    at_out: bool


class _Walk:
    """Through a folder, in the order of paths."""

    def __init__(self, fits: Glob, out: Path | None, listing: Listing) -> None:
        self.fits, self.listing = fits, listing
        self.out = out.stat() if out is not None and out.is_dir() else None

    def below(self, root: Path, above: frozenset[tuple[int, int]]) -> None:
        waiting = self._entries(root, (), above)
        while waiting:
            waiting += self._visit(waiting.pop())

    def _entries(self, folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]) -> list[_Found]:
        """The last one first."""
        try:
            with os.scandir(folder) as entries:
                names = sorted((entry.name for entry in entries), reverse=True)
            here = folder.stat()
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be read ({error.strerror}); mend its rights, or leave it out "
                            "with --glob") from error
        at_out = self.out is not None and (here.st_dev, here.st_ino) == (self.out.st_dev, self.out.st_ino)
        return [_Found(folder / name, (*parts, name), above, at_out) for name in names]

    def _visit(self, one: _Found) -> list[_Found]:
        """Takes a file, or leaves it out; returns what a folder holds."""
        path, name, leave_out = one.path, "/".join(one.parts), self.listing.leave_out
        found = self._stat(one)
        if found is None:
            return []
        is_folder, identity = stat.S_ISDIR(found.st_mode), (found.st_dev, found.st_ino)
        size = 0 if is_folder else found.st_size
        if path.name.startswith("."):
            leave_out(HIDDEN, name + "/" * is_folder, size)
        elif one.at_out and (path.name in (TOKENIZER, SETTINGS) or (path / PLAN).is_file()):
            leave_out(OURS, name + "/" * is_folder, size)
        elif is_folder and identity in one.above:
            leave_out(CIRCLES, name)
        elif is_folder and not self.fits.leads_into(one.parts):
            leave_out(UNFIT, name + "/")
        elif is_folder:
            return self._entries(path, one.parts, one.above | {identity})
        elif not self.fits.fits(one.parts):
            leave_out(UNFIT, name, size)
        elif stat.S_ISREG(found.st_mode):
            self.listing.files.append(Input(str(path), name, size, stamp_of(found)))
        else:
            raise DataError(f"{path}: {_what(found.st_mode)} and no file; remove it, or leave it out with --glob")
        return []

    def _stat(self, one: _Found) -> os.stat_result | None:
        """Of what a link leads to. None: a dangling one that may be left out."""
        path, name = one.path, "/".join(one.parts)
        try:
            return path.stat()
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
            if path.name.startswith("."):
                self.listing.leave_out(HIDDEN, name)
            elif dangling and not self.fits.fits(one.parts):
                self.listing.leave_out(DANGLING, name)
            else:
                reason = "a link that leads nowhere" if dangling else f"cannot be read ({error.strerror})"
                raise DataError(f"{path}: {reason}; mend it, or leave it out with --glob") from error
            return None


def _remote(address: str, fits: Glob, listing: Listing) -> None:
    """Files below an address. DataError: not there, its size is unknown, the library for it is missing."""
    if address.startswith("memory:"):
        raise DataError(f"{address}: the memory of this process, which its workers do not see; give files")
    import fsspec

    try:
        system, root = fsspec.url_to_fs(address)
        single = patiently(lambda: system.isfile(root))
        found: dict[str, dict[str, Any]] = patiently(lambda: {root: system.info(root)} if single else
                                                     system.find(root, detail=True))
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: {error}; install the library for such addresses (s3fs, gcsfs, ...)") from error
    except OSError as error:
        raise DataError(f"{address}: cannot be read ({error})") from error
    if not found:
        raise DataError(f"{address}: no such file or folder")
    for path, about in sorted(found.items(), key=lambda item: item[0].split("/")):
        named = path == root
        name = path.rpartition("/")[2] if named else path.removeprefix(root.rstrip("/") + "/")
        parts, size = name.split("/"), about.get("size")
        if not named and any(part.startswith(".") for part in parts):
            listing.leave_out(HIDDEN, name, size or 0)
        elif not named and not fits.fits(parts):
            listing.leave_out(UNFIT, name, size or 0)
        elif size is None:
            raise DataError(f"{system.unstrip_protocol(path)}: the store does not say how long it is; fetch it first")
        else:
            stamp = str(about.get("ETag") or about.get("etag") or about.get("md5Hash") or about.get("mtime")
                        or about.get("LastModified") or "")
            listing.files.append(Input(str(system.unstrip_protocol(path)), name, int(size), stamp))


def _of_known_kind(listing: Listing, reading: str) -> Iterator[Input]:
    """The inputs with their format. DataError: names that do not say it, where it is not given."""
    if reading != AUTO:
        yield from (file._replace(kind=reading) for file in listing.files)
        return
    kinds = [file.kind or kind_of(file.name) for file in listing.files]
    records = any(kind in RECORDS for kind in kinds)
    unknown: list[str] = []
    for file, kind in zip(listing.files, kinds, strict=True):
        if is_sum(file.name):
            listing.leave_out(SUM, file.name, file.size)
        elif is_card(file.name) and kind in (None, "text") and (records or kind is None):
            listing.leave_out(CARD, file.name, file.size)
        elif kind is None:
            unknown.append(file.name)
        else:
            yield file._replace(kind=kind)
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        raise DataError(
            f"{len(unknown)} of {len(kinds)} files have names that do not say what they hold: {shown}. Give --format "
            "jsonl where every line is an object with a text, --format text where every file is one document (known by "
            f"name are {len(TEXT_ENDINGS)} kinds of text and code), parquet or webdataset; --glob leaves files out")
