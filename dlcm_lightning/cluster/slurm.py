"""What a job asks of SLURM, and how it reads the answers. Measured on SLURM 22.05:

- A job that was preempted runs on as RUNNING until its notice is over; if its tasks leave before, it ends as COMPLETED
  and is *not* queued again: it has to do that itself. A job that was cancelled is COMPLETING at once, and `scontrol
  requeue` would bring it back to life: it must stay dead. So a job asks for another life only while it is RUNNING, or
  when its time is over, which SLURM does not requeue either.
- `scontrol requeue` keeps the number of the job and the copy of its script. Where a site forbids it, another job that
  waits for this one does the same.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CALL_SECONDS = 60.0
PATIENCE_SECONDS, RETRY_SECONDS = 300.0, 5.0
ABSENT = re.compile("unable to contact|timed out|connection refused|communication connection", re.IGNORECASE)
"""What commands say of a controller that does not answer just now."""


class SlurmError(RuntimeError):
    """A command of SLURM failed. Its words."""


def call(*command: str, patience: float = PATIENCE_SECONDS) -> str:
    """Output of a command of SLURM. patience: seconds for which it is asked again while the controller does not answer.
    SlurmError: it fails, or is not there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS,
                                  stdin=subprocess.DEVNULL)
            said = done.stderr.strip() or done.stdout.strip()
            if not done.returncode:
                return done.stdout
            if done.returncode >= 0 and not ABSENT.search(said):  # a signal to the job meets its commands too
                raise SlurmError(f"{' '.join(command)}: {said}")
        except subprocess.TimeoutExpired as error:
            said = str(error)
        except OSError as error:
            raise SlurmError(f"{command[0]}: {error}") from error
        if time.monotonic() > deadline:
            raise SlurmError(f"{' '.join(command)}: {said}")
        time.sleep(RETRY_SECONDS)


@dataclass(frozen=True)
class JobInfo:
    """`scontrol show job`."""

    fields: Mapping[str, str]

    @staticmethod
    def of(job: str) -> JobInfo:
        shown = call("scontrol", "show", "job", "--oneliner", job)
        return JobInfo(dict(re.findall(r"(\S+?)=(\S*)", shown)))

    @property
    def may_go_on(self) -> bool:
        """Whether this job may ask for another life: nobody has cancelled or requeued it meanwhile."""
        return self.fields.get("JobState") == "RUNNING" or self.fields.get("Reason") == "TimeLimit"

    @property
    def batch(self) -> bool:
        """Whether it has a script, and not a shell of somebody."""
        return self.fields.get("BatchFlag") == "1"

    @property
    def taken(self) -> bool:
        """Whether SLURM is ending it, or has: tasks that died meanwhile did nothing wrong."""
        preempted = self.fields.get("PreemptTime", "None")
        return not self.may_go_on or (preempted != "None" and preempted >= self.fields.get("StartTime", ""))

    @property
    def state(self) -> str:
        return f"{self.fields.get('JobState', '?')}, reason {self.fields.get('Reason', '?')}"


def hosts(nodes: str) -> list[str]:
    """Of a list such as n[1-16]."""
    return call("scontrol", "show", "hostnames", nodes).split()


def left_out(info: JobInfo) -> list[str]:
    """Nodes that a job does without."""
    named = info.fields.get("ExcNodeList", "(null)")
    return hosts(named) if named != "(null)" else []


def exclude(job: str, nodes: Iterable[str]) -> None:
    """A job that waits will do without these nodes, and no others; a running one keeps what it has."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(nodes))}")


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def chain(job: str, script: Path, arguments: Sequence[str], variables: Mapping[str, str], excluded: Iterable[str],
          folder: str) -> str:
    """Submits the same once more, to begin when this job has ended; number of the new job. What was said to sbatch on
    its command line is read back from this job, as far as SLURM shows it."""
    info = JobInfo.of(job)
    found, excluded = info.fields, dict.fromkeys([*left_out(info), *excluded])
    said = {"--partition": "Partition", "--account": "Account", "--qos": "QOS", "--time": "TimeLimit",
            "--nodes": "NumNodes", "--job-name": "JobName", "--output": "StdOut", "--reservation": "Reservation",
            "--constraint": "Features"}
    options = [f"{option}={found[name]}" for option, name in said.items()
               if found.get(name, "(null)") not in ("(null)", "")]
    if gpus := os.environ.get("SLURM_GPUS_PER_NODE", os.environ.get("SLURM_GPUS_ON_NODE")):
        options.append(f"--gpus-per-node={gpus}")
    if task := os.environ.get("SLURM_ARRAY_TASK_ID"):
        options.append(f"--array={task}")
    if excluded:
        options.append(f"--exclude={','.join(excluded)}")
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
    return call("sbatch", "--parsable", f"--dependency=afterany:{job}", f"--export={exported}", f"--chdir={folder}",
                *options, str(script), *arguments).strip().partition(";")[0]


def srun(tasks_per_node: int, nodes: int, processors: int, gpus: int) -> list[str]:
    """One task per GPU on every node, each of which sees all GPUs of its node: ranks choose by their number.
    processors: of the smallest node; tasks share them where they are few. gpus: of a node, 0 where there are none."""
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}",
               f"--ntasks-per-node={tasks_per_node}", "--export=ALL"]
    command += [f"--gpus-per-node={gpus}", "--gpu-bind=none"] if gpus else []
    each = processors // tasks_per_node
    return [*command, f"--cpus-per-task={each}"] if each else [*command, "--overcommit"]
