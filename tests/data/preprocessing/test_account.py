"""The closing account: every byte of a tree of inputs is in a document, or named, or the build is refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dlcm_lightning.cli import main
from dlcm_lightning.data.preprocessing.build import tokenize
from dlcm_lightning.data.preprocessing.documents import clean
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.data.preprocessing.sources import say_nothing
from tests.data.preprocessing.test_build import documents_of

PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
WORDS = ["cat", "天地", "naïve", "🙂", "\n", "\t", "  ", "</s>", "<s>", "x²", "ﬁ", "\u0301", "\ufeff", "\r\n", "ab" * 9]


class Tree:
    """A folder of random inputs, and what is to become of each."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.texts: list[str] = []
        self.nulls = self.blanks = self.replaced = 0
        self.files: dict[str, int] = {}
        self.left_out: dict[str, set[str]] = {}
        self.refused: list[str] = []
        """Names of files for which the build has to end."""

    def text(self) -> str | None:
        kind = self.chance.randrange(12)
        if kind == 0:
            self.nulls += 1
            return None
        if kind == 1:
            self.blanks += 1
            return self.chance.choice(["", " ", "\n\t \u3000"])
        found = "t" + "".join(self.chance.choices(WORDS, k=self.chance.randrange(1, 30)))
        if kind == 2:
            found += self.chance.choice(["\ud800", "\udc00\ud83d", "\ud83d\ude00"])
            cleaned = clean(found)
            self.replaced += cleaned.count("\ufffd")
            found, kept = json.loads(json.dumps(found)), cleaned
            self.texts.append(kept)
            return found
        self.texts.append(found)
        return found

    def add(self, place: str) -> None:
        """One file of a random kind below a folder of the tree."""
        number = self.chance.randrange(10**9)
        getattr(self, self.chance.choice(["_jsonl", "_parquet", "_whole", "_tar", "_aside"]))(f"{place}{number}")

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _read(self, kind: str, name: str, content: bytes) -> None:
        self._write(name, content)
        self.files[kind] = self.files.get(kind, 0) + 1

    def _jsonl(self, stem: str) -> None:
        lines = []
        for _ in range(self.chance.randrange(8)):
            if self.chance.random() < 0.1:
                self.blanks += 1
                lines.append("")
            lines.append(json.dumps({"m": [1], "text": self.text()}, ensure_ascii=self.chance.random() < 0.5))
        ending = self.chance.choice([*PACK])
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        self._read("jsonl", f"{stem}{self.chance.choice(['.jsonl', '.ndjson'])}{ending}", PACK[ending](content))

    def _parquet(self, stem: str) -> None:
        out, before = io.BytesIO(), self.replaced
        rows = [self.text() for _ in range(self.chance.randrange(6))]
        self.replaced = before  # Arrow holds no lone surrogates
        rows = [None if row is None else clean(row) for row in rows]
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), out)
        self._read("parquet", f"{stem}.parquet", out.getvalue())

    def _whole(self, stem: str) -> None:
        before, text = self.replaced, self.text()
        self.replaced = before
        if text is None:
            self.nulls -= 1
            text = "text"
            self.texts.append(text)
        ending = self.chance.choice([*PACK])
        content = clean(text).encode()
        self._read("text", f"{stem}{self.chance.choice(['.txt', '.py', '.md'])}{ending}", PACK[ending](content))

    def _tar(self, stem: str) -> None:
        out = io.BytesIO()
        self.texts.append(f"first {stem}")
        with tarfile.open(fileobj=out, mode="w") as made:
            members = [("0.txt", f"first {stem}".encode())]
            for number in range(1, self.chance.randrange(1, 5)):
                members.append((f"{number}.json", json.dumps({"text": self.text()}).encode()))
            for name, content in members:
                about = tarfile.TarInfo(name)
                about.size = len(content)
                made.addfile(about, io.BytesIO(content))
        ending = self.chance.choice([*PACK])
        self._read("webdataset", f"{stem}.tar{ending}", PACK[ending](out.getvalue()))

    def _aside(self, stem: str) -> None:
        folder, _, name = stem.rpartition("/")
        reason, name = self.chance.choice([
            ("hidden", f".{name}.txt"), ("sums and marks", f"{name}.md5"),
            ("descriptions of the records beside them", f"README.{name}.md")])
        whole = f"{folder}/{name}" if folder else name
        self._write(whole, b"not a document")
        self.left_out.setdefault(reason, set()).add(whole)

    def break_one(self) -> None:
        """Something that has to be refused by its name."""
        name = f"z{self.chance.randrange(10**9)}"
        kind = self.chance.randrange(9)
        if kind == 0:
            os.mkfifo(self.folder / (name := f"{name}.txt"))
        elif kind == 1:
            (self.folder / (name := f"{name}.jsonl")).symlink_to("nowhere")
        else:
            name, content = [
                (f"{name}.jsonl.gz", b""), (f"{name}.txt", b"caf\xe9"), (f"{name}.txt", b"a\0b"),
                (f"{name}.jsonl", b'{"text": "a"}\n{"text"'), (f"{name}.csv", b"a,b"),
                (f"{name}.jsonl.zst", zstandard.compress(b'{"text": "a"}' * 99)[:-4]),
                (f"{name}.parquet", b"PAR1 no")][kind - 2]
            self._write(name, content)
        self.refused.append(name)


