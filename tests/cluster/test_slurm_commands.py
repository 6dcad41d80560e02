"""How a command of SLURM is asked for, with commands that behave as it may."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dlcm_lightning.cluster.slurm import RETRY_SECONDS, SlurmError, call


def script(folder: Path, body: str) -> str:
    file = folder / "command"
    file.write_text(f"#!/bin/bash\n{body}\n")
    file.chmod(0o755)
    return str(file)


def test_a_command_that_a_signal_to_the_job_has_ended_is_repeated_before_the_job_is_killed(tmp_path: Path) -> None:
    command = script(tmp_path, f'[ -e {tmp_path}/before ] && echo done && exit; touch {tmp_path}/before; kill -TERM $$')
    began = time.monotonic()
    assert call(command) == "done\n"
    assert time.monotonic() - began < RETRY_SECONDS  # SLURM kills a job KillWait seconds after the signal


def test_a_command_that_every_signal_ends_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="ended by signal 15"):
        call(script(tmp_path, "kill -TERM $$"), patience=0.3)


def test_a_refused_command_is_not_repeated(tmp_path: Path) -> None:
    command = script(tmp_path, f"echo once >> {tmp_path}/calls; echo 'Invalid job id specified' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid job id specified"):
        call(command)
    assert (tmp_path / "calls").read_text() == "once\n"
