"""Every template is one that SLURM takes, and runs at its true shape; only what the ranks compute is left out."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlcm_lightning.data.tokenizer import Tokenizer
from tests.slurm.mini_cluster import MiniCluster

pytestmark = pytest.mark.whole
ROOT = Path(__file__).parents[2]
NODES, GPUS = 16, 8
TEMPLATES = {"dlcm_1t": (), "dense_1t": (), "ladder": (), "tokenize": ("in", "--out", "out", "--source", "x"),
             "evaluate": ("runs/x",)}


@pytest.fixture(scope="module")
def large(slurm_is_here: None) -> Iterator[MiniCluster]:
    with tempfile.TemporaryDirectory(prefix="mini", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with MiniCluster(Path(folder) / "c", NODES, GPUS, cpus=128, number=1) as running:
            yield running


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    for name in ("slurm", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


STUB = {"DLCM_PYTHON": str(Path(__file__).with_name("stub_python.sh")), "REAL_PYTHON": sys.executable}


def ended(cluster: MiniCluster, job: str, desk: Path) -> None:
    deadline = time.monotonic() + 120
    while cluster.job(job)["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    output = "\n".join(file.read_text() for file in desk.glob("slurm-*.out"))
    assert cluster.job(job)["JobState"] == "COMPLETED", output


def test_every_template_is_here() -> None:
    assert {file.stem for file in (ROOT / "slurm").glob("*.sh")} - {"job", "site"} == set(TEMPLATES)


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_takes_every_template(large: MiniCluster, desk: Path, template: str) -> None:
    said = large.call("sbatch", "--test-only", f"slurm/{template}.sh", *TEMPLATES[template], cwd=desk)
    assert "to start at" in said


@pytest.mark.parametrize(("template", "run"), [("dlcm_1t", "dlcm_2b_1t"), ("dense_1t", "dense_1b_1t")])
def test_a_template_starts_a_rank_per_gpu_of_its_true_shape(large: MiniCluster, desk: Path, template: str, run: str
                                                            ) -> None:
    job = large.call("sbatch", "--parsable", f"slurm/{template}.sh", cwd=desk, **STUB).strip()
    ended(large, job, desk)
    attempt = desk / f"runs/{run}/jobs/{job}/attempt-000"
    places = [file.read_text().split() for file in attempt.glob("place-*")]
    assert sorted(int(rank) for rank, *_ in places) == list(range(NODES * GPUS))
    assert {tuple(place) for _, _, _, *place in places} == {
        ("128", f"{GPUS}(x{NODES})", "n1", str(attempt.parent / "code"))}
    assert {(node, local) for _, node, local, *_ in places} == {
        (f"n{node}", str(local)) for node in range(1, NODES + 1) for local in range(GPUS)}
    attempts = json.loads((attempt.parent / "attempts.json").read_text())
    assert attempts[0]["how"] == "finished" and len(attempts[0]["nodes"]) == NODES


def test_started_with_bash_a_template_checks_copies_the_code_and_submits_itself(large: MiniCluster, desk: Path) -> None:
    wrong = large.call("bash", "slurm/dlcm_1t.sh", "model.d_tokn=5", cwd=desk, check=False, **STUB)
    assert "model.d_token" in wrong and not (desk / "runs").exists()
    said = large.call("bash", "slurm/dlcm_1t.sh", "--nodes=2", "--gpus-per-node=4", "configs/run/smoke.yaml",
                      "name=by_hand", cwd=desk, **STUB)
    job = said.rsplit(maxsplit=1)[-1]
    folder = next((desk / "runs/by_hand/jobs").iterdir())
    assert (folder / "code/dlcm_lightning/compose.py").is_file()
    ended(large, job, desk)
    assert len(list((folder / "attempt-000").glob("place-*"))) == 8


def test_the_ladder_is_an_array_of_its_sizes(large: MiniCluster, desk: Path) -> None:
    job = large.call("sbatch", "--parsable", "slurm/ladder.sh", cwd=desk, **STUB).strip()
    for task in range(4):
        ended(large, f"{job}_{task}", desk)
    for size in ("87m", "274m", "468m", "833m"):
        assert len(list((desk / f"runs/ladder_{size}/jobs").glob("*/attempt-000/place-*"))) == GPUS


def test_make_pretrain_in_an_allocation_starts_a_rank_per_gpu(large: MiniCluster, desk: Path) -> None:
    shutil.copy(ROOT / "Makefile", desk)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, desk)
    (desk / ".venv/bin").mkdir(parents=True)
    (desk / ".venv/bin/python").symlink_to(STUB["DLCM_PYTHON"])
    (desk / ".venv/.installed").touch()
    large.call("salloc", "--nodes=2", "--gpus-per-node=4", "--exclusive", "make", "pretrain",
               "CONFIG=configs/run/smoke.yaml", "ARGS=name=here", cwd=desk, REAL_PYTHON=sys.executable)
    assert len(list((desk / "runs/here/jobs").glob("*/attempt-000/place-*"))) == 8


def test_tokenising_is_shared_out_over_an_array_and_merged(
    large: MiniCluster, desk: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> None:
    texts = tmp_path_factory.mktemp("texts")
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"Text number {number} is not like the others. " * 20)
    tokenizer.save(desk / "tokenizer")
    job = large.call("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", "slurm/tokenize.sh", str(texts),
                     "--out", "built", "--source", "mine", "--domain", "web-en", "--tokenizer", "tokenizer",
                     "--task-megabytes", "0.0001", cwd=desk, DLCM_PYTHON=sys.executable).strip()
    for task in range(2):
        ended(large, f"{job}_{task}", desk)
    merge = large.call("sbatch", "--parsable", "--array=0", f"--dependency=afterok:{job}", "slurm/tokenize.sh", "merge",
                       "built", "--source", "mine", cwd=desk, DLCM_PYTHON=sys.executable).strip()
    ended(large, f"{merge}_0", desk)
    assert (desk / "built/mine/train/manifest.json").is_file()


def test_a_job_of_1024_ranks_is_checked_started_and_concluded(slurm_is_here: None, desk: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mini", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        with MiniCluster(Path(folder) / "c", 128, GPUS, cpus=128, number=2) as cluster:
            job = cluster.call("sbatch", "--parsable", "--nodes=128", "slurm/dlcm_1t.sh", cwd=desk, **STUB).strip()
            ended(cluster, job, desk)
    attempt = next((desk / "runs/dlcm_2b_1t/jobs").glob("*/attempt-000"))
    assert len(list(attempt.glob("place-*"))) == 1024, (attempt / "srun.txt").read_text()
    assert json.loads((attempt.parent / "attempts.json").read_text())[0]["how"] == "finished"
