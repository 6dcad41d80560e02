"""One property above all: the global sequence of rows is the same whatever reads it, wherever it was stopped.

Random weights, seeds, caps, changes of weights, groups of shards, world sizes that change between stops, loader
processes, and shards that cannot be read. Every sample comes exactly once, is exactly the window of its source that
the mixture says, or is masked and accounted for, and then one of the shards that its window touches is broken.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlcm_lightning.batch import IGNORE_INDEX, Batch
from dlcm_lightning.config import DataConfig, SourceConfig, WeightChange
from dlcm_lightning.data.loader import TrainingBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY

BROKEN = {"a": (1, 2), "b": (0,)}
"""Shards that are removed, truncated or overwritten in the damaged corpus."""


@dataclass(frozen=True)
class Truth:
    """A source as it was written, read in one piece."""

    tokens: np.ndarray
    begins: list[int]
    """Of every shard, in tokens of the stream."""


@pytest.fixture(scope="module")
def truth(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Truth]:
    found = {}
    for name in "ab":
        source = Source(Path(config.root) / name / "train", tokenizer)
        begins = [0, *np.cumsum(source.manifest.shards.of("tokens")).tolist()]
        found[name] = Truth(source.read(0, source.tokens)[0], begins)
    return found


@pytest.fixture(scope="module")
def damaged_root(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    shutil.copytree(config.root, root, dirs_exist_ok=True)
    for name, numbers in BROKEN.items():
        shards = sorted((root / name / "train").glob("*.tar"))
        assert len(shards) > max(numbers) + 1
        for number in numbers:
            content = shards[number].read_bytes()
            if number == 1:
                shards[number].unlink()
            elif number == 2:
                shards[number].write_bytes(content[:700])
            else:  # ids far beyond the vocabulary, size kept
                shards[number].write_bytes(content[:512] + b"\xee" * (len(content) - 512))
    return root


def touches_broken(name: str, first: int, last: int, truth: dict[str, Truth]) -> bool:
    begins = truth[name].begins
    return any(first < begins[number + 1] and last > begins[number] for number in BROKEN[name])


@st.composite
def corpora(draw: st.DrawFn) -> DataConfig:
    """A configuration of the two sources; root is set by the test."""
    weight = draw(st.integers(2, 18)) / 20
    sources = [SourceConfig("a", "en", weight), SourceConfig("b", "zh", 1 - weight)]
    capped = draw(st.sampled_from([None, 0, 1]))
    if capped is not None:
        cap = draw(st.sampled_from([0.5, 1.0, 2.0]))
        sources[capped] = replace(sources[capped], max_epochs=cap)
    sequence_length = draw(st.sampled_from([3, 16, 33, 64, 100]))
    rows = draw(st.sampled_from([1, 3, 8, 12]))
    changes = []
    if draw(st.booleans()):
        later = draw(st.integers(2, 18)) / 20
        changes.append(WeightChange(draw(st.integers(1, 300)) * sequence_length, {"a": later, "b": 1 - later}))
    return DataConfig(
        sources=sources, sequence_length=sequence_length, global_batch_size=rows,
                      micro_batch_size=draw(st.integers(1, min(rows, 4))),
        block_rows=draw(st.sampled_from([20, 37, 64])), shuffle_shards=draw(st.integers(1, 6)), weight_changes=changes,
        validation_rows=2)


def attempts(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(ranks, steps) of every attempt of the run, between two stops."""
    return draw(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9)), min_size=1, max_size=5))


