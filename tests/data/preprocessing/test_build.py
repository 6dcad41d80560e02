"""`dlcm tokenize`: the same bytes whoever does which task; what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.data.preprocessing.build import tokenize, tokenize_documents
from dlcm_lightning.data.preprocessing.documents import SPLITS
from dlcm_lightning.data.preprocessing.inputs import list_inputs
from dlcm_lightning.data.preprocessing.merge import Built, merge
from dlcm_lightning.data.preprocessing.plan import Plan
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.data.preprocessing.sources import RECIPE, run, say_nothing, sums
from tests.synthetic import make_texts


def documents_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Every document of a finished source, both splits, read off the tars and NAME.skip by hand."""
    found = []
    for split in SPLITS:
        for name in json.loads((folder / split / "manifest.json").read_text())["shards"]["name"]:
            path = folder / split / name
            skip = path.with_suffix(".skip")
            rows = np.fromfile(skip, "<i8").reshape(-1, 4).tolist() if skip.is_file() else []
            content = path.read_bytes()
            for block, (at, count, lengths_at, documents) in enumerate(
                    np.fromfile(path.with_suffix(".index"), "<i8").reshape(-1, 4).tolist()):
                ids = np.frombuffer(content[at:at + 2 * count], "<u2")
                lengths = np.frombuffer(content[lengths_at:lengths_at + 4 * documents], "<u4").astype(int)
                begins = np.cumsum(lengths) - lengths
                for place, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
                    if [block, place, begin, length] in rows:
                        rows.remove([block, place, begin, length])
                    else:
                        found.append(tokenizer.decode(ids[begin:begin + length]))
            assert not rows, "a row of NAME.skip is no document"
    return found


def test_every_document_comes_once_whatever_its_format(inputs: Path, tmp_path: Path, home: str,
                                                        tokenizer: Tokenizer) -> None:
    built = run(inputs, tmp_path / "out", home)
    assert built is not None
    code = [f"x = {number}\n" * 40 for number in range(50)]
    wanted = [*make_texts("english", 500, seed=2), *make_texts("chinese", 300, seed=3), *code]
    assert sorted(documents_of(tmp_path / "out" / "s", tokenizer)) == sorted(wanted)
    assert built.train.documents + built.validation.documents == len(wanted)
    assert built.train.text_bytes + built.validation.text_bytes == sum(len(text.encode()) for text in wanted)
    assert built.train.tokens + built.validation.tokens == sum(map(len, tokenizer.encode_documents(wanted)))
    files = sorted(path.name for path in (tmp_path / "out" / "s").iterdir() if path.is_file())
    assert files == ["account.json", "inputs.json", "recipe.json"]
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"]


def test_any_number_of_workers_and_jobs_gives_the_same_bytes(inputs: Path, tmp_path: Path, home: str) -> None:
    run(inputs, tmp_path / "1", home)
    whole = sums(tmp_path / "1")
    assert len({name.split("/")[-1].split("-")[0] for name in whole if name.endswith(".tar")}) > 3, "tasks"
    assert any(name.endswith("-00001.tar") for name in whole) and any(name.endswith(".skip") for name in whole)
    for workers in (2, 3):
        run(inputs, tmp_path / str(workers), home, workers=workers)
        assert sums(tmp_path / str(workers)) == whole
    for number in (2, 0, 1):
        with pytest.raises(DataError, match=r"tasks are unfinished: "):
            merge_of(tmp_path / "array")
        assert run(inputs, tmp_path / "array", home, array=(number, 3), workers=1 + number % 2) is None
    merge_of(tmp_path / "array")
    assert sums(tmp_path / "array") == whole


def merge_of(out: Path) -> Built:
    if not out.exists():
        raise DataError("tasks are unfinished: all, for nothing was begun")
    return merge(out, "s", say_nothing)


def test_bad_inputs_are_named_and_nothing_takes_the_name_of_the_source(inputs: Path, tmp_path: Path, home: str) -> None:
    (inputs / "code" / "x.py").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"code/x\.py: not UTF-8"):
        run(inputs, tmp_path / "out", home, workers=2)
    assert not (tmp_path / "out" / "s").exists() and not list((tmp_path / "out").rglob("manifest.json"))


def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path, home: str) -> None:
    def build(path: Path, recipe: Recipe = RECIPE, folder: str | None = home, **options: object) -> None:
        tokenize([path], tmp_path / "out", recipe, tokenizer_folder=folder, workers=1, **options)  # type: ignore

    with pytest.raises(DataError, match="nowhere: no such file"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files to read"):
        build(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="no document with text"):
        build(tmp_path / "blank.txt")
    (tmp_path / "blank.txt").write_text("good")  # what was begun of nothing stands in nobody's way
    with pytest.raises(DataError, match=r"no files to read that '\*\.py' fits"):
        build(tmp_path / "empty", Recipe("s", "d", "*.py"))
    for glob in ("/etc/*", ""):
        with pytest.raises(DataError, match="not a pattern below"):
            build(tmp_path / "empty", Recipe("s", "d", glob))
    for name in ("../s", "", ".s", "a/b", "a\\b", "a\0"):
        with pytest.raises(DataError, match="becomes the name of a folder"):
            build(tmp_path / "blank.txt", Recipe(name, "d"))
    for options, message in (({"workers": 0}, "workers = 0"), ({"array": (2, 2)}, "array = 2/2"),
                             ({"validation_share": 1.0}, r"validation_share = 1\.0"),
                             ({"shard_bytes": 0}, "shard_bytes = 0")):
        with pytest.raises(DataError, match=message):
            tokenize([tmp_path / "blank.txt"], tmp_path / "out", RECIPE, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="name the folder of a tokenizer"):
        tokenize([tmp_path / "blank.txt"], tmp_path / "elsewhere", RECIPE)
    build(tmp_path / "blank.txt", folder=None)
    other = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other, indent=3))
    with pytest.raises(DataError, match="another tokenizer"):
        build(tmp_path / "blank.txt", Recipe("t", "d"), str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"no build of 'nothing' below"):
        merge(tmp_path / "out", "nothing")


