"""Every engine on one GPU: a run that is killed and stopped ends, bit for bit, as the run that was left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig
from tests.gpu.test_step import CONFIG, MODEL
from tests.synthetic import VOCABULARY

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
SECONDS = 400


def test_a_disturbed_run_ends_like_the_one_left_alone(build_corpus: Callable[[Path], DataConfig], tmp_path: Path
                                                      ) -> None:
    """All at once: most of their time is starting."""
    data = replace(build_corpus(tmp_path / "corpus"), global_batch_size=4, micro_batch_size=2)
    config = replace(CONFIG, model=replace(MODEL, vocab_size=VOCABULARY), data=data)
    running = {}
    for strategy in STRATEGIES:
        for compile_kernels in (False, True):
            name = f"{strategy}-{'compiled' if compile_kernels else 'eager'}"
            one: Config = replace(config, name=name, train=replace(
                config.train, strategy=strategy, compile=compile_kernels, precision="bf16", devices=1, nodes=1,
                output_dir=str(tmp_path / name)))
            file = tmp_path / f"{name}.yaml"
            save_config(one, file)
            command = [sys.executable, "-m", "dlcm_lightning", "verify-resume", "--config", str(file), "--strategy",
                       strategy, "--kills", "3", f"train.output_dir={tmp_path / name}", "train.precision=bf16"]
            running[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = {}
    try:
        for name, process in running.items():
            said[name] = process.communicate(timeout=SECONDS)[0]
    finally:
        for process in running.values():
            process.kill()
    for name, process in running.items():
        assert process.returncode == 0 and "bit-identical" in said[name], f"{name}:\n{said[name][-3000:]}"
