"""Mixture: pure, exact, every row once."""

from __future__ import annotations

import numpy as np
import pytest

from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.mixture import Mixture, key, noise, permute, shares, splitmix64, splitmix64_of

NAMES, ROWS, WEIGHTS = ["a", "b", "c"], [37, 1000, 5], [0.25, 0.7, 0.05]


def test_splitmix64_is_the_published_function() -> None:
    # First outputs of the reference implementation from state 0 (Vigna): state advances by the golden ratio.
    assert [splitmix64_of(state * 0x9E3779B97F4A7C15 % 2**64) for state in range(3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    values = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    assert splitmix64(values).tolist() == [splitmix64_of(int(value)) for value in values]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025])
def test_a_keyed_permutation_permutes(size: int) -> None:
    assert sorted(permute(np.arange(size), size, 99).tolist()) == list(range(size))


def test_permutations_differ_by_key_and_scatter() -> None:
    first, second = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.15


def test_every_block_holds_every_source_in_its_exact_share() -> None:
    mixture = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40)
    assert mixture.shares.tolist() == [10, 28, 2]
    for block in (0, 1, 12345):
        drawn = mixture.draw(np.arange(block * 40, (block + 1) * 40))
        assert np.bincount(drawn.sources).tolist() == [10, 28, 2]


def test_shares_follow_the_largest_remainder() -> None:
    assert shares([0.5, 0.3, 0.2], 7).tolist() == [4, 2, 1]
    assert shares([1 / 3, 1 / 3, 1 / 3], 8).tolist() == [3, 3, 2]
    assert shares([1.0], 5).tolist() == [5]


def test_every_row_of_a_source_comes_exactly_once_per_epoch() -> None:
    mixture = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40)
    drawn = mixture.draw(np.arange(40 * 40))
    for source, rows in enumerate(ROWS):
        mine, epochs = drawn.rows[drawn.sources == source], drawn.epochs[drawn.sources == source]
        for epoch in range(int(epochs.max())):
            assert sorted(mine[epochs == epoch].tolist()) == list(range(rows))
        assert len(set(mine[epochs == epochs.max()].tolist())) == (epochs == epochs.max()).sum()


def test_every_epoch_has_an_order_of_its_own() -> None:
    drawn = Mixture(3, ["a"], [37], [1.0], block_rows=1).draw(np.arange(3 * 37))
    orders = drawn.rows.reshape(3, 37)
    assert drawn.epochs.tolist() == [epoch for epoch in range(3) for _ in range(37)]
    assert all(sorted(order) == list(range(37)) for order in orders.tolist())
    assert len({tuple(order) for order in orders.tolist()}) == 3


def test_a_sample_depends_on_nothing_but_seed_sources_and_index() -> None:
    mixture = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40)
    whole = mixture.draw(np.arange(300))
    picked = np.array([299, 0, 40, 41, 7])
    again = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40).draw(picked)
    for name in ("sources", "rows", "epochs"):
        assert getattr(again, name).tolist() == getattr(whole, name)[picked].tolist()
    other = Mixture(4, NAMES, ROWS, WEIGHTS, block_rows=40).draw(np.arange(300))
    assert other.rows.tolist() != whole.rows.tolist()


def test_the_order_of_samples_never_changes_between_versions() -> None:
    drawn = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40).draw(np.arange(6))
    assert (drawn.sources.tolist(), drawn.rows.tolist()) == ([1, 1, 0, 0, 1, 1], [514, 995, 12, 32, 673, 346])


def test_the_first_and_the_far_index_cost_the_same_path() -> None:
    drawn = Mixture(3, NAMES, ROWS, WEIGHTS, block_rows=40).draw(np.array([10**13]))
    assert 0 <= drawn.rows[0] < ROWS[int(drawn.sources[0])]


def test_noise_is_uniform_and_keyed_by_seed_sample_and_offset() -> None:
    drawn = noise(1, 5, 20000)
    assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.var() - 1 / 12) < 0.003
    assert noise(1, 5, 100).tolist() == drawn[:100].tolist()
    assert not (noise(2, 5, 100) == drawn[:100]).any() and not (noise(1, 6, 100) == drawn[:100]).any()
    assert key(1, 2) != key(2, 1) and key("a") != key("b")


def test_sources_that_cannot_be_drawn_from_are_refused() -> None:
    with pytest.raises(DataError, match="source 'b': no full row"):
        Mixture(0, ["a", "b"], [3, 0], [0.5, 0.5], 10)
    with pytest.raises(DataError, match=r"source 'b': weight 0\.01 gives no row in a block of 10"):
        Mixture(0, ["a", "b"], [3, 3], [0.99, 0.01], 10)
    assert set(Mixture(0, ["a", "b"], [3, 3], [1.0, 0.0], 10).draw(np.arange(50)).sources.tolist()) == {0}
