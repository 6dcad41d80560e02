"""`dlcm tokenize`: the same bytes whoever does which task and however often it is interrupted; what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dlcm_lightning.cli import main
from dlcm_lightning.data.building import build, crew
from dlcm_lightning.data.building.build import tokenize, tokenize_documents
from dlcm_lightning.data.building.documents import SPLITS
from dlcm_lightning.data.building.locks import locked
from dlcm_lightning.data.building.merge import Built, merge, unfinished
from dlcm_lightning.data.building.plan import Plan, list_inputs
from dlcm_lightning.data.building.recipe import Recipe
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.durable import sha256_of
from tests.synthetic import make_texts

RECIPE = Recipe("s", "d")
SMALL = {"shard_bytes": 6000, "task_bytes": 20_000, "validation_share": 0.2}
"""Many shards and tasks out of little text."""


def say_nothing(_: str) -> None:
    pass


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


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


@pytest.fixture
def home(tokenizer: Tokenizer, tmp_path: Path) -> str:
    tokenizer.save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two large files, many small ones, several formats, and copies of texts across them all."""
    folder = tmp_path / "inputs"
    (folder / "code").mkdir(parents=True)
    (folder / "empty").mkdir()
    english, chinese = make_texts("english", 500, seed=2), make_texts("chinese", 300, seed=3)
    lines = [json.dumps({"text": text}) for text in english]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:150] + lines[100:130]).encode(), mtime=0))
    packed = zstandard.compress("\n".join(json.dumps({"text": text}) for text in chinese).encode())
    (folder / "c.jsonl.zstd").write_bytes(packed)
    pyarrow.parquet.write_table(pyarrow.table({"text": chinese[:100] + english[:50]}), folder / "d.parquet")
    for number in range(60):
        (folder / "code" / f"{number:03d}.py").write_text(f"x = {number % 50}\n" * 40)
    (folder / "code" / ".hidden").write_text("not me")
    return folder


def run(inputs: Path, out: Path, home: str | None, **options: object) -> Built | None:
    return tokenize([inputs], out, RECIPE, tokenizer_folder=home, report=say_nothing,
                    **{"workers": 1, **SMALL, **options})  # type: ignore[arg-type]


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
    assert [path.name for path in (tmp_path / "out" / "s").iterdir() if path.is_file()] == ["recipe.json"]
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


