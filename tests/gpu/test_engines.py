"""Every engine on one GPU: a run that is killed and stopped ends, bit for bit, as the run that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.compose import save_config
from dlcm_lightning.config import DataConfig
from dlcm_lightning.run_directory import REPORT_FILE
from tests.steps import CONFIG, MODEL
from tests.synthetic import VOCABULARY

SECONDS = 400


@pytest.mark.parametrize("compile_kernels", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3", "zero1"])
def test_a_disturbed_run_ends_like_the_one_left_alone(
    strategy: str, compile_kernels: bool, build_corpus: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    data = replace(build_corpus(tmp_path / "corpus"), sequence_length=256, global_batch_size=4, micro_batch_size=2)
    train = replace(CONFIG.train, strategy=strategy, compile=compile_kernels, precision="bf16",  # type: ignore[arg-type]
                    devices=1, nodes=1)
    save_config(replace(CONFIG, model=replace(MODEL, vocab_size=VOCABULARY), data=data, train=train),
                tmp_path / "run.yaml")
    command = [sys.executable, "-m", "dlcm_lightning", "verify-resume", "--config", str(tmp_path / "run.yaml"),
               "--strategy", strategy, "--kills", "2", f"train.output_dir={tmp_path / 'runs'}", "train.precision=bf16",
               f"train.compile={str(compile_kernels).lower()}", "train.devices=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    logs = "\n".join(file.read_text()[-1500:] for file in sorted(tmp_path.glob("runs/**/*.log")))
    assert done.returncode == 0 and "bit-identical" in done.stdout, f"{done.stdout}\n{done.stderr}\n{logs}"
    for report in reports(tmp_path):
        assert torch.cuda.get_device_name() in report["hardware"] and report["precision"] == "bfloat16"
        assert report["attention"] == ("flex" if compile_kernels else "varlen")


def reports(folder: Path) -> list[dict[str, str]]:
    """Of both runs: where, and with what, they were computed."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"runs/**/{REPORT_FILE}"))]
    assert len(found) == 2
    return found
