"""The token loader beside litdata, mosaicml-streaming and webdataset: `python -m benchmarks.loader [--cache FOLDER]`
(Linux; ten minutes on 2 cores, the first time with a network for pip).

The same text for everyone: four sources of synthetic ids, 97 M tokens in documents of realistic lengths, mixed by
weight, shuffled, cut into rows of equal length and handed to the training process as int64 tensors of 8 rows. Each
peer reads it in its own format, set up as its documentation says (`peers/foreign.py`), from the page cache; a numpy
memory map with the whole order in a list is the yardstick and no peer. Peers live in environments of their own
under FOLDER, which share the torch of this one. Every measurement is a fresh process (`peers/stopwatch.py` defines
what is measured), rounds alternate between the loaders, medians count, and only ratios within one run mean
anything, on a machine that does nothing else.

What is not the same. This project's loader also finds the documents of each row, counts their targets, and compares
every shard with its sha256 when it is opened; the others give token ids only. Everyone's conversion to int64 is
measured. Passing a batch between processes costs more than reading it, so with workers everyone passes 2**18 tokens at
once. Shuffles differ: mosaicml's and the yardstick's span a whole source, this
project's 16 of its shards, litdata's 256 rows of one chunk after another, webdataset's a buffer of 1,000 rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.peers.stopwatch import Opened, Task, run
from dlcm_lightning.config import DataConfig, SourceConfig, TrainConfig
from dlcm_lightning.data import manifest
from dlcm_lightning.data.loader import TrainingBatches
from dlcm_lightning.data.preprocessing import writer
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe
from dlcm_lightning.training.device import describe_hardware

WEIGHTS = {"web": 0.5, "books": 0.25, "math": 0.15, "code": 0.1}
TOKENS = {"web": 44_000_000, "books": 24_000_000, "math": 17_000_000, "code": 12_000_000}
"""Every source has some 15 % more than its share of an epoch, so that none ends before the mixture does."""
EPOCH_TOKENS = 2400 * 8 * 4096
VOCABULARY = 32_768
VALIDATION_DOCUMENTS = 100
SHARD_BYTES = 4 * 1024**2
SEED = 7
ROWS, ROW_TOKENS, WORKERS = 8, (4096, 512), (0, 2)
ROUNDS = {4096: 5, 512: 3}
RESUME_ROUNDS, POSITIONS = 3, (240, 2160)
"""Batches of 8 rows of 4096 tokens: 10 % and 90 % of an epoch."""
WARMUP_TOKENS, SECONDS = 4_000_000, 2.5
PATIENCE_SECONDS = 120
RESULTS = Path("benchmarks/results/loader.json")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contender:
    """A loader, and the environment that it runs in."""

    name: str
    distribution: str
    """Whose version is reported."""
    peer: bool = True
    requirements: tuple[str, ...] = ()
    """Installed without their dependencies, which are either listed or in this environment; empty: needs none."""
    written_for: tuple[int, ...] = ()
    """Row lengths for which it writes the text in a format of its own."""


REMOTE = ("boto3", "botocore", "s3transfer", "jmespath", "python-dateutil", "six", "requests", "urllib3",
          "charset_normalizer", "certifi")
OURS = Contender("ours", "dlcm-lightning", peer=False)
CONTENDERS = (
    OURS,
    Contender("litdata", "litdata", written_for=(4096,),
              requirements=("litdata==0.2.76", "obstore", "tifffile", *REMOTE)),
    Contender("mosaicml", "mosaicml-streaming", written_for=ROW_TOKENS, requirements=(
        "mosaicml-streaming==0.13.0", "numpy<2.2", "transformers<5", "huggingface-hub<1", "tokenizers<0.23", "regex",
        "xxhash", "zstd", "python-snappy", "cramjam", "Brotli", "catalogue", *REMOTE)),
    Contender("webdataset", "webdataset"),
    Contender("memmap", "numpy", peer=False),
)


class Failed(Exception):
    """A contender could not be installed or did not do what it was told; the message says why."""


def write_ours(folder: Path, tokenizer: Tokenizer, source: str, split: str, documents: list[np.ndarray]) -> None:
    """One source and split as this project's shards. The synthetic ids stand for no text; four bytes each."""
    place = folder / source / split
    shards = writer.ShardWriter(place, vocab_size=tokenizer.vocab_size, shard_bytes=SHARD_BYTES)
    for number, ids in enumerate(documents):
        shards.write(ids, hashlib.md5(f"{source} {split} {number}".encode()).digest(), 4 * len(ids))
    writer.finish_split(place, shards.close(), source=source, domain=source, split=split,
                        tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)


