"""The table of a study as parquet, by pandas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.scaling.ladder.table_file import columns_of


def write_parquet(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Whole or not at all."""
    table = pd.DataFrame(list(rows), columns=columns_of(rows))
    write_atomically(file, table.to_parquet(index=False))
