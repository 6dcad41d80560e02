"""Rows, batches, ranks: what a model is fed."""

from __future__ import annotations

import itertools
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dlcm_lightning.batch import IGNORE_INDEX, Batch
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data.loader import TrainingBatches, ValidationBatches
from dlcm_lightning.data.order import NOISE, key
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from dlcm_lightning.ops.noise import uniform
from tests.synthetic import VOCABULARY

STEPS = 12


def noise(seed: int, sample: int) -> list[float]:
    keys = np.array([key(NOISE, seed, sample)], dtype=np.uint64).view(np.int64)
    return uniform(torch.from_numpy(keys), 64)[0].tolist()


def by_sample(batches: list[Batch]) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """Tokens, targets and noise of every sample that is no padding; none may come twice."""
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for batch in batches:
        parts = [part.reshape(len(batch.samples), -1).tolist() for part in (batch.tokens, batch.targets, batch.noise)]
        for place, sample in enumerate(batch.samples.tolist()):
            if sample >= 0:
                assert sample not in found
                found[sample] = (parts[0][place], parts[1][place], parts[2][place])
    return found


def test_rows_are_full_and_targets_are_the_next_tokens_of_the_same_document(reader: Reader) -> None:
    for batch in TrainingBatches(reader, 0, 1, 0, STEPS):
        assert batch.tokens.shape == batch.targets.shape == batch.noise.shape == (128,)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        starts = batch.documents.cu_seqlens.tolist()
        assert starts[0] == 0 and starts[-1] == 128 and 64 in starts
        assert batch.documents.max_seqlen == max(np.diff(starts))
        assert all(batch.tokens[start] == reader.bos_id for start in starts[1:-1] if start % 64)
        inner_bos = (batch.tokens == reader.bos_id).nonzero().squeeze(1).tolist()
        assert set(inner_bos) <= set(starts)
        for start, end in itertools.pairwise(starts):
            assert batch.targets[start:end - 1].tolist() == batch.tokens[start + 1:end].tolist()
            if end % 64:  # a document ends inside the row: its last token predicts nothing
                assert batch.targets[end - 1] == IGNORE_INDEX
        assert not (batch.targets == reader.bos_id).any()


def test_rows_are_windows_of_their_source_and_batches_know_their_documents(config: DataConfig, tokenizer: Tokenizer,
                                                                           reader: Reader) -> None:
    """Every batch against the plain stream: tokens, next tokens, documents, counts of the whole step."""
    streams = [Source(Path(config.root) / name / "train", tokenizer) for name in "ab"]
    whole = [stream.read(0, stream.tokens) for stream in streams]
    for step in range(STEPS):
        batches = reader.step_batches(step)
        drawn = reader.mixture.draw(np.arange(8 * step, 8 * step + 8))
        targets = documents = 0
        for place, (source, row) in enumerate(zip(drawn.sources.tolist(), drawn.rows.tolist(), strict=True)):
            tokens, starts = whole[source][0][row * 64:row * 64 + 65], whole[source][1] - row * 64
            batch, inside = batches[place // 2], slice(64 * (place % 2), 64 * (place % 2) + 64)
            assert batch.tokens[inside].tolist() == tokens[:-1].tolist()
            ends = set((starts[(starts > 0) & (starts <= 64)] - 1).tolist())
            assert batch.targets[inside].tolist() == [
                IGNORE_INDEX if offset in ends else token for offset, token in enumerate(tokens[1:].tolist())]
            begins = {0, *starts[(starts > 0) & (starts < 64)].tolist()}
            found = batch.documents.cu_seqlens[:-1].numpy() - inside.start
            assert set(found[(found >= 0) & (found < 64)].tolist()) == begins
            targets, documents = targets + 64 - len(ends), documents + len(begins)
        assert {(batch.step.targets, batch.step.documents, batch.step.tokens) for batch in batches} == {
            (targets, documents, 512)}


def test_an_epoch_feeds_every_token_once_and_predicts_every_target_once(config: DataConfig,
                                                                        tokenizer: Tokenizer) -> None:
    alone = replace(config, sources=[SourceConfig("a", "en", 1.0)], global_batch_size=1, micro_batch_size=1,
                    block_rows=1)
    reader = Reader(alone, 1, VOCABULARY)
    stream, starts = (source := Source(Path(config.root) / "a" / "train", tokenizer)).read(0, source.tokens)
    rows = source.rows(64)
    batches = [reader.step_batches(step)[0] for step in range(rows)]
    assert sum(batch.documents.cu_seqlens[-1] for batch in batches) == rows * 64
    fed = np.concatenate([batch.tokens.numpy() for batch in batches])
    assert np.bincount(fed).tolist() == np.bincount(stream[:rows * 64]).tolist()
    within = int(((starts > 0) & (starts <= rows * 64)).sum())
    assert sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches) == rows * 64 - within


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 8), (2, 2), (3, 1), (3, 2), (4, 1), (8, 1), (5, 4), (16, 1)])
def test_any_split_over_ranks_gives_the_same_global_sequence(config: DataConfig, reader: Reader, world: int,
                                                             micro: int) -> None:
    whole = by_sample([batch for step in range(3) for batch in reader.step_batches(step)])
    split = Reader(replace(config, global_batch_size=8, micro_batch_size=1 if 8 % micro else micro), 7, VOCABULARY)
    ranks = [[split.step_batches(step, rank, world) for step in range(3)] for rank in range(world)]
    assert by_sample([batch for steps in ranks for batches in steps for batch in batches]) == whole
    assert len({len(batches) for steps in ranks for batches in steps}) == 1
    for steps in ranks:
        for batches in steps:
            targets = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
            tokens = sum(int(batch.counted().sum()) for batch in batches)
            assert {(batch.step.targets, batch.step.tokens) for batch in batches} == {(targets, tokens)}


