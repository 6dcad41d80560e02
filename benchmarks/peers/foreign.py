"""The peers of `benchmarks.loader`, each set up the way its own documentation does: `python -m benchmarks.peers.foreign
TASK` in that peer's environment. Imports nothing of this project.

litdata      `optimize` with TokensLoader, read by StreamingDatasets in a CombinedStreamingDataset with weights
mosaicml     MDSWriter, one sample a row of fixed size; Streams with proportions in a StreamingDataset
webdataset   the tars of this project (which are plain webdataset tars); RandomMix, rows cut from the blocks on the way
memmap       no peer but a yardstick: numpy memory maps and a sampler that holds the whole order
"""

from __future__ import annotations

import functools
import importlib
import itertools
import random
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.stopwatch import Opened, Task, run

SEED = 7
SHARD_BYTES = 16 * 1024**2
SHUFFLED_ROWS = 1000
LIBRARIES = {"litdata": "litdata", "mosaicml": "streaming", "webdataset": "webdataset", "memmap": "numpy"}
HANDED_OVER_TOKENS = 2**18


def stream(task: Task, source: str) -> np.ndarray:
    """All tokens of a source, uint16."""
    return np.memmap(Path(task.corpus) / "streams" / f"{source}.u16", dtype="<u2", mode="r")


