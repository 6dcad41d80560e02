"""How a run left, and what a submission was, stand in files that its job can read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlcm_lightning.cluster import slurm
from dlcm_lightning.cluster.attempts import VARIABLE, Outcome, first_crash, recorded
from dlcm_lightning.cluster.slurm import JobInfo, SlurmError, fields_of, submitted_options
from dlcm_lightning.cluster.submit import describe_attempt, job_folder, submit, take
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError, DataConfig, SourceConfig, TrainConfig
from dlcm_lightning.errors import Stopped


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "0")
    return tmp_path


@pytest.mark.parametrize(("error", "how"), [(None, "finished"), (Stopped("SIGTERM"), "stopped"),
                                            (ConfigError("a = 1: wrong"), "refused")])
def test_the_first_rank_says_how_a_run_left(attempt: Path, error: Exception | None, how: str) -> None:
    try:
        with recorded():
            if error is not None:
                raise error
    except (Stopped, ConfigError):
        pass
    found = Outcome.load(attempt)
    assert found is not None and found.how == how and (error is None or found.reason == str(error))
    assert first_crash(attempt) == ""


def test_a_crash_is_one_rank_s_own_and_leaves_no_outcome(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(RuntimeError), recorded():
        raise RuntimeError("out of memory\nand more")
    assert Outcome.load(attempt) is None
    assert first_crash(attempt) == "rank 3: RuntimeError: out of memory"


def test_other_ranks_leave_the_word_to_the_first_but_for_a_refusal(attempt: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(Stopped), recorded():
        raise Stopped("x")
    assert Outcome.load(attempt) is None
    with pytest.raises(ConfigError), recorded():
        raise ConfigError("wrong")
    assert Outcome("refused", "wrong") == Outcome.load(attempt)


def test_outside_a_job_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    with recorded():
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = DataConfig(sources=[SourceConfig("a", "en", 1.0)])
    return Config(name="run", data=data, train=TrainConfig(output_dir=str(tmp_path / "runs")))


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
    with pytest.raises(ConfigError, match=r"train\.output_dir = .*cannot be written"):
        take(job_folder(config, "7"), config)


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "hush1", "HF_TOKEN": "hush2", "DATABASE_URL": "postgres://u:hush3@db/x", "PGPASS": "hush4",
    "SLURM_JWT": "hush5", "https_proxy": "http://me:hush6@proxy:3128", "HTTP_PROXY": "http://hush7@proxy",
    "DLCM_STORE": "https://a/b?sig=hush8&x=1", "MY_OWN_THING": "hush9", "PIP_INDEX_URL": "https://u:hush10@index/simple",
    "SLACK_WEBHOOK": "https://hooks/hush11", "PYTHONPATH_TOKEN": "hush12",
}


def test_a_life_is_described_without_its_secrets_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    for name, value in {**SECRETS, "NCCL_SOCKET_IFNAME": "ib0", "SLURM_JOB_ID": "7"}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "environment.txt"
    file.touch(mode=0o644)
    describe_attempt(tmp_path, ["n1", "n2"])
    text = file.read_text()
    assert "hush" not in text
    assert "NCCL_SOCKET_IFNAME=ib0\n" in text and "SLURM_JOB_ID=7\n" in text and "PATH=/" in text
    assert "https_proxy=http://***@proxy:3128\n" in text and "DLCM_STORE=https://a/b?sig=***&x=1\n" in text
    assert "MY_OWN_THING=(not kept)\n" in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (tmp_path / "nodes.txt").read_text() == "n1\nn2\n"


def test_a_password_in_an_address_is_refused_before_it_stands_in_files() -> None:
    with pytest.raises(ConfigError, match=r"data\.root = .*\*\*\*@host.*a password in an address") as refused:
        DataConfig(root="https://me:hush@host/x", sources=[SourceConfig("a", "en", 1.0)])
    assert "hush" not in str(refused.value)


def test_a_refused_submission_leaves_nothing_behind(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
                                                    ) -> None:
    monkeypatch.chdir(tmp_path)
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=":")
    save_config(config, tmp_path / "run.yaml")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"sbatch refuses .*invalid partition"):
            submit("slurm/x.sh", "run.yaml", [], ["--partition=none"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "run.yaml"]
        (tmp_path / "runs/run").mkdir(parents=True)  # what was there stays
        with pytest.raises(ConfigError, match="sbatch refuses"):
            submit("slurm/x.sh", "run.yaml", [], [])
        assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["run"]
        (tmp_path / "runs/run").rmdir()
        (tmp_path / "runs").rmdir()


SHOWN = """\
JobId=7 ArrayJobId=5 ArrayTaskId=2 JobName=my run JobState=CANCELLED nodes=3
   UserId=me(1) GroupId=me(1) MCS_label=N/A
   Priority=1 Nice=5 Account=team QOS=(null)
   JobState=RUNNING Reason=None Dependency=(null)
   RunTime=00:00:02 TimeLimit=01:00:00 TimeMin=N/A
   SubmitTime=2026-01-01T10:00:00 EligibleTime=2026-01-01T10:00:00
   StartTime=2026-01-01T10:00:01 EndTime=2026-01-01T11:00:01 Deadline=N/A
   Partition=train AllocNode:Sid=login:1
   ReqNodeList=(null) ExcNodeList=n[3-4]
   NumNodes=2 NumCPUs=4 NumTasks=2 CPUs/Task=1
   Features=(null) OverSubscribe=NO
   Command=/home/me/my project/slurm/x.sh a=1 b=2
   WorkDir=/home/me/my project
   Comment=for Anna, Reason=why not
   StdErr=/home/me/my project/out 7.txt
   StdIn=/dev/null
   StdOut=/home/me/my project/out 7.txt

