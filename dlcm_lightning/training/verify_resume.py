"""`dlcm verify-resume`: a run that is disturbed at random moments ends, bit for bit, as the run that was left alone.

Two runs of one configuration, each as real processes of the real command. The first goes straight through. The second
is killed (kill -9 of one rank or of all, in a step or in the middle of a save), told to stop (SIGTERM, SIGUSR1), and
started again each time. Then everything that both have left is compared: weights, both moments, buffers, and of every
step the loss and all other numbers of its line, the learning rates, and digests of which samples it read and of their
noise. Only times may differ.

A kill counts as one in a save where the half-written folder is there to show it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.cluster.checks import room
from dlcm_lightning.cluster.local import LocalRanks
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config
from dlcm_lightning.data.preprocessing.prepare import prepare_sample_corpus
from dlcm_lightning.errors import STOPPED, RunError
from dlcm_lightning.progress import Log, progress_bar
from dlcm_lightning.run_directory import CHECKPOINTS, METRICS_FILE, UNFINISHED, folders
from dlcm_lightning.scaling.memory import checkpoint_bytes
from dlcm_lightning.training.callbacks.metrics import TIMED

STEPS_TO_SPARE = 6
"""For each disturbance, so that the run does not end before them."""
LONGEST_DELAY_SECONDS = 0.6
START_SECONDS = 120.0
"""How long an attempt may take to its first step, beside reading a checkpoint."""
COMPILE_SECONDS = 240.0
"""And beside compiling."""
ATTEMPT_SECONDS = 600.0
"""How long it may take to its end, beside reading and writing checkpoints."""
BYTES_A_SECOND = 1e8
"""At which a slow disk and a slow processor write, read and hash them."""
CHECKPOINT_EVERY = 4
RESULT = "verify-resume.json"


@dataclass(frozen=True)
class Disturbance:
    """What happens to one attempt."""

    signal: int
    in_save: bool = False
    """As soon as a save has begun, not after a random time."""
    rank: int | None = None
    """To one rank; the others lose a peer. None: to all."""

    def __str__(self) -> str:
        where = "in a save" if self.in_save else "at a random moment"
        return f"{signal.Signals(self.signal).name} {where}, {'every rank' if self.rank is None else 'one rank'}"


@dataclass
class Verdict:
    """What was compared, and how it came out."""

    strategy: str
    ranks: int
    steps: int
    micro_batches: int
    attempts: int = 1
    disturbances: dict[str, int] = field(default_factory=dict)
    """By kind, those that hit a run that was under way."""
    compared: dict[str, int] = field(default_factory=dict)
    differing: dict[str, list[str]] = field(default_factory=dict)
    """By kind of thing, the first few names."""

    @property
    def good(self) -> bool:
        return not any(self.differing.values())

    def table(self) -> str:
        lines = [f"{self.strategy}, {self.ranks} processes, {self.steps} steps of {self.micro_batches} micro-batches, "
                 f"{self.attempts} attempts", ""]
        lines += [f"  {count:5d} x {what}" for what, count in self.disturbances.items()]
        lines += ["", f"  {'compared':<28}{'number':>8}{'differing':>12}"]
        for what, count in self.compared.items():
            differing = self.differing.get(what, [])
            shown = f"   {', '.join(differing[:3])}" if differing else ""
            lines.append(f"  {what:<28}{count:>8}{len(differing):>12}{shown}")
        lines += ["", "  bit-identical" if self.good else "  NOT THE SAME"]
        return "\n".join(lines)


def plan(kills: int, ranks: int, dice: random.Random) -> list[Disturbance]:
    """Each kind at least once among six, then kills at random."""
    one = dice.randrange(ranks) if ranks > 1 else None
    kinds = [Disturbance(signal.SIGKILL), Disturbance(signal.SIGKILL, in_save=True), Disturbance(signal.SIGTERM),
             Disturbance(signal.SIGUSR1, rank=one), Disturbance(signal.SIGKILL, rank=one),
             Disturbance(signal.SIGTERM, rank=one)]
    more = [Disturbance(signal.SIGKILL, in_save=dice.random() < 0.3,
                        rank=dice.randrange(ranks) if ranks > 1 and dice.random() < 0.5 else None)
            for _ in range(kills - len(kinds))]
    return (kinds + more)[:kills]


def verify_resume(config: Config, folder: Path, kills: int, seed: int, log: Log = print,
                  checkpoint_every: int = CHECKPOINT_EVERY) -> Verdict:
    """config: of any run; its length, and how often it logs, are set here. folder: of both, made anew.
    checkpoint_every: steps between checkpoints; fewer for a model whose checkpoints are large.

    RunError: there is no room for the checkpoints of both runs."""
    config = replace(config, train=replace(config.train, devices=max(1, config.train.devices),
                                           nodes=max(1, config.train.nodes)))
    disturbances = plan(kills, config.train.ranks, random.Random(seed))
    steps = 12 + STEPS_TO_SPARE * len(disturbances)
    tokens = steps * config.data.tokens_per_step
    base = replace(
        config, optim=replace(config.optim, total_tokens=tokens, warmup_tokens=tokens // 4),
        train=replace(config.train, output_dir=str(folder), log_every_steps=1, checkpoint_every_steps=checkpoint_every,
                      validate_every_steps=10**9))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not (found := room(base, folder, runs=2)).good:
        raise RunError(f"{folder}: {found.said}; {found.remedy}")
    if config.data.corpus == "sample":
        prepare_sample_corpus(config.data, config.model.vocab_size, log)
    verdict = Verdict(config.train.strategy, config.train.ranks, steps, base.micro_batches)
    straight, disturbed = (Attempt(replace(base, name=name), folder) for name in ("straight", "disturbed"))
    log(f"straight through: {steps} steps")
    straight.finish()
    hit: Counter[str] = Counter()
    for disturbance in progress_bar(disturbances, desc="disturbed", unit="attempt"):
        hit[str(disturbance)] += disturbed.disturb(disturbance, random.Random(hash((seed, verdict.attempts))))
        verdict.attempts += 1
    disturbed.finish()
    verdict.disturbances = dict(hit)
    compare(straight.run, disturbed.run, verdict)
    write_atomically(folder / RESULT, (json.dumps({**asdict(verdict), "good": verdict.good}, indent=1) + "\n").encode())
    return verdict


class Attempt:
    """One run and its attempts."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.file = config, folder / f"{config.name}.yaml"
        self.run = folder / config.name
        once = checkpoint_bytes(config) / BYTES_A_SECOND
        saves = 1 + config.total_steps // config.train.checkpoint_every_steps
        self.start_seconds = START_SECONDS + 2 * once + COMPILE_SECONDS * config.train.compile
        self.seconds = self.start_seconds + ATTEMPT_SECONDS + 2 * once * saves
        save_config(config, self.file)

    def _start(self) -> LocalRanks:
        command = [sys.executable, "-m", "dlcm_lightning", "pretrain", str(self.file)]
        threads = max(1, (os.cpu_count() or 1) // self.config.train.devices)
        logs = self.run.with_name(f"{self.run.name}-logs")
        return LocalRanks(command, self.config.train.ranks, logs, threads=threads)

    def finish(self) -> None:
        """Lets it run to its end. RuntimeError: it ends otherwise."""
        with self._start() as ranks:
            codes = ranks.wait(self.seconds)
            if any(codes):
                raise RuntimeError(f"{self.run} ended with {codes}:\n{ranks.tail()}")

    def disturb(self, disturbance: Disturbance, dice: random.Random) -> bool:
        """Starts it, lets it reach a step, and disturbs it. Whether it still ran, and was in a save if so wanted."""
        reached = self._steps()
        with self._start() as ranks:
            deadline = time.monotonic() + self.start_seconds
            while ranks.running and self._steps() <= reached and time.monotonic() < deadline:
                time.sleep(0.005)
            if not disturbance.in_save:
                time.sleep(dice.uniform(0, LONGEST_DELAY_SECONDS))
            while disturbance.in_save and ranks.running and not self._saving() and time.monotonic() < deadline:
                time.sleep(0.0002)
            running = ranks.running
            ranks.send(disturbance.signal, disturbance.rank)
            if disturbance.signal == signal.SIGKILL:
                hit = running and (not disturbance.in_save or self._saving())
                if disturbance.rank is None:
                    ranks.kill()
                else:
                    ranks.wait(self.seconds)
                return hit
            codes = ranks.wait(self.seconds)
            return running and all(code == STOPPED for code in codes)

    def _saving(self) -> bool:
        return any((self.run / CHECKPOINTS).glob(f"{UNFINISHED}*"))

    def _steps(self) -> int:
        """The last step that was logged."""
        try:
            lines = (self.run / METRICS_FILE).read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0


def compare(straight: Path, disturbed: Path, verdict: Verdict) -> None:
    """Fills the verdict."""
    ends = [Checkpoint(folder, Manifest.load(folder)) for folder in (folders(run)[-1] for run in (straight, disturbed))]
    verdict.compared["last step"] = 1
    verdict.differing["last step"] = [str(end.step) for end in ends if end.step != verdict.steps]
    with ends[0].tensors() as mine, ends[1].tensors() as theirs:
        for kind in ("weight/", "exp_avg/", "exp_avg_sq/", "buffer/"):
            names = sorted({*mine.names(kind), *theirs.names(kind)})
            verdict.compared[kind.rstrip("/")] = len(names)
            verdict.differing[kind.rstrip("/")] = [
                name for name in names if name not in mine.names(kind) or name not in theirs.names(kind)
                or not torch.equal(mine.get(kind + name), theirs.get(kind + name))]
    lines = [lines_of(run) for run in (straight, disturbed)]
    verdict.compared["steps logged"] = len(lines[0])
    verdict.differing["steps logged"] = [f"{len(lines[1])} of {len(lines[0])}"] * (len(lines[0]) != len(lines[1]))
    keys = {"samples": "samples of a step", "noise": "noise of a step", "loss": "losses",
            "grad_norm": "gradient norms"}
    keys |= {key: "learning rates" for key in lines[0][0] if key.startswith("lr_")}
    for key in lines[0][0]:
        what = keys.get(key, "other numbers of a step")
        verdict.compared[what] = verdict.compared.get(what, 0) + len(lines[0])
        verdict.differing.setdefault(what, []).extend(
            f"{key} at step {one['step']}" for one, other in zip(*lines, strict=False)
            if one.get(key) != other.get(key))


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Of the steps of a run, without the numbers that a clock is in."""
    found = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMED}
            for line in found if line["kind"] == "train"]
