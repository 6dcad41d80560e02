"""The pipeline for webdataset yields the documents of the exact reader, over any number of nodes and workers."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from dlcm_lightning.data.pipeline import documents
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import make_texts


@pytest.fixture
def root(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    texts = [*make_texts("english", 200), *make_texts("chinese", 60), *make_texts("english", 50)]
    built = tokenize_documents(texts, tokenizer, tmp_path / "s", source="s", domain="d", validation_share=0.2,
                               shard_bytes=1500, block_tokens=120)
    assert built.train.shards.total("skipped_documents") and len(built.train.shards) > 6
    tokenizer.save(tmp_path)
    return tmp_path


def exact(root: Path, tokenizer: Tokenizer, split: str = "train") -> list[bytes]:
    return [ids.astype(np.uint16).tobytes() for ids in Source(root / "s" / split, tokenizer).documents()]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_documents_are_those_of_the_exact_reader(root: Path, tokenizer: Tokenizer, split: str) -> None:
    found = [ids.tobytes() for ids in documents(root, "s", split)]
    assert len(found) > 30 and found == exact(root, tokenizer, split)


def test_nodes_and_workers_share_them_out(root: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found: list[bytes] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for workers in (0, 2):
            loader = DataLoader(documents(root, "s"), batch_size=None, num_workers=workers)
            part = [ids.numpy().tobytes() for ids in loader]
            assert 0 < len(part) < len(exact(root, tokenizer))
        found += part
    assert sorted(found) == sorted(exact(root, tokenizer))


def test_stages_of_the_library_follow(root: Path, tokenizer: Tokenizer) -> None:
    shuffled = [ids.tobytes() for ids in documents(root, "s").compose(
        lambda data: (ids for ids in data if len(ids) > 20))]
    assert shuffled == [ids for ids in exact(root, tokenizer) if len(ids) > 40]


def test_a_remote_store_and_what_is_damaged(root: Path, tokenizer: Tokenizer) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(root / "s"), "/pipeline/s", recursive=True)
    try:
        assert [ids.tobytes() for ids in documents("memory://pipeline", "s")] == exact(root, tokenizer)
    finally:
        memory.rm("/pipeline", recursive=True)
    with pytest.raises(DataError, match="missing, so the folder holds no finished source"):
        documents(root, "t")
    path = sorted((root / "s" / "train").glob("*.tar"))[2]
    content = bytearray(path.read_bytes())
    at = content.index(b"00000001.lengths")
    content[at:at + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(DataError, match="1 blocks, the manifest states"):
        list(documents(root, "s"))
    tokenize_documents(["one"], tokenizer, root / "u", source="u", domain="d", validation_share=0.0)
    with pytest.raises(DataError, match="holds no documents"):
        documents(root, "u", "validation")
