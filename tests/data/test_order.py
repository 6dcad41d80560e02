"""Keyed permutations, and the order of a source's rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dlcm_lightning.data.order import Order, key, keys_of, permute, splitmix64, splitmix64_of


def even(rows: int, shards: int = 1) -> np.ndarray:
    """First rows of shards of about the same size."""
    return np.arange(shards + 1) * rows // shards


def test_splitmix64_is_the_published_function() -> None:
    # First outputs of the reference implementation from state 0 (Vigna): state advances by the golden ratio.
    assert [splitmix64_of(state * 0x9E3779B97F4A7C15 % 2**64) for state in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert splitmix64(values).tolist() == [splitmix64_of(int(value)) for value in values]
    assert values.tolist() == [0, 1, 2**63, 2**64 - 1]


def test_keys_depend_on_every_part_and_come_in_arrays_too() -> None:
    assert key(1, 2) != key(2, 1) and key("a") != key("b")
    samples = np.array([0, 7, 10**12, -1])
    assert keys_of(key(3, 5), samples).tolist() == [key(3, 5, sample) for sample in samples.tolist()]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025])
def test_a_keyed_permutation_permutes(size: int) -> None:
    assert sorted(permute(np.arange(size), size, 99).tolist()) == list(range(size))


def test_permutations_differ_by_key_and_scatter() -> None:
    first, second = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.15


@pytest.mark.parametrize(("first_rows", "group"), [
    (even(100), 16), (even(1000, 10), 3), (even(1000, 10), 1), (even(57, 7), 7), (even(57, 7), 6),
    (np.array([0, 0, 5, 5, 5, 9, 30, 30]), 2), (np.array([0, 4, 4, 4]), 1)])
def test_every_row_comes_exactly_once_per_epoch_in_an_order_of_its_own(first_rows: np.ndarray, group: int) -> None:
    order = Order(5, "a", first_rows, group)
    epochs = [order.draw(epoch, np.arange(order.rows)).tolist() for epoch in range(4)]
    assert all(sorted(rows) == list(range(order.rows)) for rows in epochs)
    if order.rows > 10:
        assert len({tuple(rows) for rows in epochs}) == 4
    picked = np.array([order.rows - 1, 0, order.rows // 2])
    assert Order(5, "a", first_rows, group).draw(2, picked).tolist() == [epochs[2][place] for place in picked]


def test_rows_come_from_one_group_of_shards_at_a_time() -> None:
    order = Order(5, "a", even(1000, 20), 4)
    every = []
    for epoch in range(4):
        shards = order.draw(epoch, np.arange(1000)) // 50
        groups = [sorted(set(shards[begin:begin + 200].tolist())) for begin in range(0, 1000, 200)]
        assert [len(group) for group in groups] == [4] * 5
        assert sorted(itertools.chain(*groups)) == list(range(20))
        every.append(groups)
        inside = [order.draw(epoch, np.arange(begin, begin + 200)) for begin in (0, 200)]
        places = [np.searchsorted(np.sort(rows), rows) for rows in inside]
        assert places[0].tolist() != places[1].tolist(), "no two groups are shuffled alike"
        for begin in range(0, 1000, 200):  # and their rows well mixed: no long run of one shard
            inside = shards[begin:begin + 200]
            assert max(len(list(run)) for _, run in itertools.groupby(inside.tolist())) < 12
    assert sum(groups == sorted(groups) for groups in every) < 2, "the shards themselves are shuffled"
    assert len({str(groups) for groups in every}) == 4


def test_an_order_far_away_costs_no_more_than_the_first() -> None:
    order = Order(5, "a", even(10**13, 100_000), 16)
    rows = order.draw(10**6, np.array([0, 10**12, 10**13 - 1]))
    assert ((rows >= 0) & (rows < 10**13)).all()


def test_an_order_stays_what_it_was() -> None:
    # Frozen: runs that are under way depend on it.
    assert Order(3, "b", even(1000), 16).draw(0, np.arange(4)).tolist() == [343, 42, 983, 494]
    assert Order(3, "b", even(1000, 10), 3).draw(1, np.arange(4)).tolist() == [85, 333, 856, 863]
