"""Mixture: pure, exact, every row once; weights that change, sources that end."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from dlcm_lightning.data.mixture import Mixture, Part, shares
from dlcm_lightning.data.order import Order
from dlcm_lightning.errors import DataError

ROWS, WEIGHTS = {"a": 37, "b": 1000, "c": 5}, {"a": 0.25, "b": 0.7, "c": 0.05}


def mixture(weights: dict[str, float] = WEIGHTS, block_rows: int = 40, seed: int = 3, shards: int = 1,
            caps: dict[str, float] | None = None, changes: list[tuple[int, dict[str, float]]] | None = None,
            rows: dict[str, int] = ROWS) -> Mixture:
    parts = [Part(name, weight, Order(seed, name, np.arange(shards + 1) * rows[name] // shards, 2),
                  (caps or {}).get(name, 0)) for name, weight in weights.items()]
    return Mixture(seed, parts, block_rows, changes or ())


def counts(mix: Mixture, first: int, last: int) -> list[int]:
    return np.bincount(mix.draw(np.arange(first, last)).sources, minlength=len(mix.parts)).tolist()


def check_rows_once_per_epoch(mix: Mixture, samples: int) -> None:
    drawn = mix.draw(np.arange(samples))
    for source, part in enumerate(mix.parts):
        mine, epochs = drawn.rows[drawn.sources == source], drawn.epochs[drawn.sources == source]
        for epoch in range(int(epochs.max(initial=-1))):
            assert sorted(mine[epochs == epoch].tolist()) == list(range(part.order.rows))
        last = mine[epochs == epochs.max(initial=-1)].tolist()
        assert len(set(last)) == len(last)


def test_every_block_holds_every_source_in_its_exact_share() -> None:
    mix = mixture()
    for block in (0, 1, 12345):
        assert list(mix.shares(block)) == counts(mix, block * 40, (block + 1) * 40) == [10, 28, 2]


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.123, 0.456, 0.421), (0.9, 0.1, 0.0)])
@pytest.mark.parametrize("block_rows", [11, 40, 64, 1000])
def test_no_share_of_a_block_is_a_row_off(weights: tuple[float, ...], block_rows: int) -> None:
    mix = mixture(dict(zip("abc", weights, strict=True)), block_rows)
    exact = np.array(weights) / sum(weights) * block_rows
    assert sum(mix.shares(7)) == block_rows and (abs(np.array(mix.shares(7)) - exact) < 1).all()


def test_shares_follow_the_largest_remainder() -> None:
    assert shares([Fraction(5), Fraction(3), Fraction(2)], 7) == (4, 2, 1)
    assert shares([Fraction(1), Fraction(1), Fraction(1)], 8) == (3, 3, 2)
    assert shares([Fraction(1)], 5) == (5,)


@pytest.mark.parametrize("samples", [0, 1, 39, 40, 41, 555, 1600])
def test_what_was_given_is_what_was_drawn(samples: int) -> None:
    for mix in (mixture(), mixture({"a": 0.3, "b": 0.33, "c": 0.37}, caps={"c": 3}, changes=[(500, WEIGHTS)])):
        assert mix.given(samples) == (counts(mix, 0, samples) if samples else [0, 0, 0])


@pytest.mark.parametrize("shards", [1, 5])
def test_every_row_of_a_source_comes_exactly_once_per_epoch(shards: int) -> None:
    check_rows_once_per_epoch(mixture(shards=shards), 1600)


def test_a_single_source_and_one_far_smaller_than_a_block_work() -> None:
    alone = mixture({"c": 1.0}, block_rows=64)
    check_rows_once_per_epoch(alone, 640)
    assert int(alone.draw(np.arange(64)).epochs.max()) == 12
    assert set(mixture({"a": 1.0, "b": 0.0}, block_rows=10).draw(np.arange(50)).sources.tolist()) == {0}


def test_a_sample_depends_on_nothing_but_seed_sources_and_index() -> None:
    mix = mixture()
    whole = mix.draw(np.arange(300))
    picked = np.array([299, 0, 40, 41, 7])
    again = mixture().draw(picked)
    for name in ("sources", "rows", "epochs"):
        assert getattr(again, name).tolist() == getattr(whole, name)[picked].tolist()
    assert mixture(seed=4).draw(np.arange(300)).rows.tolist() != whole.rows.tolist()


def test_a_sources_order_does_not_depend_on_its_place_in_the_list() -> None:
    one, other = mixture({"a": 0.5, "b": 0.5}), mixture({"b": 0.5, "a": 0.5})
    first, second = one.draw(np.arange(200)), other.draw(np.arange(200))
    assert first.rows[first.sources == 0].tolist() != first.rows[first.sources == 1].tolist()
    assert sorted(first.rows[first.sources == 0].tolist()) == sorted(second.rows[second.sources == 1].tolist())


def test_the_order_of_samples_never_changes_between_versions() -> None:
    drawn = mixture().draw(np.arange(6))
    assert (drawn.sources.tolist(), drawn.rows.tolist()) == ([1, 1, 0, 0, 1, 1], [514, 995, 12, 32, 673, 346])


def test_the_first_and_the_far_index_cost_the_same_path() -> None:
    drawn = mixture().draw(np.array([10**13]))
    assert 0 <= drawn.rows[0] < list(ROWS.values())[int(drawn.sources[0])]


# Weights that change


@pytest.mark.parametrize(("sample", "block"), [(1, 1), (40, 1), (41, 2), (400, 10)])
def test_weights_change_at_a_block_and_no_row_is_lost_or_repeated(sample: int, block: int) -> None:
    later = {"a": 0.5, "b": 0.25, "c": 0.25}
    mix = mixture(changes=[(sample, later)])
    assert [list(mix.shares(number)) for number in (0, block - 1, block, block + 1)] == [
        [10, 28, 2], [10, 28, 2], [20, 10, 10], [20, 10, 10]]
    before, after = mixture(), mix
    assert after.draw(np.arange(block * 40)).rows.tolist() == before.draw(np.arange(block * 40)).rows.tolist()
    check_rows_once_per_epoch(mix, 1600)


def test_a_source_may_begin_and_end_with_a_change() -> None:
    mix = mixture({"a": 0.5, "b": 0.5, "c": 0.0}, changes=[(80, {"c": 1.0}), (160, {"a": 0.9, "c": 0.1})])
    assert [list(mix.shares(block)) for block in (1, 2, 3, 4)] == [[20, 20, 0], [0, 0, 40], [0, 0, 40], [36, 0, 4]]
    check_rows_once_per_epoch(mix, 800)


def test_two_changes_in_one_block_leave_the_last() -> None:
    mix = mixture(changes=[(41, {"a": 1.0}), (79, {"c": 1.0})])
    assert [list(mix.shares(block)) for block in (1, 2)] == [[10, 28, 2], [0, 0, 40]]


# Sources that end


def test_a_source_stops_at_its_epochs_to_a_row_and_the_others_share_its_weight() -> None:
    mix = mixture({"a": 0.5, "b": 0.25, "c": 0.25}, caps={"a": 2})
    # 74 rows of a, 20 a block: three blocks, and 14 in the fourth, whose other 26 go to b and c.
    assert [list(mix.shares(block)) for block in (0, 2, 3, 4, 5)] == [
        [20, 10, 10], [20, 10, 10], [14, 13, 13], [0, 20, 20], [0, 20, 20]]
    drawn = mix.draw(np.arange(4000))
    mine = drawn.sources == 0
    assert sorted(zip(drawn.epochs[mine].tolist(), drawn.rows[mine].tolist(), strict=True)) == [
        (epoch, row) for epoch in range(2) for row in range(37)]
    check_rows_once_per_epoch(mix, 4000)


def test_a_source_with_fewer_rows_than_its_share_of_a_block_is_read() -> None:
    mix = mixture({"a": 0.5, "b": 0.5}, block_rows=4096, caps={"a": 1})
    assert mix.shares(0) == (37, 4059) and mix.shares(1) == (0, 4096) and mix.given(10**6)[0] == 37
    assert mixture(caps={"a": 0.02}).given(10**6)[0] == 1, "a part of a row is a row"


def test_a_cap_may_be_a_fraction_and_holds_through_changes() -> None:
    mix = mixture({"a": 0.25, "b": 0.75}, caps={"a": 0.5}, changes=[(40, {"a": 0.2, "b": 0.8}), (800, WEIGHTS)])
    # 18 rows may be read: 10 in block 0, 8 in block 1; none is left for later.
    assert [mix.shares(block)[0] for block in range(4)] == [10, 8, 0, 0]
    assert mix.shares(25)[0] == 0
    assert mix.given(100_000)[0] == 18
    mix = mixture({"a": 0.25, "b": 0.75}, caps={"a": 0.5}, changes=[(400, {"a": 0.2, "b": 0.8})])
    assert [mix.shares(block) for block in (0, 1, 2, 10)] == [(10, 30), (8, 32), (0, 40), (0, 40)]


def test_when_all_sources_have_ended_the_error_says_so() -> None:
    mix = mixture({"a": 0.5, "c": 0.5}, caps={"a": 2, "c": 10})
    # c: 50 rows, 20 a block: two blocks and 10. Then a has 4 of its 74 left, a last block by themselves.
    assert mix.samples == 124 and [mix.shares(block) for block in (1, 2, 3)] == [(20, 20), (30, 10), (4, 0)]
    assert mix.given(124) == counts(mix, 0, 124) == [74, 50] and mix.given(122)[1] == 50
    check_rows_once_per_epoch(mix, 124)
    for sample in (124, 130, 160, 10**9):
        with pytest.raises(DataError, match=r"max_epochs times after 124 rows; raise data\.sources\[\]\.max_epochs"):
            mix.draw(np.array([3, sample]))
        with pytest.raises(DataError, match="after 124 rows"):
            mix.check_lasts(sample + 1)
    mix.check_lasts(124)


@pytest.mark.parametrize("seed", range(60))
def test_every_source_is_read_exactly_its_epochs_whatever_the_weights(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = "abcde"[:random.integers(1, 6)]
    rows = {name: int(random.integers(1, 90)) for name in names}
    caps = {name: float(round(random.uniform(1.01, 4 * rows[name]) / rows[name], 4)) for name in names}
    if seed % 3 == 0 and len(names) > 1:
        caps[names[0]] = 0.0
    weights = {name: float(random.integers(1, 20)) for name in names}
    changes = [(int(random.integers(1, 300)), {name: float(random.integers(1, 20)) for name in names})
               for _ in range(random.integers(0, 3))]
    mix = mixture(weights, int(random.choice([120, 200, 333])), seed, int(random.integers(1, 4)), caps,
                  sorted(changes, key=lambda change: change[0]), rows)
    limits = [int(Fraction(repr(caps[name])) * rows[name]) if caps[name] else None for name in names]
    endless = None in limits
    assert (mix.samples is None) == endless
    samples = 4000 if endless else sum(limit for limit in limits if limit is not None)
    if not endless:
        assert mix.samples == samples
    drawn = mix.draw(np.arange(samples))
    for source, (name, limit) in enumerate(zip(names, limits, strict=True)):
        mine = drawn.sources == source
        read = list(zip(drawn.epochs[mine].tolist(), drawn.rows[mine].tolist(), strict=True))
        assert len(set(read)) == len(read) == mix.given(samples)[source]
        if limit is not None:
            whole, rest = divmod(limit, rows[name])
            assert len(read) == limit
            assert {row for epoch, row in read if epoch < whole} == (set(range(rows[name])) if whole else set())
            assert sum(epoch == whole for epoch, _ in read) == rest
    for stretch in mix.stretches:
        size = sum(stretch.shares)
        assert sum(stretch.weights) == 1 and size <= mix.block_rows
        assert all(abs(share - weight * size) < 1
                   for share, weight in zip(stretch.shares, stretch.weights, strict=True))


def test_sources_that_cannot_be_drawn_from_are_refused() -> None:
    with pytest.raises(DataError, match="source 'b': no full row"):
        mixture({"a": 0.5, "b": 0.5}, rows={"a": 3, "b": 0})
    with pytest.raises(DataError, match=r"source 'b': weight 0\.01 gives no row in a block of 10"):
        mixture({"a": 0.99, "b": 0.01}, 10)
    with pytest.raises(DataError, match=r"source 'c': weight 0\.01 gives no row in a block of 40"):
        mixture(changes=[(100, {"a": 0.99, "c": 0.01})])
