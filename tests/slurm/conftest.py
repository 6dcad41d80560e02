"""One real cluster for all tests of this folder, and what they ask of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig, JobConfig, OptimConfig, TrainConfig
from tests.conftest import MODEL
from tests.slurm.mini_cluster import MiniCluster, why_not

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="session")
def slurm_is_here() -> None:
    """Else the test is skipped, and says why."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_is_here: None) -> Iterator[MiniCluster]:
    """Three nodes of two GPUs: a job of two may lose one and find another."""
    with tempfile.TemporaryDirectory(prefix="mini", dir="/tmp") as folder:
        Path(folder).chmod(0o755)  # munge answers all users or none
        with MiniCluster(Path(folder) / "c", 3) as running:
            yield running


@dataclass
class Desk:
    """A folder that jobs are submitted from: the templates, a run file, and runs."""

    cluster: MiniCluster
    folder: Path
    config: Config

    @property
    def run(self) -> Path:
        return Path(self.config.train.output_dir) / self.config.name

    def submit(self, *options: str, template: str = "dlcm_1t", overrides: tuple[str, ...] = (), **variables: str
               ) -> str:
        """Number of the job."""
        said = self.cluster.call("sbatch", "--parsable", *options, f"slurm/{template}.sh", "run.yaml", *overrides,
                                 cwd=self.folder, **{"DLCM_PYTHON": sys.executable, "DLCM_DEVICE": "cpu",
                                                     **variables})
        return said.strip()

    def attempts(self) -> list[dict[str, Any]]:
        found = sorted((self.run / "jobs").glob("*/attempts.json"))
        attempts: list[dict[str, Any]] = json.loads(found[-1].read_text()) if found else []
        return attempts

    def step(self) -> int:
        """The last that was logged; a line that is being written does not count."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
            return int(json.loads(lines[-1])["step"])
        except (FileNotFoundError, IndexError):
            return 0

    def trained(self, number: int) -> int:
        """Optimizer steps that attempt `number` has made, by the signs of life of its first rank."""
        attempt = self.attempts()[number]
        folder = next((self.run / "jobs").iterdir())
        try:
            heard = json.loads((folder / f"attempt-{number:03d}/heartbeat/rank-00000").read_text())
        except FileNotFoundError:
            return 0
        return max(0, int(heard["step"]) - int(attempt["from_step"]))

    def until(self, what: str, true: Callable[[], bool], seconds: float = 120.0) -> None:
        """AssertionError, with all that is known: it does not become true."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{self.story()}"
            time.sleep(POLL_SECONDS)

    def ended(self, job: str, seconds: float = 120.0) -> dict[str, str]:
        """The job as it ended."""
        self.until(f"job {job} ends", lambda: self.cluster.job(job)["JobState"] in ENDED, seconds)
        return self.cluster.job(job)

    def output(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("slurm-*.out")))

    def story(self) -> str:
        logs = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}"
                         for log in sorted((self.run / "logs").glob("*.log")))
        queue = self.cluster.call("squeue", check=False)
        return f"{queue}\n{self.output()[-6000:]}\n{logs}\nattempts: {json.dumps(self.attempts(), indent=1)}"


@pytest.fixture
def desk(cluster: MiniCluster, config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A run that would take minutes, on 2 x 2 ranks; whatever is left of its jobs is cancelled."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    data = replace(config, global_batch_size=8, micro_batch_size=2)
    run = Config(
        name="run", seed=3, model=MODEL, data=data,
        optim=OptimConfig(total_tokens=2400 * data.tokens_per_step, warmup_tokens=20 * data.tokens_per_step),
        train=TrainConfig(output_dir=str(folder / "runs"), precision="fp32", log_every_steps=1,
                          validate_every_steps=10**6,
                          checkpoint_every_steps=10),
        job=JobConfig(heartbeat_seconds=0.5, slowest_share=0))  # its nodes share two cores
    save_config(run, folder / "run.yaml")
    yield Desk(cluster, folder, run)
    cluster.call("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 60
    while cluster.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def processes(job: str, rank: int) -> list[int]:
    """Of a rank of a job, as this machine sees them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        names = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        in_step = any(variable.startswith(b"SLURM_STEP_ID=") for variable in variables)  # not the batch script
        if names <= set(variables) and in_step and b"pretrain" in command:
            found.append(int(folder.name))
    return sorted(found)


def kill(pids: list[int], number: int) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)
