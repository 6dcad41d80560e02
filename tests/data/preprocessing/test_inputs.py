"""Which files are inputs: all of them are read, left out by a stated rule, or refused by name."""

from __future__ import annotations

import os
import random
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dlcm_lightning.data.preprocessing.inputs import (
    CARD,
    CIRCLES,
    DANGLING,
    HIDDEN,
    OURS,
    SUM,
    UNFIT,
    Glob,
    Listing,
    list_inputs,
)
from dlcm_lightning.data.preprocessing.kinds import kind_of
from dlcm_lightning.errors import DataError

HOLE = r"in/a/hole\.txt: (a link that leads nowhere|a named pipe|a socket|a device|cannot be read)"


def names(listing: Listing) -> list[str]:
    return [file.name for file in listing.files]


def left_out(listing: Listing) -> dict[str, list[str]]:
    return {reason: found.names for reason, found in listing.left_out.items()}


def write(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", "a/1.txt", "a/deep/2.txt")
    write(tmp_path / "elsewhere", "3.txt", "sub/4.txt")
    (inputs / "linked").symlink_to(tmp_path / "elsewhere")
    (inputs / "a" / "deep" / "up").symlink_to(inputs)
    (tmp_path / "elsewhere" / "sub" / "back").symlink_to(inputs / "linked")
    (inputs / "self").symlink_to(inputs / "self2")
    (inputs / "self2").symlink_to(tmp_path / "elsewhere" / "3.txt")
    listing = list_inputs([inputs], "**/*.txt")
    assert names(listing) == ["a/1.txt", "a/deep/2.txt", "linked/3.txt", "linked/sub/4.txt"]
    assert left_out(listing) == {CIRCLES: ["a/deep/up", "linked/sub/back"], UNFIT: ["self", "self2"]}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize("make", [
    lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path), os.mkfifo, make_socket,
    lambda path: path.symlink_to("/dev/null")])