def rows_at_once(task: Task) -> int:
    """Rows of a loader's own batch. Passing a batch from one process to another costs about a millisecond whatever its
    size, so with workers every peer passes several batches at once and they are taken apart here."""
    return max(task.rows, HANDED_OVER_TOKENS // task.sequence_length) if task.workers else task.rows


def taken_apart(batches: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    for batch in batches:
        yield from batch.long().split(rows)


def documents(part: tuple[str, str, int, int, int]) -> Iterator[Tensor]:
    """litdata's `fn`: the documents [first, last) of a stream, which begin at token `begin`."""
    tokens, lengths, first, last, begin = part
    whole = np.memmap(tokens, dtype="<u2", mode="r")
    for length in np.fromfile(lengths, dtype="<u4")[first:last].tolist():
        yield torch.from_numpy(whole[begin:begin + length].copy())
        begin += length


def write_litdata(task: Task) -> None:
    from litdata import TokensLoader, optimize

    for source in task.sources:
        tokens, lengths = (Path(task.corpus) / "streams" / f"{source}.{suffix}" for suffix in ("u16", "u32"))
        ends = np.cumsum(np.fromfile(lengths, dtype="<u4"), dtype=np.int64)
        half = len(ends) // 2
        parts = [(str(tokens), str(lengths), 0, half, 0),
                 (str(tokens), str(lengths), half, len(ends), int(ends[half - 1]))]
        optimize(fn=documents, inputs=parts, output_dir=str(Path(task.corpus) / "litdata" / source), num_workers=2,
                 chunk_size=SHARD_BYTES // 2, item_loader=TokensLoader(), reorder_files=False, verbose=False)


def litdata(task: Task, state: Any) -> Opened:
    from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader

    parts = [StreamingDataset(str(Path(task.corpus) / "litdata" / source), shuffle=True, drop_last=True, seed=SEED,
                              item_loader=TokensLoader(block_size=task.sequence_length)) for source in task.sources]
    mixed = CombinedStreamingDataset(parts, seed=SEED, weights=list(task.sources.values()), iterate_over_all=False)
    loader = StreamingDataLoader(mixed, batch_size=rows_at_once(task), num_workers=task.workers)
    if state is not None:
        loader.load_state_dict(state)
    return Opened(taken_apart(loader, task.rows), loader.state_dict)


def without_torchvision() -> None:
    """mosaicml-streaming asks torchvision for two names, for its image datasets; empty ones do for text."""
    importlib.import_module("transformers.tokenization_utils_base")  # looks for the real one, so it goes first
    stand_in = {name: types.ModuleType(name) for name in (
        "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")}
    stand_in["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    stand_in["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    sys.modules.update(stand_in)


def write_mosaicml(task: Task) -> None:
    import streaming

    for source in task.sources:
        folder = Path(task.corpus) / f"mosaicml-{task.sequence_length}" / source
        tokens = stream(task, source)
        with streaming.MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{task.sequence_length}"},
                                 size_limit=SHARD_BYTES) as writer:
            for row in range(len(tokens) // task.sequence_length):
                writer.write({"tokens": np.array(tokens[row * task.sequence_length:(row + 1) * task.sequence_length])})


def mosaicml(task: Task, state: Any) -> Opened:
    import streaming

    folder = Path(task.corpus) / f"mosaicml-{task.sequence_length}"
    streams = [streaming.Stream(local=str(folder / source), proportion=weight)
               for source, weight in task.sources.items()]
    ahead = max(2**12,
                4 * task.sequence_length)  # fastest of those tried; with the default, 8 batches, it mostly sleeps
    dataset = streaming.StreamingDataset(streams=streams, epoch_size=task.epoch * task.rows, predownload=ahead,
                                         shuffle=True, batch_size=rows_at_once(task), shuffle_seed=SEED)
    loader = streaming.StreamingDataLoader(dataset, batch_size=rows_at_once(task), num_workers=task.workers)
    if state is not None:
        loader.load_state_dict(state)
    return Opened(taken_apart((batch["tokens"] for batch in loader), task.rows), loader.state_dict)


def rows_of_blocks(samples: Iterator[dict[str, Any]], sequence_length: int) -> Iterator[np.ndarray]:
    """Rows (sequence_length,) uint16 out of blocks of documents; what is left of a block begins the next row."""
    left = np.empty(0, dtype="<u2")
    for sample in samples:
        tokens = np.concatenate([left, np.frombuffer(sample["tokens.u16"], dtype="<u2")])
        whole = len(tokens) // sequence_length * sequence_length
        for begin in range(0, whole, sequence_length):
            yield tokens[begin:begin + sequence_length].copy()
        left = tokens[whole:]


def stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def webdataset(task: Task, state: Any) -> Opened:
    """There is no state to save: a run continues by reading again what it has read, and dropping it."""
    import webdataset as wds

    random.seed(SEED)
    torch.manual_seed(SEED)
    parts = []
    for source in task.sources:
        shards = sorted(str(path) for path in (Path(task.corpus) / "ours" / source / "train").glob("*.tar"))
        parts.append(wds.WebDataset(shards, shardshuffle=len(shards), seed=SEED).repeat()
                     .compose(functools.partial(rows_of_blocks, sequence_length=task.sequence_length))
                     .shuffle(SHUFFLED_ROWS, rng=random.Random(SEED)))
    mixed = wds.DataPipeline(wds.RandomMix(parts, probs=list(task.sources.values())),
                             wds.batched(rows_at_once(task), collation_fn=stacked))
    loader = wds.WebLoader(mixed, batch_size=None, num_workers=task.workers)
    return Opened(itertools.islice(taken_apart(loader, task.rows), state or 0, None), lambda: None)


class Rows(torch.utils.data.Dataset[Tensor]):
    """Row i of source s is item (s, i): a copy out of a memory map."""

    def __init__(self, task: Task) -> None:
        self.streams, self.sequence_length = [stream(task, source) for source in task.sources], task.sequence_length

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        source, row = place
        part = self.streams[source][row * self.sequence_length:(row + 1) * self.sequence_length]
        return torch.from_numpy(part.astype(np.int64))


def memmap(task: Task, state: Any) -> Opened:
    rng = np.random.default_rng(SEED)
    rows = Rows(task)
    count = task.epoch * task.rows
    chosen = rng.choice(len(rows.streams), size=count, p=list(task.sources.values()))
    order = np.empty(count, dtype=np.int64)
    for source, tokens in enumerate(rows.streams):
        places = np.flatnonzero(chosen == source)
        order[places] = rng.permutation(len(tokens) // task.sequence_length)[:len(places)]
    sampler = list(zip(chosen.tolist(), order.tolist(), strict=True))[(state or 0) * task.rows:]
    loader = torch.utils.data.DataLoader(rows, batch_size=rows_at_once(task), sampler=sampler,
                                         num_workers=task.workers)
    return Opened(taken_apart(loader, task.rows), lambda: None)


def write(task: Task) -> None:
    {"litdata": write_litdata, "mosaicml": write_mosaicml}[task.loader](task)


if __name__ == "__main__":
    name = Task.parse(sys.argv[1]).loader
    if name == "mosaicml":
        without_torchvision()
    importlib.import_module(LIBRARIES[name])  # now, so that importing counts neither as time nor as memory
    run(sys.argv[1], write, {"litdata": litdata, "mosaicml": mosaicml, "webdataset": webdataset, "memmap": memmap})
