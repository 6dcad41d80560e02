"""The order of samples inverted: against drawing all of them."""

from __future__ import annotations

import time
from collections import defaultdict

import numpy as np
import pytest

from dlcm_lightning.data.inspection.position import place_of, planned, samples_of, unpermute
from dlcm_lightning.data.mixture import Mixture, Part
from dlcm_lightning.data.order import Order, key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4096])
def test_a_permutation_is_undone(size: int) -> None:
    for seed in range(5):
        there = permute(np.arange(size), size, key(seed)).tolist()
        assert [unpermute(index, size, key(seed)) for index in there] == list(range(size))


def test_a_permutation_of_more_than_any_corpus_is_undone() -> None:
    size = 10**13 + 7
    indices = np.array([0, 1, size // 3, size - 1])
    assert [unpermute(index, size, 5) for index in permute(indices, size, 5).tolist()] == indices.tolist()


@pytest.mark.parametrize(("first_rows", "group"), [
    ([0, 40], 3), ([0, 10, 10, 25, 31], 16), ([0, 7, 9, 9, 9, 30, 31, 60, 61, 64], 2), ([0, 0, 5, 5, 5, 11, 12], 1)])
def test_every_row_is_found_at_its_place_of_every_epoch(first_rows: list[int], group: int) -> None:
    order = Order(3, "web", np.array(first_rows), group)
    for epoch in range(4):
        rows = order.draw(epoch, np.arange(order.rows)).tolist()
        assert [place_of(order, epoch, row) for row in rows] == list(range(order.rows))


MIXTURES = {
    "plain": ({"a": 0.5, "b": 0.3, "c": 0.2}, {}, []),
    "odd shares": ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, {}, []),
    "other weights later": ({"a": 0.5, "b": 0.5, "c": 0.0}, {}, [(100, {"a": 0.1, "c": 0.9}), (400, {"a": 1.0})]),
    "used up": ({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.5, "c": 2}, [(333, {"a": 0.2, "b": 0.2, "c": 0.6})]),
    "all used up": ({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 2, "b": 1, "c": 4}, []),
}


def mixture(case: str, seed: int = 3) -> Mixture:
    weights, caps, changes = MIXTURES[case]
    rows = {"a": [0, 30, 37], "b": [0, 100, 150, 211], "c": [0, 5]}
    parts = [Part(name, weight, Order(seed, name, np.array(rows[name]), 2), caps.get(name, 0))
             for name, weight in weights.items()]
    return Mixture(seed, parts, 40, changes)


@pytest.mark.parametrize("case", MIXTURES)
@pytest.mark.parametrize("samples", [0, 1, 39, 40, 41, 333, 1000])
def test_the_samples_of_a_row_are_those_that_draw_it(case: str, samples: int) -> None:
    mix = mixture(case)
    there = planned(mix, samples)
    assert there == samples or (case == "all used up" and there == 2 * 37 + 211 + 4 * 5)
    expected: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    if there:
        drawn = mix.draw(np.arange(there))
        for sample, place in enumerate(zip(drawn.sources.tolist(), drawn.rows.tolist(), strict=True)):
            expected[place].append((int(drawn.epochs[sample]), sample))
    for source, part in enumerate(mix.parts):
        for row in range(part.order.rows):
            assert list(samples_of(mix, source, row, samples)) == sorted(expected[source, row])
    assert len(expected) > 200 or samples < 1000  # rows were found, and not nothing with nothing compared


def test_a_row_of_a_trillion_tokens_is_found_at_once() -> None:
    shards = np.arange(20_001) * 5_000
    mix = Mixture(1, [Part("a", 0.9, Order(1, "a", shards, 16)), Part("b", 0.1, Order(1, "b", shards[:21], 16), 9)],
                  4096)
    began = time.perf_counter()
    epoch, sample = next(samples_of(mix, 0, 77_777_777, 125_000_000))
    assert time.perf_counter() - began < 2
    drawn = mix.draw(np.array([sample]))
    assert (drawn.sources[0], drawn.rows[0], drawn.epochs[0]) == (0, 77_777_777, epoch)