def ours(task: Task, state: Any) -> Opened:
    """An optimizer step of this project's loader is one batch here."""
    config = DataConfig(
        corpus="shards", root=str(Path(task.corpus) / "ours"), sequence_length=task.sequence_length,
        global_batch_size=task.rows, micro_batch_size=task.rows, workers=task.workers,
        sources=[SourceConfig(source, source, weight) for source, weight in task.sources.items()])
    reader = Reader(config, SEED, VOCABULARY)
    batches = TrainingBatches(reader, 0, 1, state or 0, task.epoch, task.workers)
    return Opened((batch.tokens.view(task.rows, task.sequence_length) for batch in batches), lambda: None)


def key() -> str:
    """Of all that the cached corpus depends on."""
    sources = "".join(Path(str(module.__file__)).read_text() for module in (writer, manifest))
    parts = [TOKENS, VOCABULARY, VALIDATION_DOCUMENTS, SHARD_BYTES, sources]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_corpus(folder: Path) -> None:
    """Token streams (ids uint16, document lengths uint32) and this project's shards of them."""
    made = folder / "made.txt"
    if made.is_file() and made.read_text() == key():
        return
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "streams").mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=length)) for length in rng.integers(3, 12, size=20_000)]
    tokenizer = train_bpe([" ".join(words[at:at + 100]) for at in range(0, len(words), 100)], VOCABULARY)
    tokenizer.save(folder / "ours")
    for source, tokens in tqdm(TOKENS.items(), desc="corpus", unit="source"):
        lengths = np.minimum(rng.lognormal(6.4, 1.1, size=tokens // 500).astype(np.int64) + 3, 100_000)
        lengths = lengths[:np.searchsorted(np.cumsum(lengths), tokens)]
        ends = np.cumsum(lengths)
        ids = rng.integers(2, VOCABULARY, size=int(ends[-1]), dtype=np.uint16)
        ids[ends - lengths], ids[ends - 1] = tokenizer.bos_id, tokenizer.eos_id
        ids.astype("<u2").tofile(folder / "streams" / f"{source}.u16")
        lengths.astype("<u4").tofile(folder / "streams" / f"{source}.u32")
        documents = np.split(ids, ends[:-1])
        write_ours(folder / "ours", tokenizer, source, "train", documents)
        write_ours(folder / "ours", tokenizer, source, "validation", documents[:VALIDATION_DOCUMENTS])
    made.write_text(key())


def warm(folder: Path) -> None:
    """Everything under a folder into the page cache, so that no loader pays for the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.read_bytes()


def python(contender: Contender, cache: Path) -> str:
    """The interpreter a contender runs with; makes its environment where it is not there yet. Raises Failed.

    What this environment has and the peer's lacks, torch above all, is found through a .pth file.
    """
    if not contender.requirements:
        return sys.executable
    folder = cache / "environments" / contender.name
    made, wanted = folder / "made.txt", "\n".join([sys.version, sys.prefix, *contender.requirements])
    interpreter = folder / "bin" / "python"
    if not made.is_file() or made.read_text() != wanted:
        try:
            for command in ([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
                            [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--quiet",
                             "--disable-pip-version-check", "--no-deps", *contender.requirements]):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=3 * PATIENCE_SECONDS)
        except subprocess.CalledProcessError as error:
            raise Failed(f"not installed: {error.stderr.strip().rpartition(chr(10))[2]}") from None
        except subprocess.TimeoutExpired:
            raise Failed("not installed: pip took too long") from None
        own = next(folder.glob("lib/python*/site-packages"))
        shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (own / "shared.pth").write_text("\n".join(shared) + "\n")
        made.write_text(wanted)
    return str(interpreter)


def perform(task: Task, interpreter: str, cache: Path) -> dict[str, Any]:
    """Does a task in a new process and returns its result. Raises Failed."""
    module = ["benchmarks.loader", "--task"] if task.loader == OURS.name else ["benchmarks.peers.foreign"]
    process = subprocess.Popen(
        [interpreter, "-m", *module, json.dumps(asdict(task))], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "LITDATA_DISABLE_VERSION_CHECK": "1",
             "DATA_OPTIMIZER_CACHE_FOLDER": str(cache / "litdata"),
             "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(cache / "litdata")})
    try:
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Failed(f"{task.action}: not done after {PATIENCE_SECONDS} s") from None
    if process.returncode:
        raise Failed(f"{task.action}: {errors.strip().rpartition(chr(10))[2]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def prepare(contender: Contender, blank: Task, cache: Path) -> str:
    """Environment and data of a contender; returns its interpreter. Raises Failed."""
    interpreter = python(contender, cache)
    for length in contender.written_for:
        made = Path(blank.corpus) / f"{contender.name}-{length}.made"
        if not made.is_file():
            perform(replace(blank, loader=contender.name, action="write", sequence_length=length), interpreter, cache)
            made.touch()
    return interpreter


def version(contender: Contender, interpreter: str) -> str:
    if interpreter == sys.executable:
        return importlib.metadata.version(contender.distribution)
    question = f"import importlib.metadata; print(importlib.metadata.version({contender.distribution!r}))"
    return subprocess.run([interpreter, "-c", question], check=True, capture_output=True, text=True).stdout.strip()


def tasks(names: list[str], blank: Task) -> list[Task]:
    """All measurements, in their order: rounds outside, loaders inside, another one first each time."""
    found = []
    for sequence_length in ROW_TOKENS:
        batch = ROWS * sequence_length
        for workers in WORKERS:
            common = replace(blank, action="speed", sequence_length=sequence_length, workers=workers,
                             epoch=EPOCH_TOKENS // batch, warmup=WARMUP_TOKENS // batch, seconds=SECONDS,
                             batches=(EPOCH_TOKENS - 2 * WARMUP_TOKENS) // batch)
            found += [replace(common, loader=name) for shift in range(ROUNDS[sequence_length])
                      for name in [*names[shift:], *names[:shift]]]
    for workers in WORKERS:
        common = replace(blank, action="save", workers=workers, positions=POSITIONS)
        found += [replace(common, loader=name) for name in names]
        found += [replace(common, loader=name, action="resume", positions=(position,))
                  for _ in range(RESUME_ROUNDS) for position in POSITIONS for name in names]
    return found


@dataclass(frozen=True)
class Comparison:
    """One number of ours beside the best peer's."""

    label: str
    ours: float
    best: str
    best_value: float
    more_is_better: bool

    @property
    def ratio(self) -> float:
        """Above 1: ours is better."""
        return self.ours / self.best_value if self.more_is_better else self.best_value / self.ours

    def __str__(self) -> str:
        return f"{self.label} ({self.ratio:.2f}x {self.best})"


Summary = dict[str, dict[str, float]]
"""Medians by loader and by the name of a number."""


def summarize(runs: list[dict[str, Any]]) -> Summary:
    found: dict[str, dict[str, list[float]]] = {}
    for one in runs:
        task, result = one["task"], one["result"]
        numbers = found.setdefault(task["loader"], {})
        if task["action"] == "speed":
            place = f"{task['sequence_length']} tokens, {task['workers']} workers"
            million = result["tokens"] / 1e6
            for name, value in ((f"M tokens/s, {place}", million / result["seconds"]),
                                (f"M tokens/s per core, {place}", million / result["cpu_seconds"]),
                                (f"CPU s per M tokens, {place}", result["cpu_seconds"] / million),
                                (f"MiB a reader, {place}", result["held_bytes"] / 2**20 / max(1, task["workers"])),
                                (f"MiB of mapped files, {place}", result["mapped_bytes"] / 2**20)):
                numbers.setdefault(name, []).append(value)
        elif task["action"] == "resume":
            place = f"at {round(100 * task['positions'][0] * ROWS * ROW_TOKENS[0] / EPOCH_TOKENS)} %, " \
                    f"{task['workers']} workers"
            numbers.setdefault(f"resume s, {place}", []).append(result["seconds"])
            numbers.setdefault(f"resumed with the following batch, {place}", []).append(result["same_batch"])
    return {loader: {name: statistics.median(values) for name, values in numbers.items()}
            for loader, numbers in found.items()}


def disturbance(runs: list[dict[str, Any]]) -> float:
    """Cores that other processes kept busy while speeds were measured: the mean over all measurements."""
    found = [one["result"] for one in runs if one["task"]["action"] == "speed"]
    return sum(one["others_cpu_seconds"] for one in found) / sum(one["seconds"] for one in found)


def compare(summary: Summary) -> list[Comparison]:
    peers = [contender.name for contender in CONTENDERS if contender.peer and contender.name in summary]
    found = []
    for name in summary[OURS.name] if peers else ():
        if name.startswith(("M tokens/s", "resume s", "MiB a reader")):
            more = name.startswith("M tokens/s")
            best = (max if more else min)(peers, key=lambda peer: summary[peer][name])
            found.append(Comparison(name, summary[OURS.name][name], best, summary[best][name], more))
    return found


def table(summary: Summary, failed: dict[str, str], versions: dict[str, str]) -> str:
    columns = {"M tokens/s": ("M tok/s", 1), "M tokens/s per core": ("per core", 1),
               "CPU s per M tokens": ("CPU s/M", 4), "MiB a reader": ("MiB/rdr", 1)}
    lines = []
    for length in ROW_TOKENS:
        places = [f"{length} tokens, {workers} workers" for workers in WORKERS]
        lines += ["", f"{f'rows of {length}':<24}" + "".join(f"{place.split(', ')[1]:>40}" for place in places),
                  " " * 24 + "".join(f"{head:>10}" for head, _ in columns.values()) * len(places)]
        for loader, numbers in summary.items():
            cells = "".join(f"{numbers[f'{name}, {place}']:>10.{digits}f}"
                            for place in places for name, (_, digits) in columns.items())
            lines.append(f"{loader + ' ' + versions[loader]:<24}" + cells)
    lines += ["", "MiB/rdr: Pss beyond the imported libraries, pages of mapped files left out, per process that reads",
              "", f"{'seconds to first batch':<24}" + "".join(f"{f'{workers} workers':>30}" for workers in WORKERS),
              " " * 24 + f"{'at 10 %':>10}{'at 90 %':>10}{'same':>10}" * len(WORKERS)]
    for loader, numbers in summary.items():
        cells = ""
        for workers in WORKERS:
            same = all(numbers[f"resumed with the following batch, at {at} %, {workers} workers"] for at in (10, 90))
            cells += "".join(f"{numbers[f'resume s, at {at} %, {workers} workers']:>10.2f}" for at in (10, 90))
            cells += f"{'yes' if same else 'no':>10}"
        lines.append(f"{loader + ' ' + versions[loader]:<24}" + cells)
    lines += ["", "same: the first batch is the one that would have followed", "memmap is a yardstick and no peer"]
    return "\n".join([*lines, *(f"{loader}: {reason}" for loader, reason in failed.items())])


def verdict(summary: Summary, comparisons: list[Comparison]) -> str:
    """Better means by more than 5 %."""
    if not comparisons:
        return "verdict: none, no peer could be measured"
    mine = summary[OURS.name]
    ahead = [str(one) for one in comparisons if one.ratio > 1.05]
    behind = [str(one) for one in comparisons if one.ratio < 0.95]
    level = [str(one) for one in comparisons if 0.95 <= one.ratio <= 1.05]
    growth = max(mine[f"resume s, at 90 %, {workers} workers"] / mine[f"resume s, at 10 %, {workers} workers"]
                 for workers in WORKERS)
    resumed = f"resume time is {'flat' if growth < 1.25 else 'growing'} (at 90 % {growth:.2f}x that at 10 %)"
    return (f"verdict: {resumed}; ahead of every peer in {'; '.join(ahead) or 'nothing'}; level in "
            f"{'; '.join(level) or 'nothing'}; behind in {'; '.join(behind) or 'nothing'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", metavar="FOLDER", type=Path,
                        default=Path("~/.cache/dlcm_lightning/benchmarks").expanduser(),
                        help="for the peers' environments and the corpus (2 GB), kept for the next time")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        run(arguments.task, None, {OURS.name: ours})
    cache: Path = arguments.cache.resolve()
    blank = Task("", "", str(cache / "corpus"), WEIGHTS, ROW_TOKENS[0], ROWS, 0, EPOCH_TOKENS // ROWS // ROW_TOKENS[0])
    make_corpus(cache / "corpus")
    interpreters: dict[str, str] = {}
    failed: dict[str, str] = {}
    for contender in tqdm(CONTENDERS, desc="environments and formats", unit="loader"):
        try:
            interpreters[contender.name] = prepare(contender, blank, cache)
        except Failed as error:
            failed[contender.name] = str(error)
    versions = {contender.name: version(contender, interpreters[contender.name])
                for contender in CONTENDERS if contender.name in interpreters}
    warm(cache / "corpus")
    runs: list[dict[str, Any]] = []
    for task in tqdm(tasks(list(interpreters), blank), desc="measurements", unit="process"):
        if task.loader in failed:
            continue
        try:
            runs.append({"task": asdict(task), "result": perform(task, interpreters[task.loader], cache)})
        except Failed as error:
            if task.loader == OURS.name:
                raise
            failed[task.loader] = str(error)
    summary = summarize([one for one in runs if one["task"]["loader"] not in failed])
    comparisons = compare(summary)
    about = {"command": "python -m benchmarks.loader",
             "hardware": describe_hardware(TrainConfig(), torch.device("cpu")), "torch": torch.__version__,
             "python": platform.python_version(), "versions": versions, "failed": failed,
             "other_cores_busy": disturbance(runs)}
    brief = [{**{name: one["task"][name] for name in ("loader", "action", "sequence_length", "workers", "positions")},
              **one["result"]} for one in runs if one["task"]["action"] in ("speed", "resume")]
    RESULTS.write_text(json.dumps({
        "about": about, "medians": summary, "comparisons": [{**asdict(one), "ratio": one.ratio} for one in comparisons],
        "runs": brief}, indent=1) + "\n")
    print(table(summary, failed, versions))
    print(f"cores busy with something else meanwhile: {disturbance(runs):.2f} (should be near 0)")
    print(verdict(summary, comparisons))


if __name__ == "__main__":
    main()
