"""Everything that only a GPU can say, in order of worth: `make gpu`, at most 20 minutes.

    tests       tests/gpu: operations, attention, steps, waits, memory
    engines     every strategy, eager and compiled: killed, stopped, continued, compared bit for bit
    steps       tokens/s, MFU, memory, kernels of dlcm_2b and dense_1b
    litgpt      a step of litgpt's model of dense_1b's shape, where litgpt is installed
    attention   the attention kernels beside each other
    table6      forms of the cross-attention over the paper's Table 6
    decode      prefill and decoding of dlcm_2b beside a dense model of equal FLOPs

Each part is a process of its own with its own limit; one that fails or takes too long does not end the others. What
they print and find lies in a folder, `gpu.json` says on what card, with which versions, and what became of each part.
The exit status is 1 where one of them failed or was stopped. On a machine without a GPU nothing is run, which is no
error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import line, measure
from dlcm_lightning.compose import load_config
from dlcm_lightning.training.device import compute_exactly

OUT = Path("benchmarks/results/gpu")
LEAST_SECONDS = 10.0
"""In which a part may still find something."""
PYTEST = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default")
"""A warning of versions that nobody has tried together yet is no failure here."""
DLCM, DENSE = "configs/run/dlcm_2b_1t.yaml", "configs/run/dense_1b_1t.yaml"


@dataclass(frozen=True)
class Step:
    """One measurement of benchmarks/step.py."""

    config: str
    documents: str
    rows: int
    compile: bool = True
    recompute: str = "none"
    attention: str = "auto"
    sequence_length: int = 8192

    @property
    def overrides(self) -> list[str]:
        return ["train.devices=1", "train.nodes=1", f"data.global_batch_size={ROWS_A_STEP}",
                f"data.micro_batch_size={self.rows}", f"data.sequence_length={self.sequence_length}",
                f"train.compile={str(self.compile).lower()}", f"train.recompute={self.recompute}",
                f"model.attention={self.attention}"]


ROWS_A_STEP = 8
STEPS = (
    Step(DLCM, "8192", 2), Step(DENSE, "8192", 2), Step(DLCM, "8192", 2, attention="flash4"),
    Step(DLCM, "8192", 2, recompute="selective"), Step(DLCM, "sample", 2), Step(DENSE, "sample", 2),
    Step(DLCM, "8192", 4, recompute="selective"), Step(DLCM, "8192", 4), Step(DENSE, "8192", 4),
    Step(DLCM, "8192", 1, compile=False), Step(DLCM, "8192", 2, attention="varlen"),
    Step(DENSE, "8192", 1, compile=False),
    Step(DLCM, "4096", 4, sequence_length=4096), Step(DENSE, "4096", 4, sequence_length=4096),
    *(Step(f"configs/run/ladder_{size}.yaml", "8192", 2) for size in ("833m", "468m", "274m", "87m")),
    Step("configs/run/ladder_87m.yaml", "8192", 2, compile=False),
)


def measure_steps(out: Path) -> None:
    """In order; what is there when time is up has been written."""
    compute_exactly()
    found: list[dict[str, Any]] = []
    for one in STEPS:
        try:
            result = measure(load_config(one.config, one.overrides), one.documents, steps=5)
            print(line(result), f"R {result['tokens_per_concept'] or 0:.2f}, rows {one.rows} of {one.sequence_length}, "
                  f"attention {result['attention']}, recompute {one.recompute}, "
                  f"{'compiled' if one.compile else 'eager'}, in {result['seconds_in_all']:.0f} s", flush=True)
            found.append({"config": one.config, "overrides": one.overrides, **result})
        except Exception as error:
            traceback.print_exc()
            found.append({"config": one.config, "overrides": one.overrides, "error": repr(error)[:500]})
        (out / "steps.json").write_text(json.dumps({"about": about(), "steps": found}, indent=1) + "\n")


@dataclass(frozen=True)
class Part:
    """A process."""

    name: str
    seconds: float
    """At most."""
    command: tuple[str, ...]
    needs: str = ""
    """A module that it is not run without."""


def parts(out: Path) -> tuple[Part, ...]:
    return (
        Part("tests", 200, (*PYTEST, "-n", "5", "tests", "--ignore", "tests/gpu/test_engines.py")),
        Part("engines", 280, (*PYTEST, "-n", "10", "tests/gpu/test_engines.py")),
        Part("steps", 390, ("-m", "benchmarks.gpu", "--steps", "--out", str(out))),
        Part("litgpt", 60, ("-m", "benchmarks.peers.litgpt_step", "--out", str(out / "litgpt.json")), needs="litgpt"),
        Part("attention", 90, ("-m", "benchmarks.attention", "--only", "backends", "--out",
                               str(out / "attention.json"))),
        Part("table6", 100, ("-m", "benchmarks.attention", "--only", "cross_attention", "--out",
                             str(out / "table6.json"))),
        Part("decode", 80, ("-m", "benchmarks.decode", "--out", str(out / "decode.json"))),
    )


def about() -> dict[str, Any]:
    """Card and versions."""
    names = ("torch", "triton", "lightning", "deepspeed", "flash-attn")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cuda": torch.version.cuda, "python": platform.python_version(), **versions}


def run_part(part: Part, out: Path, left: float) -> dict[str, Any]:
    """What became of it. left: seconds that there are at all."""
    limit = min(part.seconds, left)
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return {"outcome": "not run", "why": f"{part.needs} is not installed"}
    if limit < LEAST_SECONDS:
        return {"outcome": "not run", "why": "no time left"}
    began = time.monotonic()
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *part.command], stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True)
        try:
            code = process.wait(limit)
            outcome = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 15)
                time.sleep(2)
                os.killpg(process.pid, 9)
                process.wait()
    tail = (out / f"{part.name}.log").read_text(errors="replace").splitlines()[-12:]
    return {"outcome": outcome, "seconds": round(time.monotonic() - began), "tail": tail}


def run_parts(wanted: list[Part], others: list[Part], out: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """What became of each, written after every one. others: those that were not asked for."""
    ends = time.monotonic() + seconds
    outcomes: dict[str, dict[str, Any]] = {part.name: {"outcome": "not run", "why": "not asked for"} for part in others}
    for part in wanted:
        print(f"{part.name} ...", flush=True)
        outcomes[part.name] = run_part(part, out, ends - time.monotonic())
        print("\n".join(outcomes[part.name].get("tail", [])), flush=True)
        (out / "gpu.json").write_text(json.dumps({"about": about(), "parts": outcomes}, indent=1) + "\n")
    print(f"\n{about()['card']}\n{'part':<12}{'outcome':<24}seconds")
    for name, outcome in outcomes.items():
        print(f"{name:<12}{outcome['outcome']:<24}{outcome.get('seconds', '-')}  {outcome.get('why', '')}")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--parts", nargs="*", help="those alone", choices=[part.name for part in parts(OUT)])
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was run. Not run: " + ", ".join(part.name for part in parts(out)))
        return
    out.mkdir(parents=True, exist_ok=True)
    if arguments.steps:
        measure_steps(out)
        return
    wanted = [part for part in parts(out) if not arguments.parts or part.name in arguments.parts]
    others = [part for part in parts(out) if part not in wanted]
    outcomes = run_parts(wanted, others, out, arguments.seconds)
    sys.exit(any(one["outcome"] not in ("passed", "not run") for one in outcomes.values()))


if __name__ == "__main__":
    main()
