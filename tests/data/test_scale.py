"""What a corpus of 100,000 shards costs: opening, memory, a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.data.manifest import Manifest, ShardEntry, Shards, write_manifest
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import VOCABULARY

SHARDS, TOKENS = 100_000, 64_000_000
NAMES = ("web", "zh", "code", "math")

SCRIPT = """
import json, sys, time
import numpy as np, torch
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data import reader as reading
from dlcm_lightning.data.tokenizer import Tokenizer

def resident(name="VmRSS"):
    # MiB. Not getrusage, whose peak begins with the parent's.
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024

root, names = sys.argv[1], sys.argv[2].split(",")
config = DataConfig(root=root, sources=[SourceConfig(name, name, 1 / len(names)) for name in names])
Tokenizer.load(root)
reading.CHECK_BELOW_SHARDS = 0  # the small corpus is opened as the large one: no shard is there to be looked at
began = time.process_time()
for name in names:
    json.loads(open(f"{root}/{name}/train/manifest.json", "rb").read())
parsed = time.process_time() - began
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before, began = resident(), time.process_time()
reader = reading.Reader(config, 1, 360)
opened = time.process_time() - began
reader.mixture.draw(np.arange(512))                       # the first epoch's order of shards, once
began = time.process_time()
first = reader.mixture.draw(np.arange(5000, 5512))
near = time.process_time() - began
began = time.process_time()
reader.mixture.draw(np.arange(400_000_000, 400_000_512))  # some way into the 6.4 T tokens
far = time.process_time() - began
seen = [0]
def trace(frame, event, argument):
    seen[0] += event == "call"
sys.setprofile(trace)
reader.mixture.draw(np.arange(6000, 6512))
reader.places(512, 3, 512)
sys.setprofile(None)
print(json.dumps({"opened": opened, "parsed": parsed, "memory": resident() - before, "near": near, "far": far,
                  "calls": seen[0], "peak": resident("VmHWM") - before}))
"""


def describe(folder: Path, name: str, split: str, shards: int, tokenizer: Tokenizer) -> None:
    """A manifest without its shards: opening a large corpus must not touch them."""
    folder.mkdir(parents=True)
    entries = [ShardEntry(f"{number:06d}-00000.tar", 60_000, TOKENS + number % 977, 256, 10**8, 2 * TOKENS,
                          f"{number:064x}") for number in range(shards)]
    table = Shards.from_entries(entries)
    write_manifest(folder, Manifest(name, name, split, tokenizer.fingerprint, VOCABULARY, "uint16",
                                    table.total("documents"), table.total("tokens"), table.total("text_bytes"), table))


@pytest.fixture(scope="module")
def measured(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Costs of a corpus of 100,000 shards and of one of 100, each opened in a process of its own."""
    costs = {}
    for size in (100, SHARDS):
        root = tmp_path_factory.mktemp(f"shards{size}")
        tokenizer.save(root)
        for name in NAMES:
            describe(root / name / "train", name, "train", size // len(NAMES) - 1, tokenizer)
            describe(root / name / "validation", name, "validation", 1, tokenizer)
        run = subprocess.run([sys.executable, "-c", SCRIPT, str(root), ",".join(NAMES)], capture_output=True, text=True,
                             timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        costs[str(size)] = json.loads(run.stdout.splitlines()[-1])
        print(size, costs[str(size)])
    return costs


def test_opening_a_hundred_thousand_shards_costs_little_more_than_parsing_their_manifests(
    measured: dict[str, dict[str, float]]
) -> None:
    assert measured[str(SHARDS)]["opened"] < 12 * measured[str(SHARDS)]["parsed"]


def test_they_cost_less_than_200_megabytes(measured: dict[str, dict[str, float]]) -> None:
    assert measured[str(SHARDS)]["memory"] < 200 and measured[str(SHARDS)]["peak"] < 200


def test_a_step_makes_the_same_calls_whatever_the_number_of_shards(measured: dict[str, dict[str, float]]) -> None:
    """Counted, not timed. A block's permutation walks by chance a little longer or shorter."""
    few, many = measured["100"], measured[str(SHARDS)]
    assert many["calls"] < 1.5 * few["calls"] + 50
    assert many["far"] < 20 * max(many["near"], 1e-3), "the order at a far sample costs what the next block costs"


def test_shards_as_columns_say_what_the_entries_said() -> None:
    entries = [ShardEntry(f"{number}.tar", 2, 30 + number, 1, 5, 100, "f" * 64, number, number)
               for number in (0, 1)]
    table = Shards.from_entries(entries)
    assert list(table) == entries and table[1] == entries[1] and len(table) == 2
    assert table.of("tokens").dtype == np.int64 and table.total("tokens") == 61
    assert Shards(table.columns()).columns() == table.columns()
