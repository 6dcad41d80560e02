"""What counts as the same input: its content, whatever its name, size and time say."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from dlcm_lightning.data.preprocessing.build import tokenize
from dlcm_lightning.data.preprocessing.formats import read_texts
from dlcm_lightning.data.preprocessing.inputs import list_inputs
from dlcm_lightning.data.preprocessing.locks import locked
from dlcm_lightning.data.preprocessing.merge import unfinished
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.data.preprocessing.sources import RECIPE, SMALL, run, say_nothing, sums


def test_an_edited_file_of_equal_size_is_another_input(inputs: Path, tmp_path: Path, home: str) -> None:
    run(inputs, tmp_path / "out", home)
    path = inputs / "code" / "007.py"
    before = path.stat()
    path.write_text(path.read_text().replace("x = 7", "y = 7"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync leaves it
    assert path.stat().st_size == before.st_size
    with pytest.raises(DataError, match=r"1 inputs have another content .*, such as code/007\.py"):
        run(inputs, tmp_path / "out", home)
    path.write_text(path.read_text().replace("y = 7", "x = 7"))
    run(inputs, tmp_path / "out", home)  # the same once more


def test_the_same_files_elsewhere_are_the_same_and_others_of_their_names_are_not(inputs: Path, tmp_path: Path, home: str
                                                                                 ) -> None:
    run(inputs, tmp_path / "out", home)
    shutil.copytree(inputs, tmp_path / "moved")
    run(tmp_path / "moved", tmp_path / "out", home)
    (tmp_path / "moved" / "b.jsonl").write_bytes((inputs / "b.jsonl").read_bytes().replace(b"cat", b"dog"))
    with pytest.raises(DataError, match=r"1 inputs have another content"):
        run(tmp_path / "moved", tmp_path / "out", home)


def test_a_done_input_that_is_edited_is_noticed_when_the_build_goes_on(inputs: Path, tmp_path: Path, home: str) -> None:
    run(inputs, tmp_path / "out", home, array=(0, 2))
    path = inputs / "a.jsonl.gz"  # of the first task
    content = bytearray(path.read_bytes())
    content[9] ^= 1  # which operating system packed it: nothing that any text shows
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"begun with something else: 1 inputs have another content"):
        run(inputs, tmp_path / "out", home)


def test_what_is_left_out_costs_its_tasks_and_no_other(inputs: Path, tmp_path: Path, home: str) -> None:
    (inputs / "code" / "031.py").write_bytes(b"x = 1\0")
    with pytest.raises(DataError, match=r"code/031\.py: not text, there is a zero byte at 5; leave it out with --glob"):
        run(inputs, tmp_path / "out", home)
    working = unfinished(tmp_path / "out" / "s")
    done = {path: path.stat().st_mtime_ns for path in (working / "tasks").glob("*.done")}
    assert len(done) >= 2
    (inputs / "code" / "031.py").unlink()
    said: list[str] = []
    tokenize([inputs], tmp_path / "out", RECIPE, workers=1, log=said.append, **SMALL,  # type: ignore[arg-type]
             array=(1000, 1001))
    assert any("1 inputs are left out now, such as code/031.py" in line and "0 finished tasks are done anew" in line
               for line in said)
    assert done == {path: path.stat().st_mtime_ns for path in (working / "tasks").glob("*.done")}, "kept"
    run(inputs, tmp_path / "out", home)
    run(inputs, tmp_path / "whole", home)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_what_is_left_out_of_a_finished_task_does_it_anew(inputs: Path, tmp_path: Path, home: str) -> None:
    run(inputs, tmp_path / "out", home, array=(0, 2))
    working = unfinished(tmp_path / "out" / "s")
    assert len(list(working.glob("tasks/*.done"))) >= 2
    (inputs / "a.jsonl.gz").unlink()
    with locked(working / "tasks" / "000000.lock", wait=False) as mine, pytest.raises(
            DataError, match="another process is at task 0, whose inputs are others now"):
        assert mine
        run(inputs, tmp_path / "out", home)
    run(inputs, tmp_path / "out", home)
    run(inputs, tmp_path / "whole", home)
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_a_build_below_its_own_inputs_goes_on_and_is_finished(inputs: Path, tmp_path: Path, home: str) -> None:
    out = inputs / "corpus"
    run(inputs, tmp_path / "whole", home)
    run(inputs, out, home, array=(0, 2))
    run(inputs, out, home)
    assert sums(out / "s" / "train") == sums(tmp_path / "whole" / "s" / "train")
    said: list[str] = []
    tokenize([inputs], out, RECIPE, log=said.append, **SMALL)  # type: ignore[arg-type]
    assert "is finished, nothing to do" in said[0]
    assert not [name for name in list_inputs([inputs], out=out).left_out["of this corpus itself"].names
                if name not in ("corpus/s/", "corpus/tokenizer.json", "corpus/tokenizer_config.json")]


def test_two_sources_of_a_corpus_are_parted_in_the_same_way(inputs: Path, tmp_path: Path, home: str) -> None:
    run(inputs, tmp_path / "out", home, array=(0, 2))
    for share in (0.0, 0.1):
        with pytest.raises(DataError, match=rf"validation_share = {share}: source 's' of .* has 0\.2, and a text "
                                            r"that both hold .* --validation-share 0\.2"):
            tokenize([inputs], tmp_path / "out", Recipe("t", "d"), log=say_nothing, validation_share=share)
    run(inputs, tmp_path / "out", home)
    with pytest.raises(DataError, match="source 's'"):
        tokenize([inputs], tmp_path / "out", Recipe("t", "d"), log=say_nothing)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_noticed(inputs: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    source = {"a.jsonl": "b.jsonl", "a.jsonl.gz": "a.jsonl.gz", "a.txt": "b.jsonl", "a.parquet": "d.parquet"}[name]
    shutil.copy(inputs / source, path)
    file, = list_inputs([path]).files
    assert len(list(read_texts(file, "text"))) == (1 if name == "a.txt" else {"b.jsonl": 500, "d.parquet": 150}.get(
        source, 80))
    texts = read_texts(file, "text")
    next(texts)
    with path.open("ab") as grows:
        grows.write(b"\n")
    with pytest.raises(DataError, match="was changed after the build began; wait until it is written"):
        list(texts)
    with pytest.raises(DataError, match="was changed after the build began"):
        list(read_texts(file, "text"))


def test_a_file_that_grows_during_a_build_ends_it_with_words(tmp_path: Path, home: str) -> None:
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "one two three"}\n' * 100_000)
    stop = threading.Event()

    def grow() -> None:
        while not stop.is_set():
            with path.open("a") as file:
                file.write('{"text": "more"}\n')
            time.sleep(0.001)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        with pytest.raises(DataError, match=r"a\.jsonl: was changed after the build began"):
            run(path.parent, tmp_path / "out", home)
    finally:
        stop.set()
        writer.join()
    built = run(path.parent, tmp_path / "out", home)  # it is whole now
    assert built is not None and built.account["read"]["texts"]["jsonl"] == path.read_text().count("\n")


def test_inputs_json_says_what_was_read(inputs: Path, tmp_path: Path, home: str, tokenizer: Tokenizer) -> None:
    run(inputs, tmp_path / "out", home)
    found = json.loads((tmp_path / "out" / "s" / "inputs.json").read_text())
    names = json.loads((tmp_path / "out" / "s" / "recipe.json").read_text())["names"]
    assert len(found["sha256"]) == len(found["stamps"]) == len(names) == 64
    assert found["left_out"]["hidden"]["names"] == ["code/.hidden"]
    (tmp_path / "out" / "s" / "inputs.json").write_text("{}")
    with pytest.raises(DataError, match=r"inputs\.json: not the list of inputs"):
        run(inputs, tmp_path / "out", home)
