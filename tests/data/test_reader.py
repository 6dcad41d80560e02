"""Rows, batches, ranks: what a model is fed."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dlcm_lightning.batch import NO_TARGET, Batch
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data.mixture import noise
from dlcm_lightning.data.reader import Reader, TrainingBatches, ValidationBatches
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import VOCABULARY

STEPS = 12


def by_sample(batches: list[Batch]) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """Tokens, targets and noise of every sample that is no filler; none may come twice."""
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for batch in batches:
        parts = [part.reshape(len(batch.samples), -1).tolist() for part in (batch.tokens, batch.targets, batch.noise)]
        for place, sample in enumerate(batch.samples.tolist()):
            if sample >= 0:
                assert sample not in found
                found[sample] = (parts[0][place], parts[1][place], parts[2][place])
    return found


def test_rows_are_full_and_targets_are_the_next_tokens_of_the_same_document(reader: Reader) -> None:
    for batch in (TrainingBatches(reader, 0, 1, 0, 4 * STEPS)[index] for index in range(4 * STEPS)):
        assert batch.tokens.shape == batch.targets.shape == batch.noise.shape == (128,)
        assert batch.tokens.dtype == batch.targets.dtype == batch.target_bytes.dtype == torch.int64
        starts = batch.documents.starts.tolist()
        assert starts[0] == 0 and starts[-1] == 128 and 64 in starts
        assert batch.documents.longest == max(np.diff(starts))
        assert all(batch.tokens[start] == reader.bos_id for start in starts[1:-1] if start % 64)
        inner_bos = (batch.tokens == reader.bos_id).nonzero().squeeze(1).tolist()
        assert set(inner_bos) <= set(starts)
        for start, end in itertools.pairwise(starts):
            assert batch.targets[start:end - 1].tolist() == batch.tokens[start + 1:end].tolist()
            if end % 64:  # a document ends inside the row: its last token predicts nothing
                assert batch.targets[end - 1] == NO_TARGET
        assert not (batch.targets == reader.bos_id).any()


def test_target_bytes_are_those_of_the_targets(reader: Reader) -> None:
    batch = reader.step_batch(0, 0)
    sizes = torch.from_numpy(reader.token_bytes)
    kept = batch.targets != NO_TARGET
    assert batch.target_bytes[kept].tolist() == sizes[batch.targets[kept]].tolist()
    assert not batch.target_bytes[~kept].any()


def test_an_epoch_feeds_every_token_once_and_predicts_every_target_once(config: DataConfig,
                                                                        tokenizer: Tokenizer) -> None:
    alone = replace(config, sources=[SourceConfig("a", "en", 1.0)], rows_per_step=1, micro_batch_rows=1,
                    block_rows=1)
    reader = Reader(alone, 1, VOCABULARY)
    stream, starts = (source := Source(Path(config.root) / "a" / "train", tokenizer)).read(0, source.tokens)
    rows = source.rows(64)
    batches = [reader.step_batch(step, 0) for step in range(rows)]
    assert sum(batch.documents.starts[-1] for batch in batches) == rows * 64
    fed = np.concatenate([batch.tokens.numpy() for batch in batches])
    assert np.bincount(fed).tolist() == np.bincount(stream[:rows * 64]).tolist()
    within = int(((starts > 0) & (starts <= rows * 64)).sum())
    assert sum(int((batch.targets != NO_TARGET).sum()) for batch in batches) == rows * 64 - within


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 8), (2, 2), (3, 1), (3, 2), (4, 1), (8, 1), (5, 4), (16, 1)])
def test_any_split_over_ranks_gives_the_same_global_sequence(config: DataConfig, reader: Reader, world: int,
                                                             micro: int) -> None:
    whole = by_sample([reader.step_batch(step, number) for step in range(3) for number in range(4)])
    split = Reader(replace(config, rows_per_step=8, micro_batch_rows=1 if 8 % micro else micro), 7, VOCABULARY)
    datasets = [TrainingBatches(split, rank, world, 0, 10**6) for rank in range(world)]
    per_step = datasets[0].per_step
    assert by_sample([data[index] for data in datasets for index in range(3 * per_step)]) == whole
    for step in range(3):
        for data in datasets:
            batches = [data[step * per_step + number] for number in range(per_step)]
            targets = sum(int((batch.targets != NO_TARGET).sum()) for batch in batches)
            tokens = sum(int(batch.counted().sum()) for batch in batches)
            assert {(batch.step_targets, batch.step_tokens) for batch in batches} == {(targets, tokens)}


def test_filler_rows_predict_nothing_and_count_nowhere(config: DataConfig) -> None:
    reader = Reader(replace(config, micro_batch_rows=2), 7, VOCABULARY)
    batches = [TrainingBatches(reader, 1, 3, 0, 2)[index] for index in range(2)]  # 3 of 8 rows, and one filler
    assert [batch.samples.tolist() for batch in batches] == [[2, 3], [4, -1]]
    filler = batches[1]
    assert (filler.targets[64:] == NO_TARGET).all() and (filler.tokens[64:] == reader.bos_id).all()
    assert not filler.counted()[64:].any() and filler.step_tokens == 3 * 64


def test_a_dataset_that_starts_in_the_middle_continues_the_sequence(reader: Reader) -> None:
    whole, rest = TrainingBatches(reader, 0, 1, 0, 20), TrainingBatches(reader, 0, 1, 13, 20)
    assert (len(whole), len(rest)) == (20, 7)
    for index in range(7):
        assert rest[index].tokens.tolist() == whole[13 + index].tokens.tolist()
        assert rest[index].samples.tolist() == whole[13 + index].samples.tolist()
    with pytest.raises(IndexError):
        rest[7]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12's word on threads and fork
def test_loader_workers_change_nothing(reader: Reader) -> None:
    data = TrainingBatches(reader, 0, 1, 5, 17)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, shuffle=False)
    for index, batch in enumerate(loader):
        here = data[index]
        assert batch.samples.tolist() == here.samples.tolist() and batch.tokens.tolist() == here.tokens.tolist()
        assert (batch.step_targets, batch.step_tokens) == (here.step_targets, here.step_tokens)
    assert index == len(data) - 1


def test_a_reader_travels_to_another_process(reader: Reader) -> None:
    before = reader.step_batch(1, 1)
    travelled = pickle.dumps(reader)
    assert len(travelled) < 100_000
    assert pickle.loads(travelled).step_batch(1, 1).tokens.tolist() == before.tokens.tolist()


def test_noise_belongs_to_the_sample_alone(reader: Reader) -> None:
    batch = reader.step_batch(2, 1)
    for place, sample in enumerate(batch.samples.tolist()):
        assert batch.noise[place * 64:(place + 1) * 64].tolist() == noise(7, sample, 64).tolist()


def test_domains_are_numbered_as_in_the_config(config: DataConfig) -> None:
    left_out = replace(config, sources=[SourceConfig("never", "other", 0.0), *config.sources])
    reader = Reader(left_out, 7, VOCABULARY)
    drawn = reader.mixture.draw(np.arange(8))
    found = torch.cat([reader.step_batch(0, number).domains for number in range(4)])
    assert found.tolist() == [1 + source for source in drawn.sources.tolist()]


def test_the_fingerprint_names_the_order_of_samples(config: DataConfig, reader: Reader) -> None:
    assert reader.fingerprint == Reader(config, 7, VOCABULARY).fingerprint
    others = [Reader(config, 8, VOCABULARY), Reader(replace(config, row_tokens=32), 7, VOCABULARY),
              Reader(replace(config, sources=[SourceConfig("a", "en", 0.5), SourceConfig("b", "zh", 0.5)]), 7,
                     VOCABULARY)]
    assert len({reader.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert reader.fingerprint == Reader(replace(config, micro_batch_rows=1, workers=3), 7, VOCABULARY).fingerprint


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_reads_the_same_rows_on_any_number_of_ranks(reader: Reader, world: int) -> None:
    parts = [ValidationBatches(reader, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    rows = by_sample([part[index] for part in parts for index in range(len(part))])
    assert sorted(rows) == list(range(len(reader.validation_rows)))
    assert [source for source, _ in reader.validation_rows].count(0) == 6
    stream, _ = Source(Path(reader.config.root) / "a" / "validation", Tokenizer.load(reader.config.root)).read(0, 128)
    assert rows[0][0] + rows[1][0] == stream.tolist()
    assert rows[0][2] != noise(7, 0, 64).tolist()


def test_fixed_documents_are_the_first_of_the_validation_split(config: DataConfig, reader: Reader,
                                                               tokenizer: Tokenizer) -> None:
    texts = reader.fixed_documents("zh", count=2, characters=30)
    documents = Source(Path(config.root) / "b" / "validation", tokenizer).documents(2)
    assert texts == [tokenizer.decode(ids)[:30] for ids in documents]


def test_a_sample_corpus_shares_out_the_weight_of_a_missing_source(config: DataConfig, tmp_path: Path) -> None:
    root = tmp_path / "sample"
    root.mkdir()
    (root / f"bpe-{VOCABULARY}").symlink_to(config.root)
    sources = [SourceConfig("a", "en", 0.4), SourceConfig("gone", "xx", 0.2), SourceConfig("b", "zh", 0.4)]
    sample = replace(config, corpus="sample", tokenizer="bpe", root=str(root), sources=sources)
    said: list[str] = []
    reader = Reader(sample, 7, VOCABULARY, report=said.append)
    assert reader.mixture.shares.tolist() == [10, 10] and reader.domain_of_source == [0, 2]
    assert len(said) == 1 and "lacks gone" in said[0]