@pytest.mark.parametrize("seed", range(24))
def test_every_byte_of_a_random_tree_is_accounted_for(tmp_path: Path, seed: int, home: str, tokenizer: Tokenizer
                                                      ) -> None:
    chance = random.Random(seed)
    tree = Tree(tmp_path / "in", chance)
    tree._jsonl("a")  # records are among them
    tree.texts.append("whole")
    tree._read("text", "w.txt", b"whole")
    folders = ["", "x/", "x/y/", "linked/"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    tree.left_out["links to a folder they lie in"] = {"linked/circle"}
    for _ in range(chance.randrange(4, 14)):
        tree.add(chance.choice(folders))
    if seed % 3 == 2:
        tree.break_one()
        with pytest.raises(DataError, match=tree.refused[0].replace(".", r"\.")):
            build(tree.folder, tmp_path / "out", home)
        assert not (tmp_path / "out" / "s").exists()
        return
    account = build(tree.folder, tmp_path / "out", home)
    distinct = list(dict.fromkeys(tree.texts))
    assert sorted(documents_of(tmp_path / "out" / "s", tokenizer)) == sorted(distinct)
    read = account["read"]
    assert read["files"] == tree.files
    assert sum(read["texts"].values()) == len(tree.texts) and account["copies"] == len(tree.texts) - len(distinct)
    assert account["text_bytes"] == sum(len(text.encode()) for text in distinct)
    assert read["text_bytes"] == sum(len(text.encode()) for text in tree.texts)
    assert (read["nulls"], read["blanks"], read["replaced_characters"]) == (tree.nulls, tree.blanks, tree.replaced)
    assert {reason: set(found["names"]) for reason, found in account["left_out"].items()} == tree.left_out
    on_disk = sum(path.stat().st_size for folder in (tree.folder, tmp_path / "elsewhere")
                  for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    assert sum(read["file_bytes"].values()) + sum(one["bytes"] for one in account["left_out"].values()) == on_disk
    assert read["longest_bytes"] == max(len(text.encode()) for text in tree.texts)


def build(folder: Path, out: Path, home: str) -> dict[str, object]:
    built = tokenize([folder], out, Recipe("s", "d"), tokenizer_folder=home, workers=1, log=say_nothing,
                     task_bytes=2000, validation_share=0.3)
    assert built is not None
    assert built.account == json.loads((out / "s" / "account.json").read_text())
    return built.account


def test_what_is_passed_over_is_said(tmp_path: Path, home: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": null}'] * 700 + ['{"text": " "}'] * 200 + [""] * 90 + ['{"text": "one \\ud800"}'] * 3
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "in" / "README.md").write_text("# About")
    (tmp_path / "in" / "load.py").write_text("def load(): pass")
    assert main(["tokenize", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--source", "s", "--domain", "d",
                 "--tokenizer", home]) == 0
    said = capsys.readouterr().out
    for words in ("holds 2 documents", "2 copies are left out", "700 null texts, 290 blank texts or lines",
                  "1 jsonl file, 13,458 bytes, 3 documents", "1 text file, 16 bytes, 1 documents",
                  "3 lone surrogates, by U+FFFD",
                  "1 descriptions of the records beside them: README.md", "16 bytes: load.py", "MB of text a second",
                  "of 2 files 1 are one document each, such as load.py"):
        assert words in said, words
    (tmp_path / "in" / "a.jsonl").write_text('{"text": null}\n{"text": ""}')
    with pytest.raises(DataError, match=r"no document with text in it \(1 texts are null, 1 blank\)"):
        tokenize([tmp_path / "in" / "a.jsonl"], tmp_path / "out", Recipe("t", "d"), log=say_nothing)