JobId=8 ArrayJobId=5 ArrayTaskId=3 JobName=other
   JobState=PENDING
"""


def test_blanks_in_names_and_paths_are_no_ends_of_fields() -> None:
    fields = fields_of(SHOWN)
    assert fields["JobName"] == "my run JobState=CANCELLED nodes=3" and fields["JobState"] == "RUNNING"
    assert fields["StdOut"] == "/home/me/my project/out 7.txt" and fields["WorkDir"] == "/home/me/my project"
    assert fields["Reason"] == "None" and fields["Comment"] == "for Anna, Reason=why not"
    assert JobInfo(fields).ends == time.mktime((2026, 1, 1, 11, 0, 1, 0, 0, -1))
    assert JobInfo({"EndTime": "Unknown"}).ends is None


def test_a_follow_up_job_is_given_what_the_first_was(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SLURM_MEM_PER_NODE": "5120", "SLURM_GPUS_ON_NODE": "8", "SLURM_ARRAY_TASK_ID": "2"}

    def accounts(*command: str, patience: float = 0) -> str:
        assert command[0] == "sacct"
        return "sbatch --mem=5G --signal=B:USR1@50 --job-name my run --mail-type END slurm/x.sh run.yaml\n"

    monkeypatch.setattr(slurm, "call", accounts)
    options = submitted_options("5_2", JobInfo(fields_of(SHOWN)), environment)
    assert {"--job-name=my run JobState=CANCELLED nodes=3", "--output=/home/me/my project/out 7.txt", "--account=team",
            "--partition=train", "--time=01:00:00", "--nodes=2", "--nice=5", "--comment=for Anna, Reason=why not",
            "--mem=5120", "--gpus-per-node=8", "--array=2", "--exclusive", "--signal=B:USR1@50", "--mail-type=END"
            } == set(options)

    def no_accounts(*command: str, patience: float = 0) -> str:
        raise SlurmError("Slurm accounting storage is disabled")

    monkeypatch.setattr(slurm, "call", no_accounts)
    assert set(options) - set(submitted_options("5_2", JobInfo(fields_of(SHOWN)), environment)) == {
        "--signal=B:USR1@50", "--mail-type=END"}


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
