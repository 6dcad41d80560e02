"""What a table may not be, each refused with the column, the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.law.synthetic import ladder
from dlcm_lightning.scaling.law.table import read_table, rungs_of, runs_of, sizes_of

TABLE = ladder(points=4)


def changed(column: str, value: object, row: int = 5) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        table = table.astype({column: object})
        table.loc[row, column] = value
        return table
    return change


REFUSED: list[tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = [
    (lambda table: table.drop(columns="R"), "no column R; needed are run"),
    (lambda table: table.iloc[:0], "has no rows"),
    (changed("loss", np.nan), "loss = nan of run dlcm-87m-p30-r4-s0 in row 6"),
    (changed("loss", "spiked"), "loss = spiked"),
    (changed("loss", -1.0), "loss = -1.0"),
    (changed("loss", np.inf), "loss = inf"),
    (changed("tokens", 0), "tokens = 0"),
    (changed("P", 30), "P = 30 .* a share between 0 and 1"),
    (changed("kind", "moe"), "kind = 'moe'; write dlcm or dense"),
    (changed("phase", "cooldown"), "phase = 'cooldown'; write stable or decayed"),
    (changed("N", 88e6), "has N = .* give two runs two names"),
    (lambda table: pd.concat([table, table.iloc[[7]]]), "two stable rows at tokens"),
    (lambda table: table[(table["run"] != "dlcm-87m-p30-r2-s0") | (table["tokens"] > 1e9)], "has 2 stable rows"),
]


@pytest.mark.parametrize("change, words", REFUSED, ids=[words[:20] for _, words in REFUSED])
def test_unusable_table_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        runs_of(change(TABLE.copy()), 0.05)


def test_run_whose_ratio_is_off_target_is_refused_unless_the_bound_is_wider() -> None:
    table = TABLE.copy()
    table.loc[table["run"] == "dlcm-87m-p50-r8-s0", "R"] = 6.5
    with pytest.raises(ConfigError, match=r"R = 6.5 of run dlcm-87m-p50-r8-s0 misses its target 8 by 18.8 %.*off-t"):
        runs_of(table, 0.05)
    run = next(run for run in runs_of(table, 0.2) if run.name == "dlcm-87m-p50-r8-s0")
    assert run.R == 6.5 and run.R_target == 8


def test_order_of_rows_does_not_matter() -> None:
    for one, other in zip(runs_of(TABLE, 0.05), runs_of(TABLE.sample(frac=1, random_state=3), 0.05), strict=True):
        assert one.name == other.name and (one.tokens == other.tokens).all() and (one.loss == other.loss).all()
        assert one.decayed == other.decayed


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_csv_and_parquet_are_read_alike(tmp_path: Path, suffix: str) -> None:
    table = TABLE.copy()
    table.loc[table["kind"] == "dense", ["P", "R_target", "R"]] = np.nan  # dense rows leave them empty
    file = tmp_path / f"ladder.{suffix}"
    table.to_csv(file, index=False) if suffix == "csv" else table.to_parquet(file)
    runs = read_table(file, 0.05)
    assert len(runs) == 40 and [run.R for run in runs if run.kind == "dense"] == [1.0] * 4


def test_a_file_that_is_missing_or_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_table(tmp_path / "ladder.csv", 0.05)
    (tmp_path / "ladder.parquet").write_text("run,kind")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        read_table(tmp_path / "ladder.parquet", 0.05)


def test_sizes_and_rungs_are_told_apart() -> None:
    runs = [run for run in runs_of(ladder(points=4, seeds=2), 0.05) if run.kind == "dlcm"]
    assert [len(size) for size in sizes_of(runs)] == [18] * 4
    assert [len(rung) for rung in rungs_of(runs).values()] == [2] * 36
