"""What of the benchmarks a CPU can run: that they count and compare what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as library
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu
from benchmarks.cross_attention import Case, compact, masked, replicated, visible
from benchmarks.decode import cost, dense_partner
from benchmarks.roofline import BEFORE, CARDS, count_step, report, show
from benchmarks.rows import MIXES, document_lengths, synthetic_batch
from benchmarks.step import measure
from dlcm_lightning.batch import IGNORE_INDEX
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.model.dlcm import build_model
from tests.steps import CONFIG


def of_rows(rows: int, recompute: str = "none") -> Config:
    return load_config("configs/run/dlcm_2b_1t.yaml", [
        f"data.micro_batch_size={rows}", f"data.global_batch_size={4 * rows}", "train.devices=1", "train.nodes=1",
        f"train.recompute={recompute}"])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_micro_batch_moves_less_than_half_of_what_it_did_in_half_the_launches(rows: int) -> None:
    """At commit d598d5c: before kernels were compiled, weights copied once a step and gradients multiplied in fp32."""
    micro_batch, _ = count_step(of_rows(rows), True, "8192")
    old = json.loads(BEFORE.read_text())["rows"][str(rows)]
    assert micro_batch.total().launches <= old["launches"] / 2
    assert micro_batch.total("products", "attention").bytes <= 0.35e9 * old["elementwise_gigabytes"]


@pytest.mark.parametrize(("recompute", "least", "most"), [("none", 0.45, 0.5), ("selective", 0.4, 0.45)])
def test_two_rows_allow_45_percent_of_an_h200(recompute: str, least: float, most: float,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    found = report(of_rows(2, recompute), "8192")
    assert least <= found["compiled"]["cards"]["H200"]["mfu"] < most
    assert found["eager"]["cards"]["H200"]["mfu"] < found["compiled"]["cards"]["H200"]["mfu"]
    assert sum(found["flops"].values()) == pytest.approx(found["useful_flops"])
    show(found)
    assert ("of its launches" in capsys.readouterr().out) is (recompute == "none"), "where there is something beside it"
    assert all(sum(one["milliseconds"].values()) > 0 for one in found["compiled"]["cards"].values())
    assert set(found["compiled"]["cards"]) == set(CARDS)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # as it runs on a CPU
def test_the_compact_form_is_the_replicated_one_and_the_masked_form_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_validate_device", lambda *_: None)
    case = Case.make(240, 2, 16, 6, 120, torch.device("cpu"), torch.float64)
    mask = visible(case)
    expected, mine = replicated(case, "reference"), compact(case, mask, library.flex_attention)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(*(torch.autograd.grad(out, case.inputs, weights) for out in (mine, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert (masked(case, mask, library.flex_attention) - expected).abs().max() > 0.1


@pytest.mark.parametrize("mix", [*MIXES, "100", "512"])
def test_rows_that_were_not_read_are_whole(mix: str) -> None:
    lengths = document_lengths(mix, 512, torch.Generator().manual_seed(0))
    assert sum(lengths) == 512 and min(lengths) > 0
    batch = synthetic_batch(CONFIG, mix, 3)
    assert len(batch.tokens) == CONFIG.data.micro_batch_size * CONFIG.data.sequence_length
    assert (batch.targets == IGNORE_INDEX).sum() == len(batch.documents)
    assert batch.step.targets == CONFIG.micro_batches * (len(batch.tokens) - len(batch.documents))


def test_without_a_gpu_nothing_is_run_and_nothing_has_failed() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "There is no GPU here" in done.stdout and "engines" in done.stdout


def part(name: str, code: str, seconds: float = 60, needs: str = "") -> gpu.Part:
    return gpu.Part(name, seconds, ("-c", code), needs)


def test_a_part_that_fails_or_hangs_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    wanted = [part("fails", "print('so far'); raise SystemExit(3)"), part("hangs", "import time; time.sleep(60)", 3),
              part("lacks", "", needs="no_such_module"), part("passes", "print('done')")]
    outcomes = gpu.run_parts(wanted, [part("left", "")], tmp_path, 60)
    said = {"left": "not run", "fails": "failed (3)", "hangs": "stopped after 3 s", "lacks": "not run",
            "passes": "passed"}
    assert {name: one["outcome"] for name, one in outcomes.items()} == said
    assert outcomes["fails"]["tail"] == ["so far"] and outcomes["passes"]["tail"] == ["done"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"] == outcomes and torch.__version__.startswith(written["about"]["torch"])
    table = capsys.readouterr().out
    assert "no_such_module is not installed" in table and table.rindex("left") < table.rindex("passes")


def test_parts_take_no_more_than_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.0)
    outcomes = gpu.run_parts([part("long", "import time; time.sleep(60)"), part("late", "")], [], tmp_path, 2)
    assert outcomes["long"]["outcome"] == "stopped after 2 s"
    assert outcomes["late"] == {"outcome": "not run", "why": "no time left"}
    assert sum(one.seconds for one in gpu.parts(tmp_path)) <= 1200, "what is promised"


@pytest.mark.parametrize("code", [0, 3])
def test_what_has_failed_shows_in_the_exit_status(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu, "parts", lambda out: (part("one", f"raise SystemExit({code})"), part("two", "")))
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == bool(code)


def test_every_step_that_a_card_is_asked_for_is_another_and_composes() -> None:
    assert len(set(gpu.STEPS)) == len(gpu.STEPS)
    for one in gpu.STEPS:
        config = load_config(one.config, one.overrides)
        assert (config.train.compile, config.train.recompute) == (one.compile, one.recompute)
        assert config.data.global_batch_size == config.micro_batches * one.rows == gpu.ROWS_A_STEP
    assert {"none", "selective"} <= {one.recompute for one in gpu.STEPS if one.config == gpu.DLCM and one.rows == 2}


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11 says so once
def test_a_step_is_measured_as_a_run_takes_it() -> None:
    config = load_config("smoke", ["data.micro_batch_size=4", "data.global_batch_size=8", "train.precision=fp32"])
    found: dict[str, Any] = measure(config, "64", steps=2, rate=lambda *_: 1e12)
    assert found["rows"] == 4 and found["micro_batches"] == 2 and found["document_tokens"] == 64
    assert found["tokens_per_second"] == pytest.approx(config.data.tokens_per_step / found["step_seconds"])
    assert found["share_of_rate"] == pytest.approx(found["tokens_per_second"] * found["flops_per_token"] / 1e12)
    assert found["tokens_per_concept"] == pytest.approx(config.model.boundary.target_ratio, rel=0.25), "it has settled"
    assert sum(found["time_shares"].values()) == pytest.approx(1, abs=1e-6)
    assert found["time_shares"]["matrix products"] > 0.05


def test_tests_of_a_gpu_and_their_processes_are_not_kept_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import conftest

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for marker, where in ((object(), "cuda"), (None, "cpu")):
        request = SimpleNamespace(node=SimpleNamespace(get_closest_marker=lambda name, marker=marker: marker))
        conftest.choose_where(request, monkeypatch)  # type: ignore[arg-type]
        assert os.environ["DLCM_DEVICE"] == where


@pytest.mark.parametrize("name", ["smoke", "quickstart", "ladder_87m", "dlcm_2b_1t"])
def test_a_dense_partner_needs_as_many_flops_for_a_decoded_token(name: str) -> None:
    config = load_config(name).model
    partner = dense_partner(config, 2048)
    flops = [cost(one, 1, 2048, 2, 1).flops_per_token for one in (config, partner)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)
    assert (partner.d_token, partner.kv_heads_token, partner.vocab_size) == (
        config.d_token, config.kv_heads_token, config.vocab_size)


@pytest.mark.parametrize("kind", ["dlcm", "dense"])
def test_decoding_is_counted_as_the_model_does_it(kind: str) -> None:
    """Products of a forward over one more token, and the bytes of what the state holds."""
    config = load_config("smoke", ["model.boundary.form=fixed"]).model
    config = config if kind == "dlcm" else dense_partner(config, 512)
    model = build_model(config, torch.float32, "sdpa", 0).eval()
    state = model.new_state(1, 512)
    counted = cost(config, 1, 512, 4, 1)
    held = sum(one.numel() * 4 for arrays in state.arrays() for one in arrays.tensors()
               if one.dim() == 4)
    assert held == pytest.approx(512 * counted.cache_bytes_per_token, rel=0.01)
    model.prefill(torch.zeros(508, dtype=torch.long), [508], [0], state)
    with FlopCounterMode(display=False) as counter:  # four steps, of which one closes a concept
        for _ in range(4):
            model.logits(model.step(torch.zeros(1, dtype=torch.long), [0], state).hidden)
    assert counter.get_total_flops() / 4 == pytest.approx(counted.flops_per_token, rel=0.02)
