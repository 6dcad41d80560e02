"""The file that a plan writes composes to the plan, wherever it lies, and trains; the command that writes it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dlcm_lightning.cli import main
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config
from dlcm_lightning.dry_run import dry_run
from dlcm_lightning.errors import RunError
from dlcm_lightning.flops import matrix_parameters, training_flops_per_token
from dlcm_lightning.scaling.plan.plan import plan
from dlcm_lightning.scaling.plan.request import Request
from dlcm_lightning.scaling.plan.run_file import base_name, run_file_text, write_run_file
from dlcm_lightning.shipped import RUNS, find
from tests.scaling.plan.laws import laws, like, planned

ROOT = Path(__file__).parents[3]
COMMAND = "dlcm plan --flops 1e21"


@pytest.mark.parametrize(("run", "request_"), [
    ("dlcm_2b_1t", Request(flops=1e21)), ("dlcm_2b_1t", Request(flops=1e17, ratio=2.75)),
    ("dlcm_2b_1t", Request(params=1.944e9)), ("quickstart", Request(flops=2e12)), ("quickstart", Request(flops=1e16)),
    ("smoke", Request(params=3e5, tokens=6e4)), ("upcycle_smollm2", Request(params=2e8, tokens=1e9)),
    ("boundary_study", Request(params=5e6)), ("ladder_87m", Request(gpus=4, days=2, backbone_share=0.4))])
@pytest.mark.parametrize("folder", ["", "configs/run", "deep/down"])
def test_file_composes_to_the_plan(tmp_path: Path, run: str, request_: Request, folder: str) -> None:
    found = planned(request_, run, name="mine")
    file = tmp_path / folder / "mine.yaml"
    write_run_file(found, find(run, RUNS), COMMAND, file)
    config = load_config(file)
    assert config == found.config and config.name == "mine"
    assert config.optim.total_tokens * training_flops_per_token(config.model, config.data.sequence_length) == (
        pytest.approx(found.flops))
    written = yaml.safe_load(file.read_text())
    assert written["base"] == [f"run/{run}"]
    assert max(len(line) for line in file.read_text().splitlines() if not line.startswith("# dlcm ")) <= 120


def test_file_holds_only_what_differs(tmp_path: Path) -> None:
    found = planned(Request(params=1.944e9, tokens=1e12))
    assert found.model == like().model
    write_run_file(found, find("dlcm_2b_1t", RUNS), COMMAND, tmp_path / "a.yaml")
    written = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert set(written) == {"base", "name", "optim"} and set(written["optim"]) == {"total_tokens"}
    assert re.search(r"total_tokens: 1_000_\d{3}_\d{3}_\d{3}$", (tmp_path / "a.yaml").read_text(), re.MULTILINE)


def test_header_says_command_and_numbers(tmp_path: Path) -> None:
    found = planned(Request(flops=1e20), law=laws())
    head = [line for line in run_file_text(found, find("dlcm_2b_1t", RUNS), COMMAND, tmp_path / "a.yaml").splitlines()
            if line.startswith("#")]
    assert head[1] == f"# {COMMAND}" and head[-1] == "# Not run yet: no time and no result to report."
    said = " ".join(line[2:].strip() for line in head)
    assert found.prediction is not None
    for words in (f"{matrix_parameters(found.model).non_embedding:,}", f"{found.tokens:,}", f"{found.flops:.3e}",
                  f"{found.prediction.loss:.4f}", "stated, not measured", f"{found.config.total_steps:,} steps",
                  *found.notes):
        assert words in said


def test_known_run_of_the_users_own_is_found_from_everywhere(tmp_path: Path) -> None:
    own = tmp_path / "here" / "own.yaml"
    own.parent.mkdir()
    own.write_text("base: [run/dlcm_2b_1t]\nname: own\nmodel: {boundary: {target_ratio: 5}}\n")
    found = plan(Request(flops=1e20), load_config(own), None, "next")
    for to in (tmp_path / "here" / "a.yaml", tmp_path / "there" / "a.yaml", tmp_path / "configs" / "run" / "a.yaml"):
        write_run_file(found, own, COMMAND, to)
        assert load_config(to) == found.config
        assert load_config(to).model.boundary.target_ratio == 5
    assert base_name(own, tmp_path / "here" / "a.yaml") == "own"


def test_shipped_run_is_not_mistaken_for_one_of_the_same_name(tmp_path: Path) -> None:
    other = tmp_path / "configs" / "run" / "smoke.yaml"
    other.parent.mkdir(parents=True)
    other.write_text("base: [run/quickstart]\nname: smoke\n")
    found = planned(Request(params=1e6), "smoke")
    write_run_file(found, find("smoke", RUNS), COMMAND, other.with_name("mine.yaml"))
    assert load_config(other.with_name("mine.yaml")) == found.config


def test_file_that_is_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(RunError, match=r"is there already; .*--out"):
        write_run_file(planned(Request(flops=1e20)), find("dlcm_2b_1t", RUNS), COMMAND, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "mine"
    with pytest.raises(RunError, match="cannot be written"):
        write_run_file(planned(Request(flops=1e20)), find("dlcm_2b_1t", RUNS), COMMAND, tmp_path / "a.yaml" / "b.yaml")


def test_command_writes_what_it_says_and_its_line_writes_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("law.json").write_text(laws().to_json())
    assert main(["plan", "--flops", "1e20", "--law", "law.json", "--gpus", "64", "--mfu", "0.35", "--peak-tflops",
                 "900", "--gpu-gigabytes", "141", "--gpus-per-node", "4", "--document-tokens", "2000", "--out",
                 "big.yaml", "--extrapolation", "3.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    config = load_config("big.yaml")
    assert config.name == "big"
    for words in (f"D = {config.model.d_token}, E = {config.model.d_concept}",
                  f"R = {config.model.boundary.target_ratio:g}", f"{config.optim.total_tokens:,}",
                  f"{config.total_steps:,} of", "64 x 900 TFLOP/s", "35 %", "in GB of 141", "lr_token 0.0018 -> ",
                  "95 %", "times outside of what the law has seen", "checkpoints", "GB each",
                  "zero3", "big.yaml is a run file", "documents of 2,000 tokens", "after its decay", "heads of 64",
                  "--nodes 16 --gpus-per-node 4"):
        assert words in said, words
    line = next(line for line in Path("big.yaml").read_text().splitlines() if line.startswith("# dlcm plan"))
    first = Path("big.yaml").read_text()
    Path("big.yaml").unlink()
    assert main(shlex.split(line)[2:]) == 0
    assert Path("big.yaml").read_text() == first
    assert main(shlex.split(line)[2:]) == 2
    assert "is there already" in capsys.readouterr().err


def test_command_takes_a_measured_share(capsys: pytest.CaptureFixture[str]) -> None:
    card = str(ROOT / "benchmarks/results/h200.json")
    assert main(["plan", "--flops", "1e21", "--measured", card]) == 0
    said = capsys.readouterr().out
    assert "at 37.8574 % of 8 x 989 TFLOP/s (measured, " in said
    assert main(["plan", "--flops", "1e21", "--measured", card, "--mfu", "0.5"]) == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["--flops", "0"], ["--flops", "nan"], ["--gpus", "0", "--days", "1"], ["--gpus", "1", "--days", "inf"],
    ["--params", "-1"], ["--params", "1e9", "--tokens", "0"], ["--flops", "1e20", "--ratio", "1"],
    ["--flops", "1e20", "--backbone-share", "1"], ["--flops", "1e20", "--mfu", "1.5"],
    ["--flops", "1e20", "--extrapolation", "0.5"], ["--flops", "1e20", "--out", "s3://a/b"]], ids=" ".join)
def test_every_number_and_path_is_bounded_at_its_door(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as usage:
        main(["plan", *arguments])
    assert usage.value.code == 2
    assert re.search(r"write a (whole )?number from|give a folder", capsys.readouterr().err)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "for what budget"), (["--flops", "1e20", "--law", "nowhere.json"], "nowhere.json: cannot be read"),
    (["--flops", "1e20", "--like", "nowhere"], "config file 'nowhere'"),
    (["--flops", "1e20", "--name", "a b"], "name = 'a b'"), (["--flops", "1e20", "--gpus", "1024"], "512 rows")])
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dlcm: ") and words in error and error.count("\n") == 1


def test_command_needs_neither_torch_nor_scipy(tmp_path: Path) -> None:
    (tmp_path / "law.json").write_text(laws().to_json())
    code = ("import sys; from dlcm_lightning.cli import main; code = main(sys.argv[1:]); "
            "print([name for name in ('torch', 'scipy', 'pandas', 'numpy', 'lightning') if name in sys.modules]); "
            "sys.exit(code)")
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", "--flops", "1e20", "--law", str(tmp_path / "law.json"), "--out",
         str(tmp_path / "a.yaml")], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_planned_run_passes_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "a.yaml")
    assert main(["plan", "--flops", "1e20", "--out", file]) == 0
    assert main(["estimate", file, "--nodes", "1", "--gpus-per-node", "8"]) == 0
    assert f"{matrix_parameters(load_config(file).model).non_embedding:,} in matrices" in capsys.readouterr().out
    assert "loaded in plain PyTorch" in list(dry_run(load_config(file)))[-1]


def test_planned_run_trains(tmp_path: Path, run_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A tiny one, like a run of the user's own."""
    known = tmp_path / "known.yaml"
    save_config(run_config, known)
    file = str(tmp_path / "small.yaml")
    assert main(["plan", "--params", "5e4", "--tokens", "8000", "--like", str(known), "--out", file]) == 0
    config = load_config(file)
    assert matrix_parameters(config.model).non_embedding == pytest.approx(5e4, rel=0.1)
    assert main(["pretrain", file]) == 0
    said = capsys.readouterr().out
    assert f"{config.total_steps:,} steps, {config.optim.total_tokens:,} tokens" in said
    assert config.total_steps == 125 and config.data.global_batch_size == 1