def test_filler_rows_predict_nothing_and_count_nowhere(config: DataConfig) -> None:
    reader = Reader(replace(config, micro_batch_size=2), 7, VOCABULARY)
    batches = reader.step_batches(0, 1, 3)  # 3 of 8 rows, and one padding
    assert [batch.samples.tolist() for batch in batches] == [[2, 3], [4, -1]]
    padding = batches[1]
    assert (padding.targets[64:] == IGNORE_INDEX).all() and (padding.tokens[64:] == reader.bos_id).all()
    assert not padding.counted()[64:].any() and padding.step.tokens == 3 * 64


def test_batches_that_start_in_the_middle_continue_the_sequence(reader: Reader) -> None:
    whole, rest = list(TrainingBatches(reader, 0, 1, 0, 5)), list(TrainingBatches(reader, 0, 1, 3, 5))
    assert (len(whole), len(rest)) == (20, 8)
    assert by_sample(rest) == by_sample(whole[12:])
    assert not list(TrainingBatches(reader, 0, 1, 5, 5))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12's word on threads and fork
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than the machine has cores
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_loader_workers_change_nothing(reader: Reader, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("dlcm_lightning.data.loader.READ_TOKENS", 3 * reader.config.tokens_per_step)
    loaded = list(TrainingBatches(reader, 0, 1, 2, 13, workers=workers))
    alone = list(TrainingBatches(reader, 0, 1, 2, 13))
    assert len(loaded) == len(alone) == 44
    for there, here in zip(loaded, alone, strict=True):
        assert there.samples.tolist() == here.samples.tolist() and there.tokens.tolist() == here.tokens.tolist()
        assert (there.step.targets, there.step.tokens) == (here.step.targets, here.step.tokens)


LEFT_OPEN = """
import multiprocessing, pickle, sys
from dlcm_lightning.data.loader import TrainingBatches
steps, workers = map(int, sys.argv[2:])
kept = iter(TrainingBatches(pickle.loads(sys.stdin.buffer.read()), 0, 1, 0, steps, workers=workers))
next(kept)
assert 0 < len(multiprocessing.active_children()) <= min(steps, workers)
if sys.argv[1] == "error":
    raise ValueError("of somebody else")
"""


@pytest.mark.parametrize(("end", "code"), [("quiet", 0), ("error", 1)])
@pytest.mark.parametrize(("steps", "workers"), [(50, 2), (1, 4)])
def test_a_process_ends_though_somebody_still_holds_its_batches(reader: Reader, end: str, code: int, steps: int,
                                                                workers: int) -> None:
    """Loader processes ignore signals, that of a parent at its end too: they must have been told before. Those that
    would get no item are not even begun."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LEFT_OPEN, end, str(steps), str(workers)],
                          input=pickle.dumps(reader), capture_output=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr.decode()
    assert b"at interpreter shutdown" not in done.stderr


def test_a_batch_travels_as_it_is_stored(reader: Reader) -> None:
    batch = reader.step_batches(0)[0]
    assert batch.stream.dtype == torch.uint16 and batch.stream.shape == (2, 65)
    assert batch.tokens.tolist() == batch.stream[:, :-1].reshape(-1).tolist()


@pytest.mark.gpu
def test_a_gpu_widens_a_batch_as_the_host_does(reader: Reader) -> None:
    for batch in reader.step_batches(0, rank=0, world=3):
        there = batch.pin_memory().to("cuda", non_blocking=True)
        for name in ("tokens", "targets", "noise"):
            assert getattr(there, name).device.type == "cuda"
            assert torch.equal(getattr(there, name).cpu(), getattr(batch, name))


def test_a_reader_travels_to_another_process(reader: Reader) -> None:
    before = reader.step_batches(1)[1]
    travelled = pickle.dumps(reader)
    assert len(travelled) < 100_000
    assert pickle.loads(travelled).step_batches(1)[1].tokens.tolist() == before.tokens.tolist()


def test_noise_belongs_to_the_sample_alone(reader: Reader) -> None:
    batch = reader.step_batches(2)[1]
    for place, sample in enumerate(batch.samples.tolist()):
        assert batch.noise[place * 64:(place + 1) * 64].tolist() == noise(7, sample)


def test_sources_for_another_domain_or_parted_in_another_way_are_refused(config: DataConfig, tmp_path: Path) -> None:
    first, second = config.sources
    with pytest.raises(DataError, match=r"data\.sources\[b\]\.domain = 'cn': the source was built for domain 'zh'"):
        Reader(replace(config, sources=[first, replace(second, domain="cn")]), 1, VOCABULARY)
    shutil.copytree(config.root, tmp_path / "root")
    for split in ("train", "validation"):
        path = tmp_path / "root" / "b" / split / "manifest.json"
        path.write_text(path.read_text().replace('"validation_share": 0.2', '"validation_share": 0.1'))
    with pytest.raises(DataError, match=r"different validation shares \('a' has 0\.2, 'b' has 0\.1\), so a text"):
        Reader(replace(config, root=str(tmp_path / "root")), 1, VOCABULARY)
    for split in ("train", "validation"):  # of a version that did not say
        path = tmp_path / "root" / "b" / split / "manifest.json"
        path.write_text(path.read_text().replace('"validation_share": 0.1', '"validation_share": null'))
    Reader(replace(config, root=str(tmp_path / "root")), 1, VOCABULARY)


def test_domains_are_numbered_as_in_the_config(config: DataConfig) -> None:
    left_out = replace(config, sources=[SourceConfig("never", "other", 0.0), *config.sources])
    reader = Reader(left_out, 7, VOCABULARY)
    drawn = reader.mixture.draw(np.arange(8))
    found = torch.cat([batch.domains for batch in reader.step_batches(0)])
    assert found.tolist() == [1 + source for source in drawn.sources.tolist()]


def test_the_fingerprint_names_the_order_of_samples(config: DataConfig, reader: Reader) -> None:
    assert reader.fingerprint == Reader(config, 7, VOCABULARY).fingerprint
    others = [Reader(config, 8, VOCABULARY), Reader(replace(config, sequence_length=32), 7, VOCABULARY),
              Reader(replace(config, block_rows=10), 7, VOCABULARY),
              Reader(replace(config, shuffle_shards=1), 7, VOCABULARY),
              Reader(replace(config, sources=[SourceConfig("a", "en", 1.0)]), 7, VOCABULARY)]
    assert len({reader.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert reader.fingerprint == Reader(replace(config, micro_batch_size=1, workers=3), 7, VOCABULARY).fingerprint


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_reads_the_same_rows_on_any_number_of_ranks(reader: Reader, world: int) -> None:
    parts = [ValidationBatches(reader, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    rows = by_sample([part[index] for part in parts for index in range(len(part))])
    assert sorted(rows) == list(range(len(reader.validation_rows)))
    assert [source for source, _ in reader.validation_rows].count(0) == 6
    stream, _ = Source(Path(reader.config.root) / "a" / "validation", Tokenizer.load(reader.config.root)).read(0, 128)
    assert rows[0][0] + rows[1][0] == stream.tolist()
    assert rows[0][2] != noise(7, 0)


def test_fixed_documents_are_the_first_of_the_validation_split(config: DataConfig, reader: Reader,
                                                               tokenizer: Tokenizer) -> None:
    texts = reader.fixed_documents("zh", count=2, characters=30)
    documents = itertools.islice(Source(Path(config.root) / "b" / "validation", tokenizer).documents(), 2)
    assert texts == [tokenizer.decode(ids)[:30] for ids in documents]


def test_a_sample_corpus_shares_out_the_weight_of_a_missing_source(config: DataConfig, tmp_path: Path) -> None:
    root = tmp_path / "sample"
    root.mkdir()
    (root / f"bpe-{VOCABULARY}").symlink_to(config.root)
    sources = [SourceConfig("a", "en", 0.4), SourceConfig("gone", "xx", 0.2), SourceConfig("b", "zh", 0.4)]
    sample = replace(config, corpus="sample", tokenizer="bpe", root=str(root), sources=sources)
    said: list[str] = []
    reader = Reader(sample, 7, VOCABULARY, log=said.append)
    assert reader.mixture.shares(0) == (10, 10)
    assert sorted({int(domain) for batch in reader.step_batches(0) for domain in batch.domains}) == [0, 2]
    assert len(said) == 1 and "lacks gone" in said[0]
