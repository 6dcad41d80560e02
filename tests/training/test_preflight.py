"""What would go wrong later is found before the first step, and named with its remedy."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm_lightning.cluster.checks import Finding
from dlcm_lightning.config import Config
from dlcm_lightning.training import preflight


def failing(config: Config) -> dict[str, Finding]:
    return {finding.what: finding for finding in preflight.of_run(config) if not finding.good}


def test_a_run_that_can_begin_has_nothing_against_it(run_config: Config) -> None:
    lines: list[str] = []
    assert preflight.examine(run_config, lines.append)
    table = "\n".join(lines)
    assert "torch 2." in table and "TFLOP/s" in table
    assert not preflight.examine(replace(run_config, train=replace(run_config.train, keep_last=10**9)), lines.append)


def test_shards_that_are_not_there_or_too_few_are_named(run_config: Config) -> None:
    gone = replace(run_config, data=replace(run_config.data, root="nowhere"))
    assert "there is no folder nowhere" in failing(gone)["data"].said
    sources = [replace(source, max_epochs=1.0) for source in run_config.data.sources]
    longer = replace(run_config, data=replace(run_config.data, sources=sources),
                     optim=replace(run_config.optim, total_tokens=10**9))
    assert "max_epochs" in failing(longer)["data"].said
    sample = replace(gone, data=replace(gone.data, corpus="sample", tokenizer="bpe"))
    assert "data" not in failing(sample)  # is fetched


def test_a_directory_that_cannot_be_made_is_named(run_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    there = replace(run_config, train=replace(run_config.train, output_dir=str(tmp_path / "file")))
    assert "Not a directory" in failing(there)["run directory"].said


def test_too_little_room_is_told_in_bytes(run_config: Config) -> None:
    greedy = replace(run_config, train=replace(run_config.train, keep_last=10**9))
    assert "GB for" in failing(greedy)["room"].said


def test_a_version_that_was_left_out_for_a_reason_is_refused(run_config: Config, monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    real = preflight.version
    monkeypatch.setattr(preflight, "version", lambda name: "2.6.2" if name == "lightning" else real(name))
    assert "lightning 2.6.2 is not" in failing(run_config)["versions"].said


def test_a_package_that_is_only_a_folder_has_no_versions_to_compare(run_config: Config,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise preflight.PackageNotFoundError(name)

    monkeypatch.setattr(preflight, "requires", unknown)
    finding = next(finding for finding in preflight.of_run(run_config) if finding.what == "versions")
    assert finding.good and "not compared" in finding.said


def test_what_a_strategy_needs_is_asked_for(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.version

    def without(name: str) -> str:
        if name == "deepspeed":
            raise preflight.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(preflight, "version", without)
    assert "versions" not in failing(run_config)
    zero = replace(run_config, train=replace(run_config.train, strategy="zero2"))
    assert failing(zero)["versions"].said == "deepspeed is missing"


def test_every_extra_that_a_run_needs_is_asked_for(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    real = preflight.version

    def without(name: str) -> str:
        if name in ("deepspeed", "flash-attn", "flash-attn-4"):
            raise preflight.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(preflight, "version", without)
    for attention, missing, extra in (("flash", "flash-attn", "gpu"), ("flash4", "flash-attn-4", "flash4")):
        both = replace(run_config, model=replace(run_config.model, attention=attention),  # type: ignore[arg-type]
                       train=replace(run_config.train, strategy="zero2"))
        finding = next(preflight.of_versions(both))
        assert finding.said == f"{missing} is missing; deepspeed is missing"
        assert f"[{extra},deepspeed]" in finding.remedy


def test_nccl_says_what_is_wrong_instead_of_ending_the_process(run_config: Config, monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    """Under NCCL a wait is over when its time is up only where torch is told to wait."""
    told: list[str | None] = []

    def refuse(*_: Any, **__: Any) -> None:
        told.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))
        raise RuntimeError("no route to host\nand more")

    monkeypatch.setattr(preflight.dist, "init_process_group", refuse)
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    config = replace(run_config, train=replace(run_config.train, devices=2))
    seconds, [finding] = preflight.of_reduce(0, config, torch.device("cuda", 0))
    assert told == ["1"] and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
    assert seconds == 0 and finding.what == "all-reduce" and finding.said == "no route to host"
