"""`dlcm tokenize`, interrupted at any moment and however often: the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.data.preprocessing import build, worker_pool
from dlcm_lightning.data.preprocessing.build import tokenize
from dlcm_lightning.data.preprocessing.locks import locked
from dlcm_lightning.data.preprocessing.merge import merge, unfinished
from dlcm_lightning.data.preprocessing.plan import Input, Plan
from dlcm_lightning.data.preprocessing.recipe import Recipe
from dlcm_lightning.data.text_encoder import Encoder
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.data.preprocessing.sources import RECIPE, SMALL, run, sums


def test_the_same_command_again_does_nothing_and_other_inputs_are_refused(inputs: Path, tmp_path: Path, home: str
                                                                          ) -> None:
    run(inputs, tmp_path / "out", home)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.name != ".lock"}
    said: list[str] = []
    tokenize([inputs], tmp_path / "out", RECIPE, log=said.append, **SMALL)  # type: ignore[arg-type]
    assert "is finished, nothing to do" in said[0]
    assert merge(tmp_path / "out", "s", said.append).train.tokens and "is finished" in said[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(DataError, match="exists already and was built from something else: shard_bytes was 6000 and is "
                                        "7000 now"):
        run(inputs, tmp_path / "out", home, shard_bytes=7000)
    (inputs / "b.jsonl").write_text('{"text": "other"}')
    with pytest.raises(DataError, match=r"exists already.* 1 inputs have another content .*, such as b\.jsonl with 17"):
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
    while kills < 20 or (not interrupted and kills < 100):  # on a busy machine all may come too early
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

    def do_tasks(job: worker_pool.Job, tasks: list[tuple[int, list[Input]]], workers: int,
                 progress: worker_pool.Progress,
                 report: object) -> None:
        for number, files in tasks:
            assert worker_pool.Task(job.plan, job.working, number).work(files, job.encoder, progress, threads=1,
                                                                        wait=False)

    monkeypatch.setattr(build, "do_tasks", do_tasks)


def test_finished_shards_are_never_redone_nor_their_texts_tokenised_again(
        inputs: Path, tmp_path: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    encode = Encoder.encode_documents
    encoded: list[str] = []

    def counting(self: Encoder, texts: list[str]) -> list[np.ndarray]:
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode_documents", counting)
    monkeypatch.setattr("dlcm_lightning.data.preprocessing.tasks.BATCH_CHARACTERS", 500)
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
    with pytest.raises(DataError, match=r"1 inputs have another content .*, such as a\.jsonl\.gz"):
        run(inputs, out, home)


def test_a_changed_text_in_an_unfinished_task_is_noticed(inputs: Path, tmp_path: Path, home: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    monkeypatch.setattr("dlcm_lightning.data.preprocessing.tasks.BATCH_CHARACTERS", 500)
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
    task = worker_pool.Task(Plan.load(unfinished(out / "s")), unfinished(out / "s"), 1)
    with locked(unfinished(out / "s") / "tasks" / "000001.lock", wait=False) as mine:
        assert mine
        assert not task.work([], tokenizer.encoder, lambda *_: None, threads=1, wait=False)
        process = subprocess.Popen(command(inputs, out, home), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert any("waiting for other processes that are at 1 tasks" in line for line in process.stdout)
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    run(inputs, tmp_path / "whole", home)
    assert sums(out) == sums(tmp_path / "whole")


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


def waits(number: int) -> bool:
    """Whether a process has not computed for half a second."""
    def ticks() -> list[str]:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[11:13]

    before = ticks()
    time.sleep(0.5)
    return ticks() == before


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
        if workers and (unfinished(out / "s") / "tasks" / "000001.lock").exists() and waits(workers[0]):
            return process, workers[0]
        time.sleep(0.05)
    raise AssertionError("the worker never began")


def test_a_worker_that_is_killed_is_an_error_with_a_remedy(inputs: Path, tmp_path: Path, home: str) -> None:
    process, worker = stuck(inputs, tmp_path, home)
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 2 and "a worker ended with exit code -9" in error and "fewer --workers" in error
    assert re.search(r"at or after \S+/inputs/b\.jsonl, line 1 to \S+/inputs/b\.jsonl, line 500", error), error


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
