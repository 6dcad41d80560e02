"""Floors: against arithmetic done by hand, and as a probability."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.batch import IGNORE_INDEX
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.ngram import Histories, log2_probabilities, ngram_baselines
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import VOCABULARY, write_split


def histories(*documents: list[int], vocabulary: int) -> Histories:
    rows = [(vocabulary if place == 0 else document[place - 1], document[place], document[place + 1])
            for document in documents for place in range(len(document) - 1)]
    return Histories(*np.array(rows, dtype=np.int64).T)


def test_a_corpus_small_enough_for_the_back_of_an_envelope() -> None:
    """V = 4; training <0 2 1> and <0 3 1>; scored <0 2 1>: targets 2 and 1."""
    training = histories([0, 2, 1], [0, 3, 1], vocabulary=4)
    unigram, trigram = log2_probabilities(training, histories([0, 2, 1], vocabulary=4), 4)
    # Unigram: targets 2, 1, 3, 1; p = (n + 1) / 8.
    assert np.allclose(2**unigram, [2 / 8, 3 / 8])
    # Every bigram and trigram was seen once: d = 4 / (4 + 0) = 1, nothing is left of the counts, and the unigram
    # of the target is passed on whole.
    assert np.allclose(2**trigram, [2 / 8, 3 / 8])
    # A second copy of the first document: bigrams 02, 21 twice, 03, 31 once; d = 2 / (2 + 4) = 1/3. Unigram of 2:
    # (2 + 1) / (6 + 4). p(2|0) = (2 - d) / 3 + d * 2 / 3 * 0.3; p(2|start 0) the same with p(2|0) below it.
    again = histories([0, 2, 1], [0, 2, 1], [0, 3, 1], vocabulary=4)
    _, trigram = log2_probabilities(again, histories([0, 2, 1], vocabulary=4), 4)
    bigram = (2 - 1 / 3) / 3 + 2 / 9 * 0.3
    assert 2 ** trigram[0] == pytest.approx((2 - 1 / 3) / 3 + 2 / 9 * bigram)


def test_probabilities_sum_to_one_after_any_history() -> None:
    random = np.random.default_rng(0)
    training = histories(*[[0, *random.integers(2, 7, 30).tolist(), 1] for _ in range(8)], vocabulary=9)
    for older, last in ((9, 0), (0, 3), (4, 4), (8, 8), (9, 8)):
        every = Histories(np.full(9, older), np.full(9, last), np.arange(9))
        for log2 in log2_probabilities(training, every, 9):
            assert (2**log2).sum() == pytest.approx(1)


def test_baselines_score_the_targets_the_model_is_scored_on(reader: Reader) -> None:
    batches = [batch for data in [ValidationBatches(reader)] for batch in (data[index] for index in range(len(data)))]
    for number, floor in enumerate(ngram_baselines(reader)):
        mine = [(batch.token_domains() == number) & batch.counted() for batch in batches]
        assert floor.domain == reader.domains[number]
        assert floor.targets == sum(int((batch.targets[kept] != IGNORE_INDEX).sum())
                                    for batch, kept in zip(batches, mine, strict=True))
        assert floor.target_bytes == sum(int(reader.token_bytes[batch.targets[kept & (batch.targets >= 0)]].sum())
                                         for batch, kept in zip(batches, mine, strict=True))
        assert 0 < floor.trigram < floor.unigram


def test_a_domain_fit_is_never_told_about_the_other_domain(config: DataConfig, reader: Reader) -> None:
    alone = Reader(replace(config, sources=[SourceConfig("b", "zh", 1.0)]), 7, VOCABULARY)
    assert ngram_baselines(alone)[0] == ngram_baselines(reader)[1]
    assert ngram_baselines(alone, "mixture")[0] == ngram_baselines(alone, "domain")[0]
    assert ngram_baselines(reader, "mixture")[1].unigram > ngram_baselines(reader, "domain")[1].unigram


def test_a_uniform_source_has_the_entropy_it_was_drawn_with(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two letters, one byte each, by coin: 1 bit per byte, and no counting does better."""
    tokenizer.save(tmp_path)
    random = np.random.default_rng(0)
    letters = [ids[1] for ids in tokenizer.encode_documents(["x", "y"])]
    for split, count in (("train", 40), ("validation", 10)):
        documents = [(np.array([0, *random.choice(letters, 5000), 1]), 5000) for _ in range(count)]
        write_split(tmp_path / "coin" / split, documents, source="coin", domain="c", split=split,
                    tokenizer=tokenizer.fingerprint)
    config = DataConfig(root=str(tmp_path), sequence_length=100, validation_rows=400,
                        sources=[SourceConfig("coin", "c", 1.0)])
    (floor,) = ngram_baselines(Reader(config, 0, VOCABULARY))
    assert floor.unigram == pytest.approx(1, abs=0.01) and floor.trigram == pytest.approx(1, abs=0.01)
    assert math.isclose(floor.targets, 40_000, rel_tol=1e-3)
