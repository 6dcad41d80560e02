"""What a job knows of a run's attempts, in files that survive them: an attempt begins when a job is started and ends
when it ends, is preempted, or dies, and the next one goes on where it stopped.

    <run>/jobs/<id>/                 of one submission; <id> is that of its first job
        code/  config.yaml           the package and the configuration as they were submitted
        sbatch.json                  options given to sbatch, where they are known
        excluded.json                nodes that were left out, since when, and the evidence
        attempts.json                every attempt: when, where, from and to which step, how it ended, what was decided
        attempt-000/                 of the first
            environment.txt          variables that matter to a run, without passwords; for the owner to read
            packages.txt  nodes.txt
            checks.json              what was found before the first step: checks.py
            heartbeat/rank-00000     see heartbeat.py
            NOTICE                   made by the job: its time is nearly over
            outcome.json             how the run left, written by its first rank; none where it was killed

Exit codes do not carry any of this: srun replaces them as soon as one rank dies before the others. Files are published
by renaming them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.config import ConfigError
from dlcm_lightning.errors import Stopped

VARIABLE = "DLCM_ATTEMPT"
"""Environment of a rank: the folder of its attempt."""
NOTICE, OUTCOME, ATTEMPTS = "NOTICE", "outcome.json", "attempts.json"
How = Literal["finished", "stopped", "refused", "crashed", "hung", "taken", "unfit", "vanished"]
"""finished: to its end. stopped: asked to, and saved. refused: a mistake that only a person can mend. crashed: an error
or a dead rank. hung: a rank gave no sign of life. taken: SLURM ended the job before the run had saved. unfit: a node
was not good enough, and is left out. vanished: nothing is known, the job was gone at once."""


@dataclass(frozen=True)
class Outcome:
    """How a run left."""

    how: How
    reason: str

    def save(self, attempt: Path) -> None:
        write_atomically(attempt / OUTCOME, json.dumps(asdict(self)).encode())

    @staticmethod
    def load(attempt: Path) -> Outcome | None:
        try:
            return Outcome(**json.loads((attempt / OUTCOME).read_bytes()))
        except FileNotFoundError:
            return None


@dataclass
class Attempt:
    """One entry of attempts.json."""

    job: str
    """SLURM's number of the job."""
    began: str
    nodes: list[str]
    from_step: int
    """Of the newest checkpoint when it began."""
    to_step: int | None = None
    ended: str | None = None
    how: How = "vanished"
    """Until it is known better."""
    reason: str = "the job ended without a word: its node failed, or it was killed"
    decision: str = ""
    out_of_time: bool = False
    """Whether the time of the job was over: one that is shorter than a start and a step never gets anywhere."""

    notice_seconds: float | None = None
    """Between SLURM's announcement of the end of the job's time and that end, where there was one."""

    @property
    def fruitless(self) -> bool:
        """Whether it ended badly, or for want of time, and left no newer checkpoint."""
        badly = self.how in ("crashed", "hung", "unfit", "vanished") or self.out_of_time
        return badly and (self.to_step or self.from_step) <= self.from_step


def load_attempts(job: Path) -> list[Attempt]:
    file = job / ATTEMPTS
    return [Attempt(**one) for one in json.loads(file.read_text())] if file.is_file() else []


def save_attempts(job: Path, attempts: list[Attempt]) -> None:
    write_atomically(job / ATTEMPTS, (json.dumps([asdict(attempt) for attempt in attempts], indent=1) + "\n").encode())


def fruitless_in_a_row(attempts: list[Attempt]) -> int:
    """Of the last attempts, those that brought nothing."""
    count = 0
    for attempt in reversed(attempts):
        if not attempt.fruitless:
            break
        count += 1
    return count


def this_attempt(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of this attempt; None outside a job."""
    folder = environment.get(VARIABLE)
    return Path(folder) if folder else None


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Around a run: leaves its outcome for the job, where there is one. Rank 0 speaks for all."""
    attempt = this_attempt()
    if attempt is None:
        yield
        return
    rank = os.environ.get("SLURM_PROCID", "0")
    try:
        yield
    except BaseException as error:
        how = _how(error)
        if how == "crashed":  # one rank's own; the others only lose a peer
            write_atomically(attempt / f"crash-{rank}.txt",
                             f"{type(error).__name__}: {error}\n".encode())
        elif rank == "0" or how == "refused":  # whoever is refused may be ended by the exit code of another
            Outcome(how, str(error)).save(attempt)
        raise
    if rank == "0":
        Outcome("finished", "to its end").save(attempt)


def _how(error: BaseException) -> How:
    if isinstance(error, Stopped):
        return "stopped"
    return "refused" if isinstance(error, ConfigError) else "crashed"  # a disk may have room again, a store answer


def first_crash(attempt: Path) -> str:
    """What the first rank that raised something said, and nothing where none did."""
    found = sorted(attempt.glob("crash-*.txt"), key=lambda file: file.stat().st_mtime)
    if not found:
        return ""
    rank = found[0].stem.removeprefix("crash-")
    lines: list[str] = found[0].read_text(errors="replace").splitlines()
    return f"rank {rank}: {lines[0][:300] if lines else ''}"
