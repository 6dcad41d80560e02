"""`dlcm job`: one attempt of a run inside a SLURM job. It checks the nodes, starts one rank per GPU, listens to them,
and decides what comes after.

It is the batch process itself and does no arithmetic. Of a signal it only takes note: SIGUSR1, which announces that the
time of the job is nearly over, and SIGTERM put a file where the first rank sees it, all save and leave, and srun ends.
What then happens follows from files and from what SLURM says of the job, never from an exit code:

    the run is finished; STOP is there; the mistake is a person's           the end
    SLURM has ended the job: cancelled, requeued by hand, a node failed     nothing: SLURM decides
    several attempts in a row ended badly and left no newer checkpoint      the end, with the reason
    else: nearly out of time, preempted, a dead rank, a hung one            another attempt

Another attempt is asked for with `scontrol requeue`, and where a site forbids that, with a job that waits for this one.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from dlcm_lightning.cluster import slurm
from dlcm_lightning.cluster.attempts import (
    ATTEMPTS,
    NOTICE,
    Attempt,
    How,
    Outcome,
    first_crash,
    fruitless_in_a_row,
    load_attempts,
    save_attempts,
)
from dlcm_lightning.cluster.checks import CheckResult, CheckSummary, Finding, answers_in, judge
from dlcm_lightning.cluster.excluded_nodes import EXCLUDED, record_exclusions, to_leave_out
from dlcm_lightning.cluster.heartbeat import HEARTBEATS, HangDetector, RankStatus
from dlcm_lightning.cluster.requeue import Decision, decide_requeue
from dlcm_lightning.cluster.srun import Srun, job_name
from dlcm_lightning.cluster.submit import (
    NAME,
    POINTERS,
    describe_attempt,
    job_folder,
    recorded_options,
    take,
)
from dlcm_lightning.cluster.world import allocated
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import STOPPED
from dlcm_lightning.run_directory import CONFIG_FILE, LOGS, STOP, newest_step

TOKEN = "token"
STACKS_SECONDS = 3.0
OTHERS_SECONDS = 15.0
"""That the other ranks are given to answer when one has found something wrong."""


def run_job(config_file: str, overrides: Sequence[str]) -> int:
    """One attempt; the exit code of the batch script. ConfigError: outside a job, or a wrong configuration."""
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("dlcm job: runs inside a SLURM job; submit one: sbatch slurm/dlcm_1t.sh RUN_FILE")
    name = os.environ.get(NAME, job_name())
    pointer = POINTERS / name
    begun = NAME in os.environ or int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    if begun and (pointer / CONFIG_FILE).is_file():
        config = load_config(pointer / CONFIG_FILE)
        folder = pointer.resolve()
    else:
        config = load_config(config_file, overrides)
        folder = job_folder(config, name)
        take(folder, config)
    return Supervisor(config, folder, [config_file, *overrides]).supervise()


@dataclass
class Supervisor:
    """One attempt."""

    config: Config
    folder: Path
    arguments: list[str]
    """Of the batch script, for a follow-up job."""
    signals: list[int] = field(default_factory=list)
    """That came, in order."""
    warned: list[float] = field(default_factory=list)
    """When SLURM announced the end of the job's time, in seconds since 1970."""

    def __post_init__(self) -> None:
        self.id = job_name()
        self.run = self.folder.parents[1]
        self.attempts = load_attempts(self.folder)
        self.attempt_folder = self.folder / f"attempt-{len(self.attempts):03d}"
        self.nodes = slurm.hosts(os.environ["SLURM_JOB_NODELIST"])
        self.tasks = allocated()[1]
        self.steps = Srun(self.run, self.folder, self.attempt_folder, len(self.attempts), self.nodes, self.tasks)
        self.attempt = Attempt(job=self.id, began=_now(), nodes=self.nodes, from_step=newest_step(self.run))

    def log(self, line: str) -> None:
        print(f"[{_now()} attempt {len(self.attempts) - 1}] {line}", flush=True)

    def supervise(self) -> int:
        """Exit code of the batch script."""
        try:
            return self._supervise()
        except (OSError, ValueError, slurm.SlurmError) as error:
            traceback.print_exc()
            return self._close("crashed", f"dlcm job: {type(error).__name__}: {error}")

    def _supervise(self) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)
        if self.attempts and self.attempts[-1].to_step is None:  # it could not say how it ended
            self.attempts[-1] = replace(self.attempts[-1], to_step=self.attempt.from_step)
        before = fruitless_in_a_row(self.attempts)
        self.attempts.append(self.attempt)
        self.attempt_folder.mkdir(parents=True, exist_ok=True)
        (self.run / LOGS).mkdir(exist_ok=True)
        self._save()
        describe_attempt(self.attempt_folder, self.nodes)
        self.log(f"job {self.id} on {', '.join(self.nodes)}, {self.tasks} ranks each: {self.run} from step "
                 f"{self.attempt.from_step} of {self.config.total_steps}; tail -f {self.run / LOGS}/rank-00000.log")
        if (self.run / STOP).exists():
            return self._close("stopped", f"{self.run / STOP} is there")
        if before >= self.config.job.max_restarts_without_progress:  # of attempts that could not count themselves
            self.attempts.pop()
            self.attempt = replace(self.attempts[-1], from_step=self.attempt.from_step)
            return self._end(decide_requeue(self.attempt, False, True, before,
                                            self.config.job.max_restarts_without_progress))
        summary, evidence = self._check_twice()
        if summary.bad_nodes or summary.mistakes:
            info = self._info()
            if info is not None and info.taken:  # ranks that were ended while they were asked have not answered
                return self._close("taken", f"SLURM took the job before the first step ({info.state})")
        if summary.bad_nodes:
            named = "; ".join(f"{node}: {why}" for node, why in summary.bad_nodes.items())
            self._record(lambda: record_exclusions(self.folder, evidence, time.time()))
            return self._close("unfit", f"bad nodes: {named}")
        if summary.mistakes:
            first = summary.mistakes[0]
            # What once went well may go well again.
            how: How = "refused" if first.certain and self.attempt.from_step == 0 else "crashed"
            return self._close(how, f"{first.what}: {first.said}. {first.remedy}")
        return self._close(*self._train())

    # One attempt

    def _check_twice(self) -> tuple[CheckSummary, dict[str, list[str]]]:
        """What the ranks say of their nodes before the first step. Nobody is left out for one look: a launch may fail
        once, and a node may be slow for a moment. Also the evidence against nodes that were bad in both."""
        summary = self._check()
        if not summary.bad_nodes or self._told_to_leave():
            return summary, {}
        self.log(f"{', '.join(summary.bad_nodes)}: looked at once more before anybody is left out")
        again = self._check()
        if again.mistakes or not again.bad_nodes:
            return again, {}
        both = {node: [summary.bad_nodes[node], why] for node, why in again.bad_nodes.items()
                if node in summary.bad_nodes}
        if not both:  # another one this time: whatever it is, it stays with no node
            self.log(f"{', '.join(again.bad_nodes)} this time, and no longer {', '.join(summary.bad_nodes)}")
            return CheckSummary(again.rows, {}, [Finding("nodes", False, "another node was bad in each of two looks",
                                                    "look at srun.txt of this attempt")]), {}
        return replace(again, bad_nodes={node: lines[-1] for node, lines in both.items()}), both

    def _check(self) -> CheckSummary:
        """Asks every rank about its node."""
        (self.attempt_folder / TOKEN).write_text(secrets.token_hex(8))
        process = self.steps.start("doctor", ["--in-job"], 1, stdout=subprocess.PIPE)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        deadline = time.monotonic() + 60 * self.config.job.check_minutes
        text, answers = b"", list[CheckResult]()
        while process.poll() is None and time.monotonic() < deadline and not self._told_to_leave():
            time.sleep(0.1)
            heard = process.stdout.read()
            if heard:
                text += heard
                answers = answers_in(text)
            failed = [finding for answer in answers for finding in answer.findings if not finding.good]
            if failed or self.steps.complaints():  # the others may wait for the one that failed
                patience = 0 if any(finding.of_run for finding in failed) else OTHERS_SECONDS
                deadline = min(deadline, time.monotonic() + patience)
        ended = {node: said for nodes, said in self.steps.complaints() for node in slurm.hosts(nodes)}
        self.steps.kill(process)
        answers = answers_in(text + (process.stdout.read() or b""))
        summary = judge(answers, self.nodes, self.tasks, self.config.job.slowest_share, ended)
        for line in summary.table():
            self.log(line)
        if not self._told_to_leave():
            return summary
        return CheckSummary()

    def _train(self) -> tuple[How, str]:
        """How the run left, and why."""
        if self._told_to_leave():
            return "taken", "told to leave before the first step"
        detector = HangDetector(self.attempt_folder / HEARTBEATS, len(self.nodes) * self.tasks, self.config.job,
                            time.monotonic())
        process = self.steps.start("pretrain", [], 0)
        pause = min(1.0, self.config.job.heartbeat_seconds)
        answered, heard_at = 0, time.monotonic()
        while process.poll() is None:
            time.sleep(pause)
            if len(self.signals) > answered:
                answered = len(self.signals)
                self._pass_on(self.signals[-1])
            now = time.monotonic()
            if now - heard_at >= self.config.job.heartbeat_seconds:
                heard_at = now
                detector.listen(now)
                if (blamed := detector.hung(now)) is not None:
                    others = detector.as_far_as(blamed)
                    beside = f", as {others} others, none of them behind" if others else ""
                    return "hung", self._end_hanging(blamed, blamed.silence(now), beside, process)
        if (outcome := Outcome.load(self.attempt_folder)) is not None:
            return outcome.how, outcome.reason
        return self._taken_or(first_crash(self.attempt_folder) or self.steps.what_srun_said(process.returncode))

    def _taken_or(self, reason: str) -> tuple[How, str]:
        """What to call an end without a word of the ranks. reason: where it was not SLURM that ended them."""
        info = self._info()
        if info is None or info.taken:
            return "taken", f"SLURM took the job ({info.state if info else 'it does not say how it stands'})"
        return "crashed", reason

    # Signals

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)
        if number == signal.SIGUSR1:
            self.warned.append(time.time())

    def _told_to_leave(self) -> bool:
        return bool(self.signals)

    def _pass_on(self, number: int) -> None:
        """The ranks read a file; SLURM may have told them too, or not yet."""
        self.log(f"{signal.Signals(number).name}: the ranks save and leave")
        try:
            (self.attempt_folder / NOTICE).touch()
        except OSError as error:
            self.log(f"no notice can be left ({error}); the ranks are told by a signal")
            self.steps.signal("USR1")
        if number == signal.SIGTERM:
            self._note_end("taken", "SLURM ended the job")

    # Hanging

    def _end_hanging(self, blamed: RankStatus, silence: float, beside: str, process: subprocess.Popen[bytes]) -> str:
        """Stacks to the logs, then the end; names the one to blame."""
        reason = (f"rank {blamed.rank} on {blamed.node} has been in {blamed.phase} of step {blamed.step + 1} for "
                  f"{silence:.0f} s{beside}")
        self.log(f"{reason}; the stacks of all ranks go to {self.run / LOGS}")
        self._note_end("hung", reason)
        for number in ("USR2", "CONT"):
            self.steps.signal(number)
        time.sleep(STACKS_SECONDS)
        self.steps.kill(process)
        return reason

    # The end of an attempt

    def _info(self) -> slurm.JobInfo | None:
        """How SLURM sees this job; None where it does not say."""
        try:
            return slurm.JobInfo.of(self.id)
        except slurm.SlurmError as error:
            self.log(str(error))
            return None

    def _record(self, write: Callable[[], None]) -> None:
        """A disk that is full does not end a chain."""
        try:
            write()
        except OSError as error:
            self.log(f"{self.folder}: a record could not be written: {error}")

    def _save(self) -> None:
        self._record(lambda: save_attempts(self.folder, self.attempts))

    def _note_end(self, how: How, reason: str) -> None:
        """Recorded at once: this process may not live to say more."""
        self.attempt.how, self.attempt.reason = how, reason
        self.attempt.to_step = newest_step(self.run)
        self._save()

    def _close(self, how: How, reason: str) -> int:
        self.attempt.how, self.attempt.reason = how, reason
        self.attempt.to_step = newest_step(self.run)
        self.attempt.out_of_time = signal.SIGUSR1 in self.signals
        info, stop = self._info(), (self.run / STOP).exists()
        if info is not None and self.warned and info.ends is not None:
            self.attempt.notice_seconds = max(1.0, info.ends - self.warned[0])
        return self._end(decide_requeue(self.attempt, stop, info is None or info.may_go_on,
                                        fruitless_in_a_row(self.attempts),
                                self.config.job.max_restarts_without_progress))

    def _end(self, decision: Decision) -> int:
        self.attempt.ended = _now()
        self.attempt.decision = decision.why
        self.attempts[-1] = self.attempt
        self.log(f"{self.attempt.how}: {self.attempt.reason}")
        self.log(f"{decision.action}: {decision.why}; steps {self.attempt.from_step} to {self.attempt.to_step}, see "
                 f"{self.folder / ATTEMPTS}")
        self._save()  # before anything is asked of SLURM, which may end this process at once
        return self._again() if decision.action == "again" else decision.code

    def _again(self) -> int:
        """Asks SLURM for another attempt."""
        info = self._info()
        if info is not None and not info.may_go_on:
            self.log("SLURM has ended this job meanwhile, and decides")
            return 0
        if info is not None and not info.batch:
            self.log("this allocation is not a batch job: the same command continues")
            return STOPPED
        before = slurm.left_out(info) if info is not None else []
        wanted = to_leave_out(self.folder, before, hours=self.config.job.exclude_hours)
        try:
            slurm.requeue(self.id)
        except slurm.SlurmError as error:
            now = self._info()
            if now is None or now.may_go_on:
                self.log(f"not requeued ({error}); another job follows this one")
                return self._chain(wanted)
            self.log(f"SLURM has ended this job, and decides ({error})")  # it was heard, or somebody was faster
        if info is not None and set(wanted) != set(before):
            try:
                slurm.exclude(self.id, wanted)
                self.log(f"from now on without {', '.join(wanted) or 'no node'}; why: {self.folder / EXCLUDED}")
            except slurm.SlurmError as error:
                self.log(f"the nodes to leave out could not be named: {', '.join(wanted) or 'none'} ({error})")
        return 0

    def _chain(self, excluded: Sequence[str]) -> int:
        try:
            script = self.folder / "script.sh"
            script.write_text(slurm.call("scontrol", "write", "batch_script", self.id, "-"))
            options = recorded_options(self.folder) or slurm.submitted_options(self.id, slurm.JobInfo.of(self.id))
            notice = next((one.notice_seconds for one in reversed(self.attempts) if one.notice_seconds), None)
            if notice and not any(option.startswith("--signal") for option in options):
                options.append(f"--signal=B:USR1@{notice:.0f}")  # as it was, for SLURM does not show it
            following = slurm.chain(self.id, script, self.arguments, {NAME: self.folder.name}, options, excluded,
                                    os.getcwd())
            self.log(f"job {following} follows")
            return 0
        except (OSError, slurm.SlurmError) as error:
            self.attempt.decision = f"no other attempt could be had: {error}; the same command continues"
            self.log(self.attempt.decision)
            self._save()
            return STOPPED


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
