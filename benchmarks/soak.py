"""A hundred million tokens under faults, every one accounted for: `python -m benchmarks.soak` (under a minute).

Four synthetic sources, 10^8 tokens, one epoch, mixed by weight. The run is stopped at random steps and goes on with
another number of ranks and of loader processes, from the local folder or through an object store that fails now and
then. Some shards are lost, cut short, forbidden or filled with nonsense; `data.unreadable: mask` is set. Then every
sample of the run must have come exactly once: as the very tokens that were written, compared with the arrays they came
from, or masked and reported, and then because its window touches one of the broken shards, and every such sample must
have been. The last line is the account.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data import store
from dlcm_lightning.data.loader import TrainingBatches
from dlcm_lightning.data.preprocessing.writer import ShardWriter, finish_split
from dlcm_lightning.data.reader import Reader, micro_batches_per_step
from dlcm_lightning.data.tokenizer import Tokenizer, train_bpe

VOCABULARY, ROW, ROWS = 270, 2048, 24
WEIGHTS = {"web": 0.5, "zh": 0.25, "code": 0.15, "math": 0.1}
SHARDS = 50
"""About; of all sources together."""
RESULTS = Path("benchmarks/results/soak.json")
FAULTS = ("lost", "truncated", "overwritten", "forbidden")


class Unreliable(LocalFileSystem):
    """Local files as an object store that fails two fetches in a hundred and forbids some."""

    protocol = "unreliable"
    cachable = False
    forbidden: ClassVar[set[str]] = set()
    chance = random.Random(0)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("unreliable://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if self._strip_protocol(path) in self.forbidden:
            raise PermissionError(13, "not yours", path)
        if self.chance.random() < 0.02:
            raise ConnectionError("reset by peer")
        content: bytes = super().cat_file(path, start=start, end=end, **options)
        return content


@dataclass
class Account:
    """What came."""

    exact: int = 0
    masked: int = 0
    wrong: int = 0
    """Samples that came twice, differ from what was written, or were masked without need."""
    attempts: int = 0


def write(root: Path, name: str, tokens: int, shard_bytes: int, tokenizer: Tokenizer, seed: int) -> np.ndarray:
    """A source of `tokens` random tokens in documents of realistic lengths; the array is the training stream."""
    dice = np.random.default_rng(seed)
    streams = []
    for split, size in (("train", tokens), ("validation", 4 * ROW)):
        writer = ShardWriter(root / name / split, vocab_size=VOCABULARY, shard_bytes=shard_bytes,
                             block_tokens=shard_bytes // 16)
        ids = dice.integers(2, VOCABULARY, size, dtype=np.uint16)
        ends = np.unique(np.append(np.cumsum(np.clip(dice.lognormal(6, 1.2, size // 200), 3, 10**5)).astype(int), size))
        begin = 0
        for end in ends[ends <= size].tolist():
            ids[begin], ids[end - 1] = 0, 1
            writer.write(ids[begin:end], hashlib.md5(f"{name}{split}{begin}".encode()).digest(), 4 * (end - begin))
            begin = end
        finish_split(root / name / split, writer.close(), source=name, domain=name, split=split,
                     tokenizer=tokenizer.fingerprint, vocab_size=VOCABULARY)
        streams.append(ids)
    return streams[0]


def damage(root: Path) -> dict[str, dict[int, str]]:
    """Breaks one shard of each source in one way, and of the largest in every way. By source and shard."""
    broken: dict[str, dict[int, str]] = {}
    for place, name in enumerate(WEIGHTS):
        shards = sorted((root / name / "train").glob("*.tar"))
        kinds = FAULTS if name == "web" else (FAULTS[place],)
        for step, kind in enumerate(kinds):
            number = 1 + step * 3 if name == "web" else len(shards) // 2
            shard, broken.setdefault(name, {})[number] = shards[number], kind
            size = shard.stat().st_size
            if kind == "lost":
                shard.unlink()
            elif kind == "truncated":
                os.truncate(shard, size // 3)
            elif kind == "overwritten":
                shard.write_bytes(b"\xee" * size)
            else:
                Unreliable.forbidden.add(str(shard))
                shard.rename(shard.with_suffix(".hidden"))  # root may read everything; for a local reader it is gone
    return broken


def check(reader: Reader, batch: Batch, truth: dict[str, np.ndarray], seen: np.ndarray, account: Account) -> None:
    """Adds a batch to the account."""
    samples = batch.samples.numpy()
    rows = batch.tokens.numpy().reshape(-1, ROW)
    drawn = reader.mixture.draw(samples[samples >= 0])
    for tokens, sample, source, row in zip(rows[samples >= 0], samples[samples >= 0].tolist(), drawn.sources.tolist(),
                                           drawn.rows.tolist(), strict=True):
        written = truth[reader.sources[source].name][row * ROW:(row + 1) * ROW]
        good = not seen[sample] and np.array_equal(tokens, written)
        seen[sample] = True
        account.exact += good
        account.wrong += not good


def check_masked(reader: Reader, batch: Batch, bad: dict[str, np.ndarray], seen: np.ndarray, account: Account) -> None:
    for missed in batch.step.unreadable:
        row = int(reader.mixture.draw(np.array([missed.sample])).rows[0])
        good = not seen[missed.sample] and bool(bad[missed.source][row])
        seen[missed.sample] = True
        account.masked += good
        account.wrong += not good


def bad_rows(reader: Reader, broken: dict[str, dict[int, str]]) -> dict[str, np.ndarray]:
    """(rows,) bool by source: whether the window of a row touches a broken shard."""
    found = {}
    for source, stream in zip(reader.sources, reader._train, strict=True):
        ends = np.cumsum(stream.manifest.shards.of("tokens"))
        rows = np.arange(stream.rows(ROW))
        bad = np.zeros(len(rows), dtype=bool)
        for number in broken.get(source.name, {}):
            bad |= (rows * ROW < ends[number]) & ((rows + 1) * ROW + 1 > ends[number] - stream.manifest.shards.of(
                "tokens")[number])
        found[source.name] = bad
    return found


def soak(root: Path, tokens: int, seed: int) -> tuple[Account, int, int, float]:
    """The account, samples, rows that had to be masked, seconds of reading."""
    tokenizer = train_bpe([f"{letter} the cat sat on a mat {number}" for number in range(400) for letter in "abc"],
                          VOCABULARY)
    tokenizer.save(root)
    truth = {name: write(root, name, int(tokens * weight) + 3 * ROW, 2 * tokens // SHARDS, tokenizer, seed + place)
             for place, (name, weight) in enumerate(tqdm(WEIGHTS.items(), desc="writing", unit="source"))}
    broken = damage(root)
    local = DataConfig(root=str(root), sequence_length=ROW, global_batch_size=ROWS, micro_batch_size=4, block_rows=200,
                       shuffle_shards=3, unreadable="mask", cache_megabytes=64,
                       sources=[SourceConfig(name, name, weight) for name, weight in WEIGHTS.items()])
    dice = random.Random(seed)
    account = Account()
    reader = Reader(local, seed, VOCABULARY, verify_all=False, log=lambda _: None)
    steps = -(-tokens // (ROW * ROWS))
    bad = bad_rows(reader, broken)
    drawn = reader.mixture.draw(np.arange(steps * ROWS))
    expected = sum(int(bad[source.name][drawn.rows[drawn.sources == number]].sum())
                   for number, source in enumerate(reader.sources))
    seen = np.zeros(steps * ROWS, dtype=bool)
    step, began = 0, time.perf_counter()
    with tqdm(total=steps * ROWS * ROW, desc="reading", unit="token", unit_scale=True) as bar:
        while step < steps:
            attempt = min(steps - step, dice.randint(1, 120))
            world, workers = dice.choice((1, 2, 3, 4, 8)), dice.choice((0, 0, 1, 2))
            place = str(root) if dice.random() < 0.5 else f"unreliable:/{root}"
            reader = Reader(replace(local, root=place), seed, VOCABULARY, verify_all=False, log=lambda _: None)
            for rank in range(world):
                per_step = micro_batches_per_step(ROWS, local.micro_batch_size, world)
                coming = TrainingBatches(reader, rank, world, step, step + attempt, workers)
                for number, batch in enumerate(coming):
                    check(reader, batch, truth, seen, account)
                    if number % per_step == 0:  # every micro-batch names the rows of its whole step
                        check_masked(reader, batch, bad, seen, account)
            step, account.attempts = step + attempt, account.attempts + 1
            bar.update(attempt * ROWS * ROW)
    return account, steps * ROWS, expected, time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    fsspec.register_implementation("unreliable", Unreliable, clobber=True)
    store.FIRST_PAUSE_SECONDS = 0.01
    root = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        account, samples, expected, seconds = soak(root, arguments.tokens, arguments.seed)
    finally:
        shutil.rmtree(root)
    good = account.wrong == 0 and account.exact + account.masked == samples and account.masked == expected
    result = {"tokens": samples * ROW, "samples": samples, "exact": account.exact, "masked": account.masked,
              "had to be masked": expected, "wrong": account.wrong, "attempts": account.attempts, "seconds": seconds,
              "seed": arguments.seed,
              "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    if arguments.tokens >= 10**8:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{samples * ROW:,} tokens in {samples:,} samples over {account.attempts} attempts: {account.exact:,} exact, "
          f"{account.masked:,} masked where {expected:,} had to be, {account.wrong:,} wrong: "
          f"{'every one accounted for' if good else 'NOT ACCOUNTED FOR'}")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