def test_what_would_be_a_hole_is_refused_unless_the_glob_leaves_it_out(tmp_path: Path, make: Callable[[Path], object],
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    write(tmp_path / "in", "a/1.txt")
    make(tmp_path / "in" / "a" / "hole.txt")
    with pytest.raises(DataError, match=HOLE):
        list_inputs([tmp_path / "in"])
    with pytest.raises(DataError, match=HOLE):
        list_inputs([tmp_path / "in" / "a" / "hole.txt"])
    assert names(list_inputs([tmp_path / "in"], "**/1.*")) == ["a/1.txt"]


def test_a_dangling_link_that_may_have_been_a_folder_is_said(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", "a.txt")
    (inputs / "more").symlink_to(tmp_path / "unmounted")
    assert left_out(list_inputs([inputs], "**/*.txt")) == {DANGLING: ["more"]}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user, to whom rights apply")
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_without_rights_is_named(mode: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        inputs = write(Path(place), "in/a.txt", "in/closed/b.txt", "in/open/c.txt") / "in"
        os.chmod(inputs / "closed", mode)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"in/closed.*: .*cannot be read \(Permission denied\)"):
                list_inputs([inputs])
            assert names(list_inputs([inputs], "open/*")) == ["open/c.txt"]
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("seed", range(30))
def test_a_glob_fits_what_pathlib_finds(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folders = ["", "a/", "b/", "a/b/", "a/b/a/", "b/a/", "c d/"]
    write(tmp_path, *(chance.choice(folders) + chance.choice(["x", "y.txt", "z.jsonl", "ab.py", "[1].txt"])
                      for _ in range(20)))
    parts = ["**", "*", "a", "b", "?", "*.txt", "x", "[ab]*", "z.*", "*.p?", "[!a]*", "c d"]
    for _ in range(60):
        pattern = "/".join(chance.choices(parts, k=chance.randint(1, 4)))
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(pattern) if path.is_file()}
        if pattern.endswith("**"):  # which pathlib takes for folders alone
            found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob(f"{pattern}/*") if path.is_file()}
        fits = Glob(pattern)
        every = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
        assert {path.as_posix() for path in every if (tmp_path / path).is_file() and fits.fits(path.parts)} == found
        for name in found:
            above = Path(name).parts[:-1]
            assert all(fits.leads_into(above[:depth]) for depth in range(len(above) + 1)), (pattern, name)


@pytest.mark.parametrize("glob", ["/etc/*", "", "../*", "a/../b", "a\0"])
def test_a_glob_leads_nowhere_else(tmp_path: Path, glob: str) -> None:
    with pytest.raises(DataError, match="not a pattern below"):
        list_inputs([write(tmp_path, "a.txt")], glob)


def test_lists_in_braces_and_addresses_of_files(tmp_path: Path) -> None:
    write(tmp_path, *(f"p-{number:03d}.jsonl" for number in range(4)), "{0..1}.jsonl")
    listing = list_inputs([f"{tmp_path}/p-{{000..002}}.jsonl", f"file://{tmp_path}/p-003.jsonl",
                           f"local://{tmp_path}/p-000.jsonl", f"{tmp_path}/{{0..1}}.jsonl"])
    assert names(listing) == ["p-000.jsonl", "p-001.jsonl", "p-002.jsonl", "p-003.jsonl", "p-000.jsonl", "{0..1}.jsonl"]
    with pytest.raises(DataError, match=r"p-004\.jsonl: no such file"):
        list_inputs([f"{tmp_path}/p-{{003..004}}.jsonl"])
    with pytest.raises(DataError, match="stands for 100,000,000 files, more than 1,000,000"):
        list_inputs([f"{tmp_path}/p-{{0..9999}}-{{09999..0}}.jsonl"])
    with pytest.raises(DataError, match="not a list in braces"):
        list_inputs([f"{tmp_path}/p-{{0..1.jsonl"])
    for address in ("memory://x/a.jsonl", "memory:/x"):
        with pytest.raises(DataError, match="which its workers do not see"):
            list_inputs([address])
    with pytest.raises(DataError, match=r"nosuch://a/b\.jsonl"):
        list_inputs(["nosuch://a/b.jsonl"])


def test_names_that_do_not_say_what_they_hold_are_refused_unless_a_format_is_given(tmp_path: Path) -> None:
    for name in ("corpus.json", "part-00000", "x.csv", "x.log", "b.parquet.gz", "data.bin", "noending"):
        folder = write(tmp_path / name, "in/" + name, "in/a.txt") / "in"
        with pytest.raises(DataError, match=rf"1 of 2 files have names that do not say .*: {name}\. Give --format"):
            list_inputs([folder])
        assert {file.kind for file in list_inputs([folder], reading="jsonl").files} == {"jsonl"}
        assert names(list_inputs([folder], "*.txt")) == ["a.txt"]


def test_what_describes_records_is_left_out_and_said(tmp_path: Path) -> None:
    inputs = write(tmp_path / "in", "a.jsonl", "README.md", "LICENSE", "license.txt", "SHA256SUMS", "a.jsonl.sha256",
                   "_SUCCESS", "dataset_infos.json", ".gitattributes", "load.py")
    listing = list_inputs([inputs])
    assert names(listing) == ["a.jsonl", "load.py"]
    assert left_out(listing) == {HIDDEN: [".gitattributes"], CARD: ["LICENSE", "README.md", "license.txt"],
                                 SUM: ["SHA256SUMS", "_SUCCESS", "a.jsonl.sha256", "dataset_infos.json"]}
    code = write(tmp_path / "code", "a.py", "README.md", "LICENSE")
    assert names(list_inputs([code])) == ["README.md", "a.py"], "markdown is text where all is text"
    assert names(list_inputs([code], reading="text")) == ["LICENSE", "README.md", "a.py"]


def test_what_a_build_writes_is_no_input(tmp_path: Path) -> None:
    write(tmp_path, "raw/a.txt", "b.txt", "tokenizer.json", "tokenizer_config.json", ".s.unfinished/recipe.json",
          "done/recipe.json", "done/train/x.txt", "raw/done/recipe.txt")
    listing = list_inputs([tmp_path], out=tmp_path)
    assert names(listing) == ["b.txt", "raw/a.txt", "raw/done/recipe.txt"]
    assert left_out(listing) == {HIDDEN: [".s.unfinished/"], OURS: ["done/", "tokenizer.json", "tokenizer_config.json"]}
    with pytest.raises(DataError, match="a source of shards"):
        list_inputs([tmp_path / "done"])


@pytest.mark.parametrize(("name", "kind"), [
    ("a.JSONL", "jsonl"), ("a.ndjson.zst", "jsonl"), ("a.json.gz", "jsonl"), ("a.json", None),
    ("x/a.parquet", "parquet"),
    ("a.tar", "webdataset"), ("a.tgz", "webdataset"), ("a.tar.gz", "webdataset"), ("a.tar.zst", "webdataset"),
    ("a.txt.gz", "text"), ("Makefile", "text"), ("a.c++", None), (".py", None), ("a.", None), ("a.gz", None)])
def test_a_name_says_what_a_file_holds(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
