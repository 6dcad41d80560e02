"""The steps of a job: a sub-command of `dlcm` on every rank, started by srun, listened to, ended.

Whoever speaks of a job to SLURM names it by `job_name`: the bare number of one task of an array is that of the whole
array, and what is asked for it is done to all its tasks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dlcm_lightning.cluster import slurm
from dlcm_lightning.cluster.attempts import VARIABLE
from dlcm_lightning.cluster.submit import CODE
from dlcm_lightning.cluster.world import gpus_of_node, step_port
from dlcm_lightning.run_directory import CONFIG_FILE, LOGS

SRUN_SAID = "srun.txt"
END_SECONDS = 30.0


def job_name(environment: Mapping[str, str] = os.environ) -> str:
    """This job, for commands of SLURM."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


@dataclass(frozen=True)
class Srun:
    """Of one attempt."""

    run: Path
    folder: Path
    """Of the submission: code and configuration."""
    attempt: Path
    number: int
    """Of the attempt."""
    nodes: list[str]
    tasks: int
    """On every node."""

    def start(self, command: str, options: list[str], port: int, stdout: int | None = None) -> subprocess.Popen[bytes]:
        """port: which of the attempt's. What the ranks say goes to their logs, or to `stdout`: over SLURM's own
        connections and no file system. What srun says is kept."""
        if stdout is None:
            logs = [f"--output={self.run / LOGS}/rank-%5t.log", "--open-mode=append", "--kill-on-bad-exit=1"]
        else:
            logs = ["--kill-on-bad-exit=0"]
        python = os.environ.get("DLCM_RANK_PYTHON", os.environ.get("DLCM_PYTHON", sys.executable))
        first = step_port(os.environ["SLURM_JOB_ID"], self.number)
        path = [str(self.folder / CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {VARIABLE: str(self.attempt), "PYTHONPATH": ":".join(dict.fromkeys(path)), "PYTHONSAFEPATH": "1",
                     "MASTER_ADDR": os.environ.get("DLCM_MASTER_ADDR", self.nodes[0]),
                     "MASTER_PORT": str(first + port)}
        outside = {name: value for name, value in os.environ.items() if name != "SLURM_GPUS_PER_TASK"}
        srun = slurm.srun(self.tasks, len(self.nodes), fewest(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "1")),
                          gpus_of_node())
        with (self.attempt / SRUN_SAID).open("ab") as said:
            return subprocess.Popen(
                [*srun, *logs, python, "-m", "dlcm_lightning", command, str(self.folder / CONFIG_FILE), *options],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=said, start_new_session=True,
                env={**outside, **variables})

    def complaints(self) -> list[tuple[str, str]]:
        """Nodes, and what srun said of them."""
        return complaints_in((self.attempt / SRUN_SAID).read_text(errors="replace"))

    def what_srun_said(self, code: int) -> str:
        """The first complaint."""
        said = [f"{nodes}: {what}" for nodes, what in self.complaints()]
        return f"{[*said, f'srun ended with {code}'][0]}; see {self.run / LOGS}"

    def signal(self, name: str) -> None:
        """To every task of every step of this job, as far as its nodes are there; said once."""
        steps = slurm.call("squeue", "--noheader", "--steps", f"--jobs={job_name()}", "--format=%i").split()
        for step in steps:
            if step.rpartition(".")[2].isdecimal():  # not the batch script
                try:
                    slurm.call("scancel", f"--signal={name}", step, patience=0)
                except slurm.SlurmError as error:
                    print(error, flush=True)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Where it still runs."""
        if process.poll() is None:
            self.signal("KILL")
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


LAUNCH = re.compile(r"^srun: error: Task launch for \S+ failed on node (\S+): (.+)$", re.MULTILINE)
TASKS = re.compile(r"^srun: error: (\S+): (tasks? .+)$", re.MULTILINE)
KILLED = re.compile(r"Killed|Terminated|exit code (?:137|143)\b")
ABORTED = re.compile(r"Job step aborted|Force Terminated|CANCELLED AT|Application launch failed")


def complaints_in(said: str) -> list[tuple[str, str]]:
    """Nodes and what is wrong with them, by what srun has said. Tasks that could not be launched, and tasks that ended
    by themselves, speak against their own node. When srun gives a step up because of one node, it kills the tasks of
    the others: that they were killed speaks against nobody, unless nothing else was said."""
    launches = [(node, f"launch failed: {what}") for node, what in LAUNCH.findall(said)]
    ended = [(nodes, what) for nodes, what in TASKS.findall(said) if not KILLED.search(what)]
    killed = [(nodes, what) for nodes, what in TASKS.findall(said) if KILLED.search(what)]
    return [*launches, *ended] or ([] if ABORTED.search(said) else killed)


def fewest(counts: str) -> int:
    """Of a list such as 64(x3),32."""
    return min(int(count) for count in re.findall(r"(?:^|,)(\d+)", counts))
