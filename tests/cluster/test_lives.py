"""How a run left, and what a submission was, stand in files that its job can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlcm_lightning.cluster.lives import VARIABLE, Outcome, first_crash, recorded
from dlcm_lightning.cluster.slurm import JobInfo
from dlcm_lightning.cluster.snapshot import describe_life, job_folder, take
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config, ConfigError, DataConfig, SourceConfig, TrainConfig
from dlcm_lightning.errors import Stopped


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "0")
    return tmp_path


@pytest.mark.parametrize(("error", "how"), [(None, "finished"), (Stopped("SIGTERM"), "stopped"),
                                            (ConfigError("a = 1: wrong"), "refused")])
def test_the_first_rank_says_how_a_run_left(life: Path, error: Exception | None, how: str) -> None:
    try:
        with recorded():
            if error is not None:
                raise error
    except (Stopped, ConfigError):
        pass
    found = Outcome.load(life)
    assert found is not None and found.how == how and (error is None or found.reason == str(error))
    assert first_crash(life) == ""


def test_a_crash_is_one_rank_s_own_and_leaves_no_outcome(life: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(RuntimeError), recorded():
        raise RuntimeError("out of memory\nand more")
    assert Outcome.load(life) is None
    assert first_crash(life) == "rank 3: RuntimeError: out of memory"


def test_other_ranks_leave_the_word_to_the_first_but_for_a_refusal(life: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(Stopped), recorded():
        raise Stopped("x")
    assert Outcome.load(life) is None
    with pytest.raises(ConfigError), recorded():
        raise ConfigError("wrong")
    assert Outcome("refused", "wrong") == Outcome.load(life)


def test_outside_a_job_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with recorded():
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = DataConfig(sources=[SourceConfig("a", "en", 1.0)])
    return Config(name="run", data=data, train=TrainConfig(runs=str(tmp_path / "runs")))


def test_a_snapshot_runs_as_it_was_whatever_is_edited_afterwards(tmp_path: Path, config: Config,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = job_folder(config, "7")
    take(folder, config)
    assert load_config(folder / "config.yaml") == config
    assert (tmp_path / ".jobs/7").resolve() == folder and not list(folder.rglob("__pycache__"))
    (folder / "code/dlcm_lightning/__init__.py").write_text('__version__ = "of the snapshot"\n')
    shown = subprocess.run([sys.executable, "-m", "dlcm_lightning", "--version"], capture_output=True, text=True,
                           env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder / "code")}, check=True)
    assert shown.stdout == "of the snapshot\n"
    assert job_folder(config, "7").name == "7-2"


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(tmp_path: Path, config: Config,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match=r"train\.runs = .*cannot be written"):
        take(job_folder(config, "7"), config)


def test_a_life_is_described_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_SECRET_ACCESS_KEY", "abc"), ("HF_TOKEN", "def"), ("NCCL_SOCKET_IFNAME", "ib0")):
        monkeypatch.setenv(name, value)
    describe_life(tmp_path, ["n1", "n2"])
    text = (tmp_path / "environment.txt").read_text()
    assert "abc" not in text and "def\n" not in text and "NCCL_SOCKET_IFNAME=ib0" in text
    assert (tmp_path / "nodes.txt").read_text() == "n1\nn2\n"


@pytest.mark.parametrize(("fields", "may_go_on", "taken"), [
    ({"JobState": "RUNNING", "Reason": "None"}, True, False),
    ({"JobState": "COMPLETING", "Reason": "None"}, False, True),  # cancelled, or requeued by hand
    ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, True, False),
    ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T10:00:05", "StartTime": "2026-01-01T10:00:00"}, True, True),
    ({"JobState": "RUNNING", "PreemptTime": "2026-01-01T09:00:00", "StartTime": "2026-01-01T10:00:00"}, True, False),
    ({"JobState": "CANCELLED"}, False, True),
])
def test_what_a_job_may_do_follows_from_how_slurm_sees_it(fields: dict[str, str], may_go_on: bool, taken: bool) -> None:
    info = JobInfo(fields)
    assert (info.may_go_on, info.taken) == (may_go_on, taken)
