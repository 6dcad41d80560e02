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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CALL_SECONDS = 60.0


class SlurmError(RuntimeError):
    """A command of SLURM failed. Its words."""


def call(*command: str) -> str:
    """Output of a command of SLURM. SlurmError: it fails, is not there, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


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


def exclude(job: str, nodes: Sequence[str]) -> None:
    """The next life does without these nodes, and without those that earlier ones left out."""
    before = JobInfo.of(job).fields.get("ExcNodeList", "(null)")
    there = hosts(before) if before != "(null)" else []
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys([*there, *nodes]))}")


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def chain(job: str, script: Path, arguments: Sequence[str], variables: Mapping[str, str], excluded: Sequence[str],
          folder: str) -> str:
    """Submits the same once more, to begin when this job has ended; number of the new job. What was said to sbatch on
    its command line is read back from this job."""
    found = JobInfo.of(job).fields
    said = {"--partition": "Partition", "--account": "Account", "--qos": "QOS", "--time": "TimeLimit",
            "--nodes": "NumNodes", "--job-name": "JobName", "--output": "StdOut"}
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


def srun(tasks_per_node: int, nodes: int, processors: int) -> list[str]:
    """One task per GPU on every node. processors: that this job has on each; tasks share them where they are few."""
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}",
               f"--ntasks-per-node={tasks_per_node}", "--export=ALL"]
    each = processors // tasks_per_node
    return [*command, f"--cpus-per-task={each}"] if each else [*command, "--overcommit"]
