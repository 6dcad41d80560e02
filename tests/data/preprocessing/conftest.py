"""A tokenizer in a folder, and inputs of every kind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from dlcm_lightning.data.tokenizer import Tokenizer
from tests.synthetic import make_texts


@pytest.fixture
def home(tokenizer: Tokenizer, tmp_path: Path) -> str:
    tokenizer.save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Two large files, many small ones, several formats, and copies of texts across them all."""
    folder = tmp_path / "inputs"
    (folder / "code").mkdir(parents=True)
    (folder / "empty").mkdir()
    english, chinese = make_texts("english", 500, seed=2), make_texts("chinese", 300, seed=3)
    lines = [json.dumps({"text": text}) for text in english]
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:150] + lines[100:130]).encode(), mtime=0))
    packed = zstandard.compress("\n".join(json.dumps({"text": text}) for text in chinese).encode())
    (folder / "c.jsonl.zstd").write_bytes(packed)
    pyarrow.parquet.write_table(pyarrow.table({"text": chinese[:100] + english[:50]}), folder / "d.parquet")
    for number in range(60):
        (folder / "code" / f"{number:03d}.py").write_text(f"x = {number % 50}\n" * 40)
    (folder / "code" / ".hidden").write_text("not me")
    return folder
