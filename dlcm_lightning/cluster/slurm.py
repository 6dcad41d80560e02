"""What a job asks of SLURM, and how it reads the answers. Measured on SLURM 22.05:

- A job that was preempted runs on as RUNNING until its notice is over; if its tasks leave before, it ends as COMPLETED
  and is *not* queued again: it has to do that itself. A job that was cancelled is COMPLETING at once, and `scontrol
  requeue` would bring it back to life: it must stay dead. So a job asks for another attempt only while it is
  RUNNING, or when its time is over, which SLURM does not requeue either.
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
SIGNALLED_SECONDS = 0.1
"""Before a command is repeated that a signal to the job has ended: what follows the signal may not be far."""
ABSENT = re.compile("unable to contact|timed out|connection refused|communication connection", re.IGNORECASE)
"""What commands say of a controller that does not answer just now."""


class SlurmError(RuntimeError):
    """A command of SLURM failed. Its words."""


def call(*command: str, patience: float = PATIENCE_SECONDS) -> str:
    """Output of a command of SLURM. patience: seconds for which it is asked again while the controller does not answer.
    SlurmError: it fails, or is not there."""
    deadline = time.monotonic() + patience
    while True:
        pause = RETRY_SECONDS
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CALL_SECONDS,
                                  stdin=subprocess.DEVNULL)
            said = done.stderr.strip() or done.stdout.strip()
            if not done.returncode:
                return done.stdout
            if done.returncode < 0:  # a signal to the job meets its commands too
                said, pause = f"ended by signal {-done.returncode}", SIGNALLED_SECONDS
            elif not ABSENT.search(said):
                raise SlurmError(f"{' '.join(command)}: {said}")
        except subprocess.TimeoutExpired as error:
            said = str(error)
        except OSError as error:
            raise SlurmError(f"{command[0]}: {error}") from error
        if time.monotonic() > deadline:
            raise SlurmError(f"{' '.join(command)}: {said}")
        time.sleep(pause)


WHOLE_LINES = ("Command", "WorkDir", "StdErr", "StdIn", "StdOut", "Comment", "AdminComment", "SystemComment")
"""What `scontrol show job` gives a line of its own, since it may hold blanks. So may a job's name, which ends its line.
"""


def fields_of(shown: str) -> dict[str, str]:
    """Of the first job that `scontrol show job` shows, a field or several a line."""
    found: dict[str, str] = {}
    for line in shown.strip().partition("\n\n")[0].splitlines():
        name, _, value = line.strip().partition("=")
        if name in WHOLE_LINES:
            found.setdefault(name, value)
            continue
        words, named, job_name = line.partition(" JobName=")
        for name, value in re.findall(r"(\S+?)=(\S*)", words):
            found.setdefault(name, value)
        if named:
            found.setdefault("JobName", job_name)
    return found


@dataclass(frozen=True)
class JobInfo:
    """`scontrol show job`."""

    fields: Mapping[str, str]

    @staticmethod
    def of(job: str) -> JobInfo:
        return JobInfo(fields_of(call("scontrol", "show", "job", job)))

    @property
    def may_go_on(self) -> bool:
        """Whether this job may ask for another attempt: nobody has cancelled or requeued it meanwhile."""
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
    def ends(self) -> float | None:
        """When its time is over, in seconds since 1970; None where it has no limit."""
        try:
            return time.mktime(time.strptime(self.fields.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            return None

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
    """A job that waits will do without these nodes, and no others (none of them: with all); a running one keeps what it
    has."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(dict.fromkeys(nodes))}")


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


SHOWN = {"--partition": "Partition", "--account": "Account", "--qos": "QOS", "--time": "TimeLimit",
         "--nodes": "NumNodes", "--job-name": "JobName", "--output": "StdOut", "--error": "StdErr",
         "--reservation": "Reservation", "--constraint": "Features", "--comment": "Comment", "--licenses": "Licenses",
         "--nice": "Nice"}
"""Options of sbatch, and where `scontrol show job` shows them."""
SET = {"--gpus-per-node": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"), "--mem": ("SLURM_MEM_PER_NODE",),
       "--mem-per-cpu": ("SLURM_MEM_PER_CPU",), "--mem-per-gpu": ("SLURM_MEM_PER_GPU",),
       "--cpus-per-task": ("SLURM_CPUS_PER_TASK",), "--hint": ("SLURM_HINT",),
       "--distribution": ("SLURM_DISTRIBUTION",), "--array": ("SLURM_ARRAY_TASK_ID",)}
"""Options, and the variables that tell a job of them."""
HIDDEN = ("--signal", "--open-mode", "--mail-type", "--mail-user", "--tmp", "--switches")
"""Options that are in neither. The line of submission has them, where SLURM keeps accounts."""


def submitted_options(job: str, info: JobInfo, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What was said to sbatch on its command line or in the script, as far as it can be found out."""
    options = [f"{option}={value}" for option, name in SHOWN.items()
               if (value := info.fields.get(name, "")) not in ("", "(null)")
               and not (name == "StdErr" and value == info.fields.get("StdOut"))]
    options += [f"{option}={value}" for option, names in SET.items()
                if (value := next((environment[name] for name in names if environment.get(name)), ""))]
    if info.fields.get("OverSubscribe") == "NO":
        options.append("--exclusive")
    try:
        line = call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=SubmitLine",
                    patience=0)
    except SlurmError:  # no accounts, or an older SLURM
        return options
    return options + [f"{option}={given[1]}" for option in HIDDEN
                      if (given := re.search(rf"(?:^|\s){option}[= ](\S+)", line))]


def chain(job: str, script: Path, arguments: Sequence[str], variables: Mapping[str, str], options: Sequence[str],
          excluded: Iterable[str], folder: str) -> str:
    """Submits the same once more, to begin when this job has ended; number of the new job. options: of sbatch."""
    left = [f"--exclude={','.join(dict.fromkeys(excluded))}"] if excluded else []
    exported = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
    return call("sbatch", "--parsable", *options, *left, f"--dependency=afterany:{job}", f"--export={exported}",
                f"--chdir={folder}", str(script), *arguments).strip().partition(";")[0]


def srun(tasks_per_node: int, nodes: int, processors: int, gpus: int) -> list[str]:
    """One task per GPU on every node, each of which sees all GPUs of its node: ranks choose by their number.
    processors: of the smallest node; tasks share them where they are few. gpus: of a node, 0 where there are none."""
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}",
               f"--ntasks-per-node={tasks_per_node}", "--export=ALL"]
    command += [f"--gpus-per-node={gpus}", "--gpu-bind=none"] if gpus else []
    each = processors // tasks_per_node
    return [*command, f"--cpus-per-task={each}"] if each else [*command, "--overcommit"]
