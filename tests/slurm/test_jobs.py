"""Jobs on a real SLURM: whatever is done to them, the run ends as if left alone, or not at all where it was told so."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.cluster.local import LocalRanks
from dlcm_lightning.cluster.slurm import fields_of
from dlcm_lightning.compose import save_config
from dlcm_lightning.run_directory import STOP, folders
from dlcm_lightning.training.verify_resume import lines_of
from tests.evaluation.tasks.conftest import write_small_tasks
from tests.slurm.conftest import Desk, kill, processes

pytestmark = pytest.mark.whole
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2", "--time=30", "--signal=B:USR1@50")
GOES_ON = ("", "goes on from the newest checkpoint", "SLURM has ended this job, and decides")
ONE = ("--nodes=1", "--gpus-per-node=1", "--time=30", "--signal=B:USR1@50")


def trains_on(desk: Desk, behind: int = -1, seconds: float = 150.0) -> int:
    """Waits until an attempt after the one of that number has made some steps of its own; its number."""
    found = -1

    def trains() -> bool:
        nonlocal found
        attempts = desk.attempts()
        assert not attempts or attempts[-1]["decision"] in GOES_ON, desk.story()
        found = len(attempts) - 1
        return found > behind and attempts[found]["ended"] is None and desk.trained(found) > 2

    desk.until(f"an attempt after {behind} trains", trains, seconds)
    return found


def test_a_run_that_everything_happens_to_ends_with_the_weights_of_one_left_alone(desk: Desk) -> None:
    cluster, ends = desk.cluster, dict[str, int]()
    job = desk.submit(*TWO_BY_TWO, overrides=("job.step_minutes=0.25",))
    attempt = -1
    for number in range(3):
        ends[f"preempted {number}"] = attempt = trains_on(desk, attempt)
        urgent = cluster.call("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=3",
                              "--output=/dev/null", "--wrap=sleep 1").strip()
        desk.ended(urgent)
    ends["out of time"] = attempt = trains_on(desk, attempt)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    desk.until("the time is over", lambda: desk.attempts()[attempt]["ended"] is not None)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    ends["requeued by hand"] = attempt = trains_on(desk, attempt)
    cluster.call("scontrol", "requeue", job)
    ends["lost a rank"] = attempt = trains_on(desk, attempt)
    kill(processes(job, 2), signal.SIGKILL)
    ends["hung"] = attempt = trains_on(desk, attempt)
    kill(processes(job, 3), signal.SIGSTOP)
    ends["lost a node"] = attempt = trains_on(desk,
                                              attempt)  # the last: SLURM may repeat to the node what it has missed
    second = desk.attempts()[attempt]["nodes"][1]
    cluster.crash(second)
    desk.until(f"{second} is missed", lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.boot(second)
    trains_on(desk, attempt)
    assert desk.ended(job, 600)["JobState"] == "COMPLETED", desk.story()
    ends["finished"] = len(desk.attempts()) - 1

    attempts = {what: desk.attempts()[number] for what, number in ends.items()}
    for number in range(3):
        assert attempts[f"preempted {number}"]["how"] == "stopped", attempts
        assert "SIGTERM" in attempts[f"preempted {number}"]["reason"], attempts
    out_of_time = attempts["out of time"]
    assert out_of_time["how"] == "stopped" and "NOTICE is there" in out_of_time["reason"], attempts
    assert attempts["lost a rank"]["how"] == "crashed", attempts
    assert attempts["hung"]["how"] == "hung" and "rank 3 on" in attempts["hung"]["reason"], attempts
    assert attempts["lost a node"]["how"] in ("taken", "hung", "crashed", "vanished"), attempts
    assert attempts["finished"]["how"] == "finished" and len({one["job"] for one in attempts.values()}) == 1
    assert "most recent call first" in (desk.run / "logs/rank-00000.log").read_text()  # of the one that hung

    alone = replace(desk.config, name="alone", train=replace(desk.config.train, devices=4))
    save_config(alone, desk.folder / "alone.yaml")
    command = [sys.executable, "-m", "dlcm_lightning", "pretrain", str(desk.folder / "alone.yaml")]
    with LocalRanks(command, 4, desk.folder / "alone-logs") as ranks:
        assert ranks.wait(600) == [0] * 4, ranks.tail()
    assert_same(desk.run, Path(alone.train.output_dir) / alone.name)


def assert_same(run: Path, other: Path) -> None:
    """Weights, moments, buffers; every number of every step that no clock is in."""
    ends = [Checkpoint(folder, Manifest.load(folder)) for folder in (folders(run)[-1], folders(other)[-1])]
    with ends[0].tensors() as mine, ends[1].tensors() as theirs:
        assert mine.names() == theirs.names()
        assert all(torch.equal(mine.get(name), theirs.get(name)) for name in mine.names())
    assert lines_of(run) == lines_of(other)


def test_a_cancelled_job_stays_dead_and_has_saved(desk: Desk) -> None:
    job = desk.submit(*ONE)
    trains_on(desk)
    desk.cluster.call("scancel", job)
    assert desk.ended(job)["JobState"] == "CANCELLED"
    time.sleep(8)  # longer than a requeued job waits here
    assert desk.cluster.job(job)["JobState"] == "CANCELLED" and len(desk.attempts()) == 1
    assert desk.attempts()[0]["to_step"] > 0 and desk.attempts()[0]["to_step"] == desk.step()


def test_a_stop_file_ends_the_run_and_keeps_the_next_job_from_starting_it(desk: Desk) -> None:
    job = desk.submit(*ONE)
    trains_on(desk)
    (desk.run / STOP).touch()
    assert desk.ended(job)["JobState"] == "COMPLETED"
    assert desk.attempts()[0]["how"] == "stopped" and desk.attempts()[0]["to_step"] == desk.step()
    again = desk.submit(*ONE)
    assert desk.ended(again)["JobState"] == "COMPLETED"
    assert f"{STOP} is there" in desk.attempts()[0]["reason"] and desk.attempts()[0]["from_step"] == desk.step()
    looked = desk.cluster.call("sbatch", "--parsable", "--gpus-per-node=1", "slurm/evaluate.sh", str(desk.run),
                               cwd=desk.folder, DLCM_PYTHON=sys.executable).strip()
    assert desk.ended(looked)["JobState"] == "COMPLETED", desk.output()
    assert f"step {desk.step()}, " in desk.output() and "bits/byte" in desk.output()
    write_small_tasks(desk.folder / "questions")
    judged = desk.cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4", "slurm/evaluate.sh",
        str(desk.run), "--tasks", "piqa", "--data-dir", "questions", "--batch-tokens=8", cwd=desk.folder,
        DLCM_PYTHON=sys.executable).strip()
    assert desk.ended(judged, 300)["JobState"] == "COMPLETED", desk.output()
    assert desk.output().count("PIQA  validation          3") == 1, desk.output()
    answers = list(desk.run.glob("tasks-*/answers/*/rank-*.jsonl"))
    assert len(answers) == 4, "a batch an answer, shared by four ranks"


def test_a_crash_at_the_same_step_ends_the_chain_with_the_reason(desk: Desk) -> None:
    obstacle = desk.run / "checkpoints/.unfinished-20"
    obstacle.parent.mkdir(parents=True)
    obstacle.touch()  # where the checkpoint of step 20 will be written
    job = desk.submit(*ONE)
    desk.ended(job, 240)
    assert desk.cluster.job(job)["ExitCode"] == "3:0", desk.story()
    assert [(one["how"], one["from_step"], one["to_step"]) for one in desk.attempts()] == [
        ("crashed", 0, 10), ("crashed", 10, 10), ("crashed", 10, 10), ("crashed", 10, 10)]
    assert "3 attempts in a row brought no newer checkpoint than step 10" in desk.attempts()[-1]["decision"]
    assert "checkpoint of step 20 could not be written" in desk.attempts()[-1]["decision"]


def test_a_site_that_forbids_requeueing_gets_a_chain_of_jobs(desk: Desk) -> None:
    given = ("--job-name=my own run", "--mem=3G", "--comment=for Anna", "--output=slurm-my run %j.out")
    first = desk.submit(*ONE, "--no-requeue", *given)
    trains_on(desk)
    kill(processes(first, 0), signal.SIGKILL)
    trains_on(desk, 0)
    attempts = desk.attempts()
    assert attempts[0]["job"] == first != attempts[1]["job"]
    assert attempts[1]["from_step"] == attempts[0]["to_step"]
    assert len(list((desk.run / "jobs").iterdir())) == 1
    fields = fields_of(desk.cluster.call("scontrol", "show", "job", attempts[1]["job"]))
    assert (fields["JobName"], fields["MinMemoryNode"], fields["Comment"]) == ("my own run", "3G", "for Anna")
    assert fields["StdOut"] == str(desk.folder / f"slurm-my run {first}.out")


def test_tasks_that_each_see_a_gpu_of_their_own_are_one_run(desk: Desk) -> None:
    script = desk.folder / "own.sh"
    script.write_text(f"#!/bin/bash\nsrun --ntasks=2 --gpus-per-task=1 {sys.executable} -m dlcm_lightning pretrain "
                      "run.yaml\n")
    job = desk.cluster.call("sbatch", "--parsable", "--nodes=1", "--ntasks=2", "--gpus-per-task=1",
                            "--output=slurm-own.out", str(script), cwd=desk.folder, DLCM_DEVICE="cpu").strip()
    desk.until("it trains", lambda: desk.step() > 3)
    (desk.run / STOP).touch()
    desk.ended(job)
    newest = folders(desk.run)[-1]
    assert len(list(newest.glob("state-*-of-00002.safetensors"))) == 2, desk.output()
    steps = [line["step"] for line in lines_of(desk.run)]
    assert steps == list(range(1, len(steps) + 1)), "every step once"


def test_one_task_of_an_array_is_requeued_alone(desk: Desk) -> None:
    script = desk.folder / "slurm/array.sh"
    text = (desk.folder / "slurm/dlcm_1t.sh").read_text()
    script.write_text(text.replace("CONFIG=configs/run/dlcm_2b_1t.yaml", "CONFIG=run$SLURM_ARRAY_TASK_ID.yaml"))
    desks = []
    for task in range(2):
        config = replace(desk.config, name=f"run{task}")
        save_config(config, desk.folder / f"run{task}.yaml")
        desks.append(Desk(desk.cluster, desk.folder, config))
    job = desk.cluster.call("sbatch", "--parsable", *ONE, "--array=0-1", "slurm/array.sh", cwd=desk.folder,
                            DLCM_PYTHON=sys.executable, DLCM_DEVICE="cpu").strip()
    for one in desks:
        trains_on(one)
    number = desk.cluster.job(f"{job}_1")["JobId"]
    kill(processes(number, 0), signal.SIGKILL)
    trains_on(desks[1], 0)
    assert [one["how"] for one in desks[1].attempts()] == ["crashed", "vanished"]  # the second is under way
    assert len(desks[0].attempts()) == 1 and desks[0].attempts()[0]["ended"] is None, desks[0].story()
    trains_on(desks[0])
    assert len(desks[0].attempts()) == 1


def test_a_node_on_which_nothing_runs_is_left_out(desk: Desk) -> None:
    python = desk.folder / "python"
    python.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" = n2 ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = desk.submit(*TWO_BY_TWO, DLCM_PYTHON=str(python))
    trains_on(desk, 0)
    assert [one["nodes"] for one in desk.attempts()[:2]] == [["n1", "n2"], ["n1", "n3"]], desk.story()
    assert "n2: start: tasks 2-3: Exited with exit code 1" in desk.attempts()[0]["reason"]
    assert desk.cluster.job(job)["ExcNodeList"] == "n2"


@pytest.mark.parametrize(("overrides", "variables", "said"), [
    (("train.keep_last=1000000000",), {}, "room: "),
    (("train.output_dir=/dev/shm/runs",), {}, "shared directory: "),
    ((), {"DLCM_MASTER_ADDR": "10.87.0.250"}, "first node: 10.87.0.250 does not answer"),
    (("model.vocab_size=300",), {}, "data: "),
    (("train.devices=4",), {}, "tasks: train.devices = 4"),
], ids=["no room", "run directory of one node", "unreachable first node", "other tokenizer", "other number of tasks"])
def test_what_would_go_wrong_later_ends_the_job_at_once_with_the_remedy(
    desk: Desk, overrides: tuple[str, ...], variables: dict[str, str], said: str
) -> None:
    job = desk.submit(*TWO_BY_TWO, overrides=overrides, **variables)
    state = desk.ended(job, 90)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), desk.story()
    assert f"refused: {said}" in desk.output()


def test_tasks_that_do_not_fit_the_gpus_and_a_missing_srun_are_refused_by_every_process(desk: Desk) -> None:
    for prefix, said in (("srun --ntasks=2 --ntasks-per-node=1 ", "this node has 2 GPUs"),
                         ("", "was not started by srun")):
        script = desk.folder / "own.sh"
        script.write_text(f"#!/bin/bash\n{prefix}{sys.executable} -m dlcm_lightning pretrain run.yaml\n")
        job = desk.cluster.call("sbatch", "--parsable", *TWO_BY_TWO, "--exclusive", "--output=slurm-own.out",
                                str(script), cwd=desk.folder).strip()
        assert desk.ended(job, 60)["JobState"] == "FAILED"
        assert said in desk.output(), desk.output()


def test_every_life_leaves_what_it_was(desk: Desk) -> None:
    desk.submit(*ONE, SOME_SECRET_KEY="abc")
    trains_on(desk)
    folder = next((desk.run / "jobs").glob("*/attempt-000"))
    assert (folder / "nodes.txt").read_text() == "n1\n"
    assert "torch=" in (folder / "packages.txt").read_text()
    variables = (folder / "environment.txt").read_text()
    assert "SLURM_JOB_ID=" in variables and "SOME_SECRET_KEY=(not kept)" in variables
    assert (folder.parent / "code/dlcm_lightning/cluster/supervisor.py").is_file()
    assert json.loads((folder.parent / "attempts.json").read_text())[0]["from_step"] == 0