def rows_of(batches: Iterator[Batch] | list[Batch]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(sample, tokens, targets) of every row that is no padding; padding rows predict nothing."""
    for batch in batches:
        parts = [part.view(len(batch.samples), -1) for part in (batch.tokens, batch.targets)]
        for place, sample in enumerate(batch.samples.tolist()):
            if sample >= 0:
                yield sample, parts[0][place].tolist(), parts[1][place].tolist()
            else:
                assert (parts[1][place] == IGNORE_INDEX).all()


def check_attempt(reader: Reader, world: int, workers: int, first: int, last: int, seen: dict[int, list[int]],
               masked: dict[int, str]) -> None:
    """Reads the steps [first, last) as `world` ranks and adds what came to seen and masked."""
    lengths = set()
    for rank in range(world):
        batches = list(TrainingBatches(reader, rank, world, first, last, workers))
        lengths.add(len(batches))
        for sample, tokens, targets in rows_of(batches):
            assert sample not in seen and sample not in masked, "a sample came twice"
            seen[sample] = [*tokens, targets[-1]]
        for batch in batches:
            assert (batch.documents.lengths() > 0).all() and batch.documents.cu_seqlens[-1] == len(batch.tokens)
            assert batch.documents.max_seqlen == batch.documents.lengths().max()
            for missed in batch.step.unreadable:
                assert missed.sample not in seen
                masked[missed.sample] = missed.source
    assert len(lengths) == 1, "ranks must make the same number of forward passes"


def check_all(reader: Reader, samples: int, seen: dict[int, list[int]], masked: dict[int, str],
              truth: dict[str, Truth]) -> None:
    """Every sample was seen or masked, and is what the mixture says it is."""
    length = reader.config.sequence_length
    drawn = reader.mixture.draw(np.arange(samples))
    assert sorted([*seen, *masked]) == list(range(samples))
    for sample, (source, row) in enumerate(zip(drawn.sources.tolist(), drawn.rows.tolist(), strict=True)):
        name = reader.sources[source].name
        window = truth[name].tokens[row * length:(row + 1) * length + 1].tolist()
        if sample in masked:
            assert masked[sample] == name and touches_broken(name, row * length, (row + 1) * length + 1, truth)
        else:
            assert seen[sample][:-1] == window[:-1]
            assert seen[sample][-1] in (window[-1], IGNORE_INDEX)
    for source, part in enumerate(reader.mixture.parts):  # no row again before the others, but for one block's shuffle
        mine = [(int(drawn.epochs[i]), int(drawn.rows[i])) for i in np.flatnonzero(drawn.sources == source)]
        assert len(set(mine)) == len(mine)
        assert {epoch for epoch, _ in mine} <= set(range(1 + (len(mine) + reader.config.block_rows) // part.order.rows))
        if part.max_epochs:
            assert len(mine) <= part.max_epochs * part.order.rows


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), config_of_run=corpora(), seed=st.integers(0, 2**62), broken=st.booleans())
def test_stops_and_resizes_never_change_the_sequence(data: st.DataObject, config: DataConfig, damaged_root: Path,
                                                     truth: dict[str, Truth], config_of_run: DataConfig, seed: int,
                                                     broken: bool) -> None:
    root, policy = (str(damaged_root), "mask") if broken else (config.root, "stop")
    run = replace(config_of_run, root=root, unreadable=policy)  # type: ignore[arg-type]
    seen: dict[int, list[int]] = {}
    masked: dict[int, str] = {}
    step = 0
    for world, steps in data.draw(st.composite(attempts)()):
        reader = Reader(run, seed, VOCABULARY, verify_all=False, log=lambda _: None)
        if reader.mixture.samples is not None:
            steps = min(steps, reader.mixture.samples // run.global_batch_size - step)
        check_attempt(reader, world, 0, step, step + steps, seen, masked)
        step += steps
    check_all(reader, step * run.global_batch_size, seen, masked, truth)
    assert bool(masked) <= broken


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_loader_processes_under_faults_and_resizes_give_the_same_sequence(
    config: DataConfig, damaged_root: Path, truth: dict[str, Truth]
) -> None:
    run = replace(config, root=str(damaged_root), unreadable="mask", shuffle_shards=2)
    seen: dict[int, list[int]] = {}
    masked: dict[int, str] = {}
    for world, workers, first, last in ((1, 2, 0, 5), (3, 1, 5, 9), (2, 3, 9, 30)):
        reader = Reader(run, 11, VOCABULARY, verify_all=False, log=lambda _: None)
        check_attempt(reader, world, workers, first, last, seen, masked)
    check_all(reader, 30 * run.global_batch_size, seen, masked, truth)
    assert masked


def test_masked_are_exactly_the_rows_that_touch_what_is_broken(config: DataConfig, damaged_root: Path,
                                                               truth: dict[str, Truth]) -> None:
    run = replace(config, root=str(damaged_root), unreadable="mask", max_unreadable=1.0)
    reader = Reader(run, 3, VOCABULARY, verify_all=False, log=lambda _: None)
    steps = math.ceil(2 * sum(part.order.rows for part in reader.mixture.parts) / run.global_batch_size)
    seen: dict[int, list[int]] = {}
    masked: dict[int, str] = {}
    check_attempt(reader, 1, 0, 0, steps, seen, masked)
    drawn = reader.mixture.draw(np.arange(steps * run.global_batch_size))
    expected = {sample for sample, (source, row) in enumerate(zip(drawn.sources, drawn.rows, strict=True))
                if touches_broken("ab"[source], int(row) * 64, int(row) * 64 + 65, truth)}
    assert set(masked) == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_step_before_one_that_cannot_be_read_still_comes(config: DataConfig, damaged_root: Path,
                                                               workers: int) -> None:
    run = replace(config, root=str(damaged_root), unreadable="mask", global_batch_size=2)
    masking = Reader(run, 3, VOCABULARY, verify_all=False, log=lambda _: None)
    reader = Reader(run, 3, VOCABULARY, verify_all=False, log=lambda _: None)
    reader.config = replace(run, unreadable="stop")  # only now: opening would name the damage at once
    for first in (0, 5):
        missed = masking.read_steps(first, first + 500).unreadable[0][1]
        steps = missed.sample // run.global_batch_size - first
        came = []
        with pytest.raises(DataError, match=rf"sample {missed.sample} \(row \d+ of source '{missed.source}'\): "):
            for batch in TrainingBatches(reader, 0, 1, first, first + 500, workers):
                came += batch.samples.tolist()
        assert came == list(range(first * run.global_batch_size, (first + steps) * run.global_batch_size))
