"""A whole run on real parts: Trainer, shards, TensorBoard, checkpoints; stopped anywhere, it ends as if it were not."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlcm_lightning.checkpoint.folder import Checkpoint, Manifest
from dlcm_lightning.checkpoint.tensors import file_name
from dlcm_lightning.compose import load_config, save_config
from dlcm_lightning.config import Config, ConfigError, DataConfig
from dlcm_lightning.errors import CheckpointError, DataError, RunError, Stopped
from dlcm_lightning.run_directory import STOP, folders
from dlcm_lightning.training.callbacks.metrics import TIMED
from dlcm_lightning.training.module import PretrainModule
from dlcm_lightning.training.report import Report
from dlcm_lightning.training.run import pretrain
from dlcm_lightning.training.run_lock import RunLock

KILLS = 4


def quiet(message: str) -> None:
    del message


def run_folder(config: Config) -> Path:
    return Path(config.train.output_dir) / config.name


def lines(config: Config) -> list[dict[str, Any]]:
    """metrics.jsonl without the numbers that a clock is in."""
    text = (run_folder(config) / "metrics.jsonl").read_text()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in text.splitlines()]


def last(config: Config) -> Checkpoint:
    """The newest checkpoint, which must be whole."""
    folder = folders(run_folder(config))[-1]
    found = Checkpoint(folder, Manifest.load(folder))
    assert not found.manifest.damages(folder)
    return found


def assert_same_end(config: Config, other: Config) -> None:
    """Bit-identical weights, buffers and optimizer, what callbacks keep, and every logged number."""
    mine, theirs = last(config), last(other)
    assert mine.step == theirs.step == config.total_steps
    with mine.tensors() as tensors, theirs.tensors() as expected:
        assert tensors.names() == expected.names()
        assert {"weight", "exp_avg", "exp_avg_sq", "buffer"} <= {name.split("/")[0] for name in tensors.names()}
        for name in tensors.names():
            assert torch.equal(tensors.get(name), expected.get(name)), name
    assert mine.callbacks == theirs.callbacks
    assert lines(config) == lines(other)


@pytest.fixture
def undisturbed(run_config: Config) -> Config:
    config = replace(run_config, name="undisturbed")
    pretrain(config, quiet)
    return config


def test_a_run_ends_with_a_report_curves_and_boundaries_and_says_when_it_is_finished(undisturbed: Config) -> None:
    folder = run_folder(undisturbed)
    assert load_config(folder / "config.yaml") == undisturbed
    report = json.loads((folder / "report.json").read_text())
    assert report["steps"] == undisturbed.total_steps
    assert set(report["validation"]["domains"]) == {"en", "zh"}
    kinds = [(line["kind"], line["step"]) for line in lines(undisturbed)]
    assert kinds == [("train", 2), ("train", 4), ("validation", 5), ("train", 6), ("train", 8), ("train", 10),
                     ("validation", 10), ("train", 12), ("validation", 12)]

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for name in ("loss", "bits_per_byte", "F", "G", "R_sampled", "R_thresholded", "p_sd", "p_near_half"):
        group = "train" if name in ("loss", "bits_per_byte") else "train_boundary"
        assert {f"train_domains/{name}_en", f"train_domains/{name}_zh", f"{group}/{name}"} <= scalars
        assert {f"val_domains/{name}_en", f"{group.replace('train', 'val')}/{name}"} <= scalars
    assert {"train_optimizer/grad_norm", "train_optimizer/clipped", "train_optimizer/lr_token"} <= scalars
    assert {"train_system/tokens_per_second", "train_system/step_seconds", "train_system/save_seconds"} <= scalars
    assert "train_boundary/concept_length" in events.Tags()["histograms"]
    assert any(tag.startswith("boundaries/en") for tag in events.Tags()["tensors"])
    tokens_per_step = undisturbed.data.tokens_per_step
    assert [event.step for event in events.Scalars("train/loss")] == [s * tokens_per_step for s in range(2, 13, 2)]

    heard: list[str] = []
    state = (folder / "metrics.jsonl").read_bytes()
    pretrain(undisturbed, heard.append)
    assert "is finished" in heard[0]
    assert (folder / "metrics.jsonl").read_bytes() == state


def test_the_same_seed_gives_the_same_run_and_another_seed_another(undisturbed: Config) -> None:
    again, other = replace(undisturbed, name="again"), replace(undisturbed, name="other", seed=4)
    pretrain(again, quiet)
    assert_same_end(again, undisturbed)
    pretrain(other, quiet)
    assert lines(other) != lines(undisturbed)


def test_loader_processes_change_nothing(run_config: Config, undisturbed: Config) -> None:
    config = replace(run_config, data=replace(run_config.data, workers=2))
    pretrain(config, quiet)
    assert_same_end(config, undisturbed)


def test_accumulation_trains_as_one_micro_batch_does_under_the_same_rule_for_F(run_config: Config) -> None:
    losses = []
    for rows in (4, 1):
        config = replace(
            run_config, name=f"rows-{rows}", data=replace(run_config.data, micro_batch_size=rows),
            model=replace(run_config.model, boundary=replace(run_config.model.boundary, previous_rate=True)),
            train=replace(run_config.train, precision="fp64"),
        )
        pretrain(config, quiet)
        losses.append([line["loss"] for line in lines(config)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def start(config: Config, tmp_path: Path) -> subprocess.Popen[bytes]:
    file = tmp_path / f"{config.name}.yaml"
    save_config(config, file)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-m", "dlcm_lightning", "pretrain", str(file)], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_run_that_is_killed_anywhere_ends_bit_identical(run_config: Config, tmp_path: Path) -> None:
    """kill -9 at random moments of training: within a step, within a save, between the two."""
    config = replace(run_config, name="killed",
                     optim=replace(run_config.optim, total_tokens=run_config.data.tokens_per_step * 60),
                     train=replace(run_config.train, checkpoint_every_steps=2))
    straight = replace(config, name="straight")
    process = start(straight, tmp_path)
    assert process.wait(timeout=120) == 0
    dice, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = start(config, tmp_path)
        file = run_folder(config) / "metrics.jsonl"
        before = len(file.read_text().splitlines()) if file.exists() else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if file.exists() and len(file.read_text().splitlines()) >= before + 3:
                break
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        killed += process.wait(timeout=30) == -signal.SIGKILL
    assert killed == KILLS, "every attempt but the last must end by a kill"
    process = start(config, tmp_path)
    assert process.wait(timeout=120) == 0
    assert_same_end(config, straight)
    events = EventAccumulator(str(run_folder(config)), size_guidance={"scalars": 0})
    events.Reload()
    per_step = config.data.tokens_per_step
    assert [event.step for event in events.Scalars("train/loss")] == [done * per_step for done in range(2, 61, 2)]


class Stop(Exception):
    """A stop that nothing in the package knows."""


def stop(*_: object) -> None:
    raise Stop


def stop_after(config: Config, step: int) -> None:
    """Leaves the run as a stop within optimizer step `step` + 1 would."""
    honest = torch.optim.AdamW.step
    taken = 0

    def counted(self: torch.optim.AdamW, closure: Callable[[], float] | None = None) -> Any:
        nonlocal taken
        taken += 1
        if taken > step:
            raise Stop
        return honest(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counted)
        with pytest.raises(Stop):
            pretrain(config, quiet)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    run_config: Config, undisturbed: Config
) -> None:
    stop_after(run_config, 7)
    newest = folders(run_folder(run_config))[-1]
    assert newest.name == "step-00000006"
    state = newest / file_name(0, 1)
    content = bytearray(state.read_bytes())
    content[1000] ^= 255
    state.write_bytes(content)
    heard: list[str] = []
    pretrain(run_config, heard.append)
    assert any("step-00000006 is not used" in message for message in heard)
    assert any("continuing" in message and "step 3" in message for message in heard)
    assert_same_end(run_config, undisturbed)


@pytest.mark.parametrize("rows", [4, 3], ids=["one micro-batch", "two, with padding rows"])
@pytest.mark.parametrize("step", [2, 7, 12])
def test_resuming_continues_the_same_curves_without_a_point_twice(
    run_config: Config, monkeypatch: pytest.MonkeyPatch, step: int, rows: int
) -> None:
    """Stopped before the first checkpoint, between two, and after the last with only the report missing."""
    config = replace(run_config, data=replace(run_config.data, micro_batch_size=rows))
    straight = replace(config, name="straight")
    pretrain(straight, quiet)
    if step < config.total_steps:
        stop_after(config, step)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(Report, "save", stop)
            with pytest.raises(Stop):
                pretrain(config, quiet)
    pretrain(config, quiet)
    assert_same_end(config, straight)
    events = EventAccumulator(str(run_folder(config)), size_guidance={"scalars": 0})
    events.Reload()
    per_step = config.data.tokens_per_step
    assert [event.step for event in events.Scalars("train/loss")] == [done * per_step for done in range(2, 13, 2)]


def test_curves_of_an_earlier_version_go_on_under_the_runs_own_name(run_config: Config) -> None:
    stop_after(run_config, 7)
    older = run_folder(run_config) / "tensorboard"
    older.mkdir()
    for file in run_folder(run_config).glob("events.out.*"):
        file.rename(older / file.name)
    pretrain(run_config, quiet)
    assert not older.exists()
    events = EventAccumulator(str(run_folder(run_config)), size_guidance={"scalars": 0})
    events.Reload()
    per_step = run_config.data.tokens_per_step
    assert [event.step for event in events.Scalars("train/loss")] == [done * per_step for done in range(2, 13, 2)]
    assert [event.value for event in events.Scalars("train_system/attempts")][-1] == 2


@pytest.mark.parametrize(("log_every", "noticed"), [(5, 5), (7, 6)], ids=["by a line", "by a save"])
@pytest.mark.parametrize("skips", [False, True], ids=["engines that step", "engines that leave it out"])
def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(
    run_config: Config, monkeypatch: pytest.MonkeyPatch, log_every: int, noticed: int, skips: bool
) -> None:
    """Of step 4, with the next line of metrics or the next checkpoint, whichever comes first; the norms of the steps
    after it may be finite again."""
    honest = PretrainModule.configure_gradient_clipping

    def poisoned(self: PretrainModule, optimizer: Any, **rest: Any) -> None:
        gradients = [one for one in self.parameters() if one.grad is not None]
        if bad := self.trainer.global_step == 3:
            torch._foreach_mul_([one.grad for one in gradients], math.inf)
        honest(self, optimizer, **rest)
        if bad and skips:
            self.zero_grad()

    monkeypatch.setattr(PretrainModule, "configure_gradient_clipping", poisoned)
    config = replace(run_config, train=replace(run_config.train, log_every_steps=log_every))
    with pytest.raises(RunError, match=rf"step {noticed}: the norm of the gradient is (nan|inf).*newest checkpoint"):
        pretrain(config, quiet)
    assert last(config).step == 3


def test_a_directory_of_another_run_is_refused_with_the_fields_that_differ(undisturbed: Config) -> None:
    other = replace(undisturbed, model=replace(undisturbed.model, d_token=64, heads_token=4, kv_heads_token=2),
                    optim=replace(undisturbed.optim, lr_token=1.0))
    with pytest.raises(ConfigError, match=r"differs in .*model\.d_token.*optim\.lr_token.*choose another name"):
        pretrain(other, quiet)
    with pytest.raises(ConfigError, match=r"differs in train\.compile"):
        pretrain(replace(undisturbed, train=replace(undisturbed.train, compile=True)), quiet)
    with pytest.raises(ConfigError, match=r"differs in train\.precision"):
        pretrain(replace(undisturbed, train=replace(undisturbed.train, precision="bf16")), quiet)
    relaxed = replace(undisturbed, train=replace(undisturbed.train, log_every_steps=7, keep_last=3, strategy="fsdp2"))
    pretrain(relaxed, quiet)  # how often one looks may change, and how the model is spread


def test_the_rule_for_F_may_not_change_between_two_lives(run_config: Config) -> None:
    """One micro-batch a step takes F of the current step, several that of the previous one."""
    stop_after(run_config, 4)
    split = replace(run_config, data=replace(run_config.data, micro_batch_size=2))
    with pytest.raises(ConfigError, match=r"takes F of the current step.*2 micro-batches.*data\.micro_batch_size"):
        pretrain(split, quiet)


def test_a_step_may_be_split_otherwise_between_two_lives_where_the_rule_for_F_is_kept(run_config: Config) -> None:
    previous = replace(run_config, train=replace(run_config.train, precision="fp64"), model=replace(
        run_config.model, boundary=replace(run_config.model.boundary, previous_rate=True)))
    straight = replace(previous, name="straight")
    pretrain(straight, quiet)
    stop_after(previous, 4)
    pretrain(replace(previous, data=replace(previous.data, micro_batch_size=2)), quiet)
    for line, expected in zip(lines(previous), lines(straight), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        assert line.get("samples") == expected.get("samples")


def test_a_checkpoint_of_another_model_is_refused_even_without_the_runs_own_config(
    run_config: Config, undisturbed: Config
) -> None:
    """Its checkpoints copied into the directory of a run with other shapes."""
    other = replace(run_config, model=replace(run_config.model, ffn_token=96))
    shutil.copytree(run_folder(undisturbed) / "checkpoints", run_folder(other) / "checkpoints")
    with pytest.raises(ConfigError, match=r"differs in model\.ffn_token"):
        pretrain(other, quiet)


def test_a_run_that_failed_before_its_first_checkpoint_may_be_corrected(run_config: Config) -> None:
    wrong = replace(run_config, data=replace(run_config.data, root="/nowhere"))
    with pytest.raises(DataError):
        pretrain(wrong, quiet)
    stop_after(replace(run_config, seed=9), 2)
    pretrain(run_config, quiet)


def test_the_folder_of_the_shards_may_move_between_two_lives(
    run_config: Config, undisturbed: Config, tmp_path: Path
) -> None:
    stop_after(run_config, 4)
    shutil.copytree(run_config.data.root, tmp_path / "moved")
    moved = replace(run_config, data=replace(run_config.data, root=str(tmp_path / "moved")))
    pretrain(moved, quiet)
    assert_same_end(moved, undisturbed)


def test_two_jobs_on_one_directory_are_told_apart(run_config: Config) -> None:
    with RunLock(run_folder(run_config)) as lock:
        lock.acquire()
        with pytest.raises(RunError, match="in use by a running job"):
            pretrain(run_config, quiet)


def test_a_stop_file_keeps_a_run_from_going_on_until_it_is_removed(run_config: Config) -> None:
    stop = run_folder(run_config) / STOP
    stop.parent.mkdir(parents=True)
    stop.touch()
    with pytest.raises(Stopped, match=f"{STOP} is there: nothing was done after step 0 of 12"):
        pretrain(run_config, quiet)
    stop.unlink()
    pretrain(run_config, quiet)
    assert last(run_config).step == run_config.total_steps


def test_other_shards_under_a_checkpoint_are_refused(
    run_config: Config, build_corpus: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    own = build_corpus(tmp_path / "own")
    config = replace(run_config, data=replace(run_config.data, root=own.root))
    stop_after(config, 4)
    manifest = tmp_path / "own" / "a" / "train"
    (tmp_path / "own" / "b" / "train").rename(tmp_path / "spare")
    manifest.rename(tmp_path / "own" / "b" / "train")
    (tmp_path / "spare").rename(manifest)
    with pytest.raises((ConfigError, DataError)):
        pretrain(config, quiet)


def test_a_full_disk_while_saving_is_a_clear_error_and_the_run_continues_afterwards(
    run_config: Config, undisturbed: Config
) -> None:
    """A file-size limit makes the kernel refuse the write in the middle of the file, as a full disk does."""
    stop_after(run_config, 4)
    size = (folders(run_folder(run_config))[-1] / file_name(0, 1)).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 6 could not be written .*step-00000003.*Free space"):
            pretrain(run_config, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    pretrain(run_config, quiet)
    assert_same_end(run_config, undisturbed)


def test_a_token_id_beyond_the_models_vocabulary_is_refused(run_config: Config) -> None:
    config = replace(run_config, model=replace(run_config.model, vocab_size=300))
    with pytest.raises(DataError, match=r"model\.vocab_size = 300"):
        pretrain(config, quiet)