def test_the_same_command_again_does_nothing_and_other_inputs_are_refused(inputs: Path, tmp_path: Path, home: str
                                                                          ) -> None:
    run(inputs, tmp_path / "out", home)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
    said: list[str] = []
    tokenize([inputs], tmp_path / "out", RECIPE, report=said.append, **SMALL)  # type: ignore[arg-type]
    assert "is finished, nothing to do" in said[0]
    assert merge(tmp_path / "out", "s", said.append).train.tokens and "is finished" in said[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(DataError, match="exists already and was built from something else: shard_bytes was 6000 and is "
                                        "7000 now"):
        run(inputs, tmp_path / "out", home, shard_bytes=7000)
    (inputs / "b.jsonl").write_text('{"text": "other"}')
    with pytest.raises(DataError, match=r"exists already.* 1 inputs have another size, such as b\.jsonl with 17 bytes"):
        run(inputs, tmp_path / "out", home)


def command(inputs: Path, out: Path, home: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "dlcm_lightning", "tokenize", str(inputs), "--out", str(out), "--source", "s",
            "--domain", "d", "--tokenizer", home, "--shard-megabytes", "0.0057220458984375", "--task-megabytes",
            "0.019073486328125", "--validation-share", "0.2", *options]


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(inputs: Path, tmp_path: Path, home: str) -> None:
    """SIGKILL hits the parent alone: its workers must end by themselves and let go of their tasks."""
    began = time.monotonic()
    subprocess.run(command(inputs, tmp_path / "whole", home, "--workers", "2"), check=True, timeout=60,
                   capture_output=True)
    seconds, whole = time.monotonic() - began, sums(tmp_path / "whole")
    assert any(name.endswith("-00001.tar") for name in whole)
    chance, kills, interrupted, builds = random.Random(0), 0, 0, 0
    while kills < 20:
        out = tmp_path / f"killed-{builds}"
        process = subprocess.Popen(command(inputs, out, home, "--workers", "2"), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=chance.uniform(0.25, 0.8) * seconds)
            assert process.returncode == 0, error
            assert sums(out) == whole
            builds += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            kills += 1
            interrupted += bool(list(unfinished(out / "s").glob("train/*.entry")))
            assert not (out / "s").exists() or sums(out) == whole
    subprocess.run(command(inputs, out, home, "--workers", "2"), check=True, timeout=60, capture_output=True)
    assert sums(out) == whole
    assert interrupted, "no kill came while shards were there"


class Killed(BaseException):
    """Stands for SIGKILL inside a process: nothing catches it."""


def test_interrupted_at_every_write_it_ends_with_the_same_bytes(inputs: Path, tmp_path: Path, home: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync and every rename is the last thing that happens, one after the other."""
    in_process(monkeypatch)
    run(inputs, tmp_path / "whole", home)
    whole, left = sums(tmp_path / "whole"), [10**9]
    real_fsync, real_replace = os.fsync, Path.replace

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    def fsync(handle: int) -> None:
        count()
        real_fsync(handle)

    def replace(path: Path, target: Path) -> Path:
        count()
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    out, builds, deaths, chance = tmp_path / "out", 0, 0, random.Random(1)
    while deaths < 60:
        left[0] = chance.randint(0, 60)
        try:
            run(inputs, out, home)
            assert sums(out) == whole
            builds += 1
            out = tmp_path / f"out-{builds}"
        except Killed:
            deaths += 1
    left[0] = 10**9
    run(inputs, out, home)
    assert sums(out) == whole and builds


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are done by this process, so that a test can reach into them."""

    def do_tasks(job: crew.Job, tasks: list[tuple[int, list[Path]]], workers: int, progress: crew.Progress,
                 report: object) -> None:
        tokenizer = Tokenizer.load(job.tokenizer_folder)
        for number, files in tasks:
            assert crew.Task(job.plan, job.working, number).work(files, tokenizer, progress, threads=1, wait=False)

    monkeypatch.setattr(build, "do_tasks", do_tasks)


def test_finished_shards_are_never_redone_nor_their_texts_tokenised_again(
        inputs: Path, tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    encode = Tokenizer.encode_documents
    encoded: list[str] = []

    def counting(self: Tokenizer, texts: list[str]) -> list[np.ndarray]:
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_documents", counting)
    monkeypatch.setattr("dlcm_lightning.data.building.tasks.BATCH_CHARACTERS", 500)
    run(inputs, tmp_path / "whole", home)
    everything, whole = len(encoded), sums(tmp_path / "whole")
    (inputs / "b.jsonl").write_bytes(good := (inputs / "b.jsonl").read_bytes())
    (inputs / "b.jsonl").write_bytes(good.replace(b'"490 ', b'"490 \n', 1))
    with pytest.raises(DataError, match=r"b\.jsonl, line 491"):
        run(inputs, tmp_path / "out", home)
    working = unfinished(tmp_path / "out" / "s")
    kept = {path: path.stat() for path in working.glob("*/*.tar")}
    held = sum(json.loads(path.read_text())["documents"] for path in working.glob("*/*.entry"))
    assert len({path.name for path in kept}) > 3 and not list(working.glob("*/manifest.json"))
    (inputs / "b.jsonl").write_bytes(good)  # a damaged input is mended and the build goes on
    encoded.clear()
    run(inputs, tmp_path / "out", home)
    assert len(encoded) == everything - held
    same = 0
    for path, before in kept.items():
        after = tmp_path / "out" / "s" / path.parent.name / path.name
        if after.is_file():  # else it held nothing but copies
            assert (after.stat().st_ino, after.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
            same += 1
    assert same > 3
    assert sums(tmp_path / "out") == whole


def begin(inputs: Path, tmp_path: Path, home: str) -> Path:
    """A build whose last task is not done."""
    run(inputs, tmp_path / "out", home, array=(0, 2))
    return tmp_path / "out"


def test_continuing_with_something_else_is_answered_with_what_differs(inputs: Path, tmp_path: Path, home: str) -> None:
    out = begin(inputs, tmp_path, home)
    with pytest.raises(DataError, match=r"\.s\.unfinished: begun with something else: validation_share was 0\.2 and is "
                                        r"0\.1 now\. Give what was given then, or remove that folder"):
        run(inputs, out, home, validation_share=0.1)
    with pytest.raises(DataError, match="text_field was 'text' and is 'body' now"):
        tokenize([inputs], out, Recipe("s", "d", text_field="body"), workers=1, **SMALL)  # type: ignore[arg-type]
    (inputs / "e.txt").write_text("new")
    (inputs / "d.parquet").rename(inputs / "f.parquet")
    with pytest.raises(DataError, match=r"1 inputs are gone, such as d\.parquet; 2 inputs are new, such as e\.txt"):
        run(inputs, out, home)
    (inputs / "f.parquet").rename(inputs / "d.parquet")
    (inputs / "e.txt").unlink()
    (inputs / "a.jsonl.gz").write_bytes((inputs / "a.jsonl.gz").read_bytes() + b" ")
    with pytest.raises(DataError, match=r"1 inputs have another size, such as a\.jsonl\.gz"):
        run(inputs, out, home)


def test_a_changed_text_in_an_unfinished_task_is_noticed(inputs: Path, tmp_path: Path, home: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    monkeypatch.setattr("dlcm_lightning.data.building.tasks.BATCH_CHARACTERS", 500)
    good = (inputs / "b.jsonl").read_bytes()
    (inputs / "b.jsonl").write_bytes(good.replace(b'"490 ', b'"490 \n', 1))
    with pytest.raises(DataError, match="line 491"):
        run(inputs, tmp_path / "out", home)
    (inputs / "b.jsonl").write_bytes(good.replace(b"cat", b"dog", 1))
    with pytest.raises(DataError, match="hold other documents than its inputs do now"):
        run(inputs, tmp_path / "out", home)


def test_a_task_that_another_process_holds_is_waited_for(inputs: Path, tmp_path: Path, home: str,
                                                         tokenizer: Tokenizer) -> None:
    out = begin(inputs, tmp_path, home)
    task = crew.Task(Plan.load(unfinished(out / "s")), unfinished(out / "s"), 1)
    with locked(unfinished(out / "s") / "tasks" / "000001.lock", wait=False) as mine:
        assert mine
        assert not task.work([], tokenizer, lambda *_: None, threads=1, wait=False)
        process = subprocess.Popen(command(inputs, out, home), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert "waiting for other processes that are at 1 tasks" in process.stdout.readline()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    run(inputs, tmp_path / "whole", home)
    assert sums(out) == sums(tmp_path / "whole")


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
    names = ("$(touch pwned)", "a\nb", "\\..\\x", "-rf", "天 地", "x;y", os.fsdecode(b"\xff\xfe"))
    for number, name in enumerate(names):
        (inputs / name).write_text(f"text {number}")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    built = run(inputs, tmp_path / "out", home, validation_share=0.0)
    assert built is not None and built.train.documents == 7
    after = sorted(str(path) for path in tmp_path.rglob("*") if tmp_path / "out" not in [path, *path.parents])
    assert after == before
    names = {path.name for path in (tmp_path / "out" / "s").rglob("*")}
    assert names == {"recipe.json", "train", "validation", "manifest.json", "000000-00000.tar", "000000-00000.index",
                     "000000-00000.hashes"}
    run(inputs, tmp_path / "out", home, validation_share=0.0)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_refuses_is_named_and_the_same_command_continues(inputs: Path, tmp_path: Path, home: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"out: cannot be written .*File exists"):
        run(inputs, out, home)
    out.unlink()
    begin(inputs, tmp_path, home)
    shard = unfinished(out / "s") / "train" / ".000001-00000.tar"
    shard.symlink_to("/dev/full")  # the disk is full from here on, in the worker too
    with pytest.raises(DataError, match=r"\.s\.unfinished: cannot be written .*No space left on device.*same command"):
        run(inputs, out, home)
    shard.unlink()
    run(inputs, out, home)
    run(inputs, tmp_path / "whole", home)
    assert sums(out) == sums(tmp_path / "whole")


def stuck(inputs: Path, tmp_path: Path, home: str) -> tuple[subprocess.Popen[str], int]:
    """A build whose one worker is in the middle of a task and stays there; returns it and the worker's number."""
    out = begin(inputs, tmp_path, home)
    os.mkfifo(unfinished(out / "s") / "train" / ".000001-00000.tar")  # to open it is to wait for a reader
    process = subprocess.Popen(command(inputs, out, home, "--workers", "1"), stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        workers = [int(child) for child in children.read_text().split()
                   if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
        if workers and (unfinished(out / "s") / "tasks" / "000001.lock").exists():
            return process, workers[0]
        time.sleep(0.05)
    raise AssertionError("the worker never began")


def test_a_worker_that_is_killed_is_an_error_with_a_remedy(inputs: Path, tmp_path: Path, home: str) -> None:
    process, worker = stuck(inputs, tmp_path, home)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 2 and "a worker ended with exit code -9" in error and "fewer --workers" in error


def test_a_worker_ends_with_its_parent_in_the_middle_of_a_task(inputs: Path, tmp_path: Path, home: str) -> None:
    process, worker = stuck(inputs, tmp_path, home)
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return  # it ended, and nobody has asked how
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlives its parent")


def test_the_command_takes_a_recipe_and_its_flags_stand_over_it(inputs: Path, tmp_path: Path, home: str,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text('name: r\ndomain: d\nglob: "*.jsonl"\nlicence: mine\nhome_page: https://x')
    out = ["--out", str(tmp_path / "out"), "--recipe", str(tmp_path / "r.yaml"), "--tokenizer", home, "--workers", "1"]
    assert main(["tokenize", str(inputs), *out]) == 0
    assert "holds 500 documents" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "r" / "train" / "manifest.json").read_text())
    assert found["about"] == {"licence": "mine", "home_page": "https://x"} and found["domain"] == "d"
    changed = ["--source", "t", "--glob", "code/*.py", "--domain", "code", "--validation-share", "0"]
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
    assert [file.name for file in list_inputs([tmp_path])] == ["a/z.py", "a.py", "b/a.txt", "b/x.py", "link.py"]
    assert [file.name for file in list_inputs([tmp_path], "**/*.py")] == ["a/z.py", "a.py", "b/x.py", "link.py"]
    assert [file.name for file in list_inputs([tmp_path / "b" / "x.py", tmp_path / "a"], "*.txt")] == ["x.py"]
    with pytest.raises(DataError, match="no files to read"):
        list_inputs([tmp_path / "b"], "../a/*")


def test_building_loads_no_torch() -> None:
    code = "import sys; from dlcm_lightning.data.building import build, merge; print('torch' in sys.modules)"
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
