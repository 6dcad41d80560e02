"""`dlcm tokenize`: what it reads, how it splits, what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dlcm_lightning.data.documents import clean, digest, split_of, tokenize, tokenize_documents
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import make_texts


def texts_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for split in ("train", "validation")
            for ids in Source(folder / split, tokenizer).documents(10**6)]


@pytest.fixture
def home(tokenizer: Tokenizer, tmp_path: Path) -> str:
    tokenizer.save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_json_lines_gzip_and_plain_text_give_their_documents(tokenizer: Tokenizer, tmp_path: Path, home: str) -> None:
    inputs = tmp_path / "inputs"
    (inputs / "deep").mkdir(parents=True)
    lines = [json.dumps({"body": text, "other": 1}) for text in make_texts("english", 20)]
    (inputs / "one.jsonl").write_text("\n".join([*lines[:10], "", "  "]) + "\n")
    with gzip.open(inputs / "deep" / "two.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[10:]))
    (inputs / "three.txt").write_text("a whole file\nis one document")
    (inputs / ".hidden").write_text("not me")
    built = tokenize([inputs], tmp_path / "out", source="s", domain="d", tokenizer_folder=home, text_field="body")
    wanted = [*make_texts("english", 20), "a whole file\nis one document"]
    assert sorted(texts_of(tmp_path / "out" / "s", tokenizer)) == sorted(wanted)
    assert built.train.documents + built.validation.documents == 21 and built.duplicates == 0
    second = tokenize([inputs / "three.txt"], tmp_path / "out", source="t", domain="d")
    assert second.train.documents + second.validation.documents == 1


def test_exact_duplicates_and_blank_texts_are_dropped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    built = tokenize_documents(["one", "two", "one", " \n", "", "two", "three"], tokenizer, tmp_path / "s",
                               source="s", domain="d")
    assert sorted(texts_of(tmp_path / "s", tokenizer)) == ["one", "three", "two"]
    assert built.duplicates == 2


def test_the_split_depends_on_the_text_alone_and_takes_its_share() -> None:
    splits = [split_of(digest(f"text {number}")) for number in range(20_000)]
    assert 0.017 < splits.count("validation") / 20_000 < 0.023
    assert split_of(b"\x00" * 16) == "validation" and split_of(b"\xff" * 16) == "train"
    assert [split_of(bytes([5, 0x1E, 0xB8, last]) + bytes(12)) for last in (0x51, 0x52)] == ["validation", "train"]


def test_lone_surrogates_do_not_stop_a_build(tokenizer: Tokenizer, tmp_path: Path, home: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "half \\ud83d a pair"}\n')
    tokenize([tmp_path / "x.jsonl"], tmp_path / "out", source="s", domain="d", tokenizer_folder=home)
    assert texts_of(tmp_path / "out" / "s", tokenizer) == [clean("half \ud83d a pair")]
    assert clean("whole 🙂") == "whole 🙂"


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": 5}', "line 2: .* field 'text' is no text"), ('{"txt": "a"}', "line 2: .*KeyError: 'text'"),
    ('{"text": "a"', "line 2: .*JSONDecodeError"), ("[1]", "line 2: .*TypeError"), ("7", "line 2: .*TypeError")])
def test_a_bad_line_is_named(tmp_path: Path, home: str, line: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"x\.jsonl, {message}"):
        tokenize([tmp_path / "x.jsonl"], tmp_path / "out", source="s", domain="d", tokenizer_folder=home)
    assert not (tmp_path / "out" / "s").exists()


def test_a_truncated_gzip_is_named(tmp_path: Path, home: str) -> None:
    content = gzip.compress(b"\n".join(json.dumps({"text": text}).encode() for text in make_texts("english", 200)))
    (tmp_path / "x.jsonl.gz").write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match=r"x\.jsonl\.gz, line \d+: .*EOFError"):
        tokenize([tmp_path / "x.jsonl.gz"], tmp_path / "out", source="s", domain="d", tokenizer_folder=home)


def test_inputs_that_cannot_be_used_are_refused(tokenizer: Tokenizer, tmp_path: Path, home: str) -> None:
    out = tmp_path / "out"

    def build(path: Path, source: str = "s", folder: str | None = home) -> None:
        tokenize([path], out, source=source, domain="d", tokenizer_folder=folder)

    with pytest.raises(DataError, match="nowhere: no such file"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files to read"):
        build(tmp_path / "empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8"):
        build(tmp_path / "latin.txt")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="no document with text"):
        build(tmp_path / "blank.txt")
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match="name the folder of a tokenizer"):
        tokenize([tmp_path / "good.txt"], tmp_path / "elsewhere", source="s", domain="d")
    build(tmp_path / "good.txt")
    with pytest.raises(DataError, match="exists already"):
        build(tmp_path / "good.txt")
    other = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other, indent=3))
    with pytest.raises(DataError, match="another tokenizer"):
        build(tmp_path / "good.txt", "t", str(tmp_path / "other"))