def test_hostile_names_of_inputs_lead_nowhere(tmp_path: Path, home: str) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    names = [f"{name}.txt" for name in ("$(touch pwned)", "a\nb", "\\..\\x", "-rf", "天 地", "x;y",
                                        os.fsdecode(b"\xff"))]
    for number, name in enumerate(names):
        (inputs / name).write_text(f"text {number}")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    built = run(inputs, tmp_path / "out", home, validation_share=0.0)
    assert built is not None and built.train.documents == 7
    after = sorted(str(path) for path in tmp_path.rglob("*") if tmp_path / "out" not in [path, *path.parents])
    assert after == before
    names = {path.name for path in (tmp_path / "out" / "s").rglob("*")}
    assert names == {"recipe.json", "inputs.json", "account.json", "train", "validation", "manifest.json",
                     "000000-00000.tar", "000000-00000.index", "000000-00000.hashes"}
    run(inputs, tmp_path / "out", home, validation_share=0.0)


def test_the_command_takes_a_recipe_and_its_flags_stand_over_it(inputs: Path, tmp_path: Path, home: str,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text('name: r\ndomain: d\nglob: "*.jsonl"\nlicence: mine\nhome_page: https://x')
    out = ["--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "r.yaml"), "--tokenizer", home, "--workers", "1"]
    assert main(["tokenize", str(inputs), *out]) == 0
    assert "holds 500 documents" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "r" / "train" / "manifest.json").read_text())
    assert found["about"] == {"licence": "mine", "home_page": "https://x"} and found["domain"] == "d"
    changed = ["--source", "t", "--glob", "code/*.py", "--domain", "code"]
    for part in ("1/2", "0/2"):
        assert main(["tokenize", str(inputs), *out, *changed, "--array", part]) == 0
    assert "dlcm data merge" in capsys.readouterr().out
    assert main(["data", "merge", str(tmp_path / "out"), "--source", "t"]) == 0
    assert "holds 50 documents" in (said := capsys.readouterr().out) and "10 copies are left out" in said
    assert main(["tokenize", str(inputs), "--out", str(tmp_path / "out"), "--source", "u"]) == 2
    assert "--source and --domain name what is built" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tokenize", str(inputs), *out, "--array", "2/2"])
    assert "'2/2': write i/n with 0 <= i < n" in capsys.readouterr().err


def test_tasks_follow_from_the_sizes_alone() -> None:
    plan = Plan("s", "d", "f", 300, "text", 0.0, 1, 1, task_bytes=10, names=tuple("abcdefgh"),
                sizes=(3, 7, 1, 50, 10, 0, 9, 2))
    assert plan.tasks() == [range(0, 2), range(2, 3), range(3, 4), range(4, 6), range(6, 7), range(7, 8)]
    assert Plan("s", "d", "f", 300, "text", 0.0, 1, 1).tasks() == [range(0, 0)]
    million = Plan("s", "d", "f", 300, "text", 0.0, 1, 1, names=("x",) * 10**6, sizes=(4000,) * 10**6)
    assert len(million.tasks()) == 15


def test_inputs_are_listed_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/x.py", "b/a.txt", "a.py", "a/z.py", ".git/x.py", "a/.x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    assert [file.name for file in list_inputs([tmp_path]).files] == ["a/z.py", "a.py", "b/a.txt", "b/x.py", "link.py"]
    assert [file.name for file in list_inputs([tmp_path], "**/*.py").files] == ["a/z.py", "a.py", "b/x.py", "link.py"]
    assert [file.name for file in list_inputs([tmp_path / "b" / "x.py", tmp_path / "a"], "*.txt").files] == ["x.py"]
    with pytest.raises(DataError, match="not a pattern below"):
        list_inputs([tmp_path / "b"], "../a/*")


def test_building_loads_no_torch() -> None:
    code = "import sys; from dlcm_lightning.data.preprocessing import build, merge; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_texts_in_memory_are_built_the_same_way(tmp_path: Path, tokenizer: Tokenizer) -> None:
    built = tokenize_documents(["one", "two", "one", " \n", "", "two", "three"], tokenizer, tmp_path / "s",
                               source="s", domain="d")
    assert sorted(documents_of(tmp_path / "s", tokenizer)) == ["one", "three", "two"]
    assert built.duplicates == 2
    with pytest.raises(DataError, match="exists already"):
        tokenize_documents(["one"], tokenizer, tmp_path / "s", source="s", domain="d")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
