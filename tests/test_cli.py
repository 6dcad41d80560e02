"""The `dlcm` command: what a user types, and what a mistake is answered with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import VOCABULARY, make_texts

ROOT = Path(__file__).parents[1]

RUN = """
name: mine
seed: 1
model: {{vocab_size: {vocabulary}, d_token: 32, d_concept: 64, encoder_layers: 1, backbone_layers: 1,
         decoder_layers: 1, heads_token: 2, kv_heads_token: 1, heads_concept: 4, kv_heads_concept: 2, head_dim: 16,
         ffn_token: 64, ffn_concept: 64}}
data:
  corpus: shards
  root: {root}
  sequence_length: 64
  global_batch_size: 4
  micro_batch_size: 4
  block_rows: 20
  validation_rows: 4
  sources: [{{name: web, domain: en, weight: 1.0}}]
optim: {{total_tokens: 1024, warmup_tokens: 256}}
train: {{output_dir: {runs}, precision: fp32}}
"""


@pytest.fixture
def run_file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Shards made by `dlcm tokenize` from a folder of jsonl and text, and a run file that reads them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"text": text}) for text in make_texts("english", 400)]
    (texts / "a.jsonl").write_text("\n".join(lines))
    (texts / "b.txt").write_text(make_texts("english", 1, seed=9)[0])
    tokenizer.save(tmp_path / "tokenizer")
    root = tmp_path / "shards"
    assert main(["tokenize", str(texts), "--out", str(root), "--source", "web", "--domain", "en",
                 "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(vocabulary=VOCABULARY, root=root, runs=tmp_path / "runs"))
    return file


def test_tokenize_then_pretrain_from_a_folder_of_texts(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", str(run_file)]) == 0
    said = capsys.readouterr().out
    assert "attention sdpa, ddp" in said and "float32: as configured" in said
    assert "unigram" in said and "R thresh." in said and "tokens/s" in said and "make tensorboard" in said
    assert main(["pretrain", str(run_file)]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main(["pretrain", str(run_file), "seed=2"]) == 2
    assert "differs in seed; choose another name=" in capsys.readouterr().err


@pytest.mark.parametrize(("override", "said"), [
    ("model.d_tokn=3", "model.d_tokn.*did you mean model.d_token"),
    ("model.d_token=wide", "model.d_token.*wide"),
    ("data.sources[0].weight=0.5", "weights sum to 0.5; make them sum to 1"),
    ("model.attention=flash", "model.attention = 'flash'.*CUDA"),
    ("optim.warmup_tokens=2048", "optim.warmup_tokens = 2048: must lie between 0 and optim.total_tokens"),
    ("data.root=/nowhere", "data.root = '/nowhere'.*dlcm tokenize"),
    ("data.sequence_length=100000", "fill no row of 100000"),
    ("model.vocab_size=300", "model.vocab_size = 300; raise it"),
])
def test_a_mistake_is_answered_with_field_value_and_remedy_in_one_line(
    run_file: Path, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["pretrain", str(run_file), override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dlcm: ") and re.search(said, error), error


SMOKE = "configs/run/smoke.yaml"


@pytest.mark.parametrize("arguments", [
    ["estimate", SMOKE, "--nodes", "0"], ["estimate", SMOKE, "--gpus-per-node", "0"], ["estimate", SMOKE, "--mfu", "0"],
    ["estimate", SMOKE, "--mfu", "nan"], ["estimate", SMOKE, "--mfu", "1.5"], ["estimate", SMOKE, "--nodes", "1e3"],
    ["estimate", SMOKE, "--peak-tflops", "inf"], ["estimate", SMOKE, "--gpu-gigabytes", "-80"],
    ["estimate", SMOKE, "--document-tokens", "0"], ["estimate", SMOKE, "optim.total_tokens=10000000000000000000000"],
    ["estimate", SMOKE, "optim.total_tokens=1e22"], ["export", "runs/x", "out", "--split-megabytes", "nan"],
    ["export", "runs/x", "out", "--split-megabytes", "0"], ["export", "runs/x", "out", "--step", "-1"],
    ["verify-resume", "--kills", "-1"], ["verify-resume", "--seed", "99999999999999999999"],
    ["data", "verify", SMOKE, "--workers", "0"], ["data", "inspect", SMOKE, "--characters", "0"],
    ["data", "audit", "runs/x", "--at-step", "-5"],
    *(["tokenize", "x", "--out", "y", "--source", "s", "--domain", "d", option, value] for option, value in (
        ("--shard-megabytes", "nan"), ("--task-megabytes", "nan"), ("--task-megabytes", "0"), ("--workers", "0"),
        ("--validation-share", "nan"), ("--validation-share", "1"), ("--array", "3/3"), ("--out", "s3://bucket/x"),
        ("--out", "memory:x"), ("--out", "file:/tmp/x"), ("--out", ""), ("--out", "$NOT_SET_ANYWHERE/x"))),
], ids=" ".join)
def test_every_number_and_path_is_bounded_at_its_door(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as usage:
        code = usage.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    assert re.search(r"write a (whole )?number from|at most|i/n|give a (folder|path)|NOT_SET_ANYWHERE is not set", said)


def test_a_field_in_the_place_of_a_run_file_changes_the_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "optim.total_tokens=409600", "--nodes", "1", "--gpus-per-node", "1"]) == 0
    assert "steps        100 of 4,096 tokens" in capsys.readouterr().out


def test_a_wrong_configuration_is_refused_before_torch_is_loaded() -> None:
    code = ("import sys; from dlcm_lightning.cli import main; code = main(['pretrain', 'configs/run/smoke.yaml', "
            "'optim.beta1=2']); print(code, 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True,
                          cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["2", "False"]
    assert "optim.beta1 = 2" in done.stderr


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dlcm_lightning", "--help"], capture_output=True, text=True,
                          timeout=60, check=True, cwd=Path(__file__).parents[1])
    assert "pretrain" in done.stdout and "tokenize" in done.stdout


def test_an_estimate_needs_no_torch_and_takes_its_run_file_either_way() -> None:
    code = ("import sys; from dlcm_lightning.cli import main; code = main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(code)")
    shape = ["--nodes", "16", "--gpus-per-node", "8"]
    given = [["estimate", "configs/run/dlcm_2b_1t.yaml", *shape, "train.strategy=zero2"],
             ["estimate", "train.strategy=zero2", "--config", "configs/run/dlcm_2b_1t.yaml", *shape]]
    shown = [subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
             for arguments in given]
    assert [one.returncode for one in shown] == [0, 0], shown[1].stderr
    assert shown[0].stdout == shown[1].stdout and "zero2" in shown[0].stdout
    chosen = next(line for line in shown[0].stdout.splitlines() if line.endswith("<- this configuration"))
    assert chosen.split()[0] == "zero2"
