"""Documents found again: every one that was ever written, the copies too, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dlcm_lightning.data.inspection.lookup import at_number, hashes, with_md5
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.preprocessing.documents import digest
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import make_texts

TEXTS = make_texts("english", 120, seed=4)
COPIES = [*TEXTS[:50], *TEXTS[10:20], *TEXTS[50:], TEXTS[0], *TEXTS[115:]]
"""The texts as they are written; each after its first is a copy, some in the shard of the first and some not."""


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts of COPIES as a source in several shards of several blocks."""
    root = tmp_path_factory.mktemp("lookup")
    tokenizer.save(root)
    tokenize_documents(COPIES, tokenizer, root / "web", source="web", domain="en", validation_share=0.0,
                       shard_bytes=3000, block_tokens=200)
    return root / "web" / "train"


@pytest.fixture
def source(folder: Path, tokenizer: Tokenizer) -> Source:
    return Source(folder, tokenizer)


def test_the_corpus_has_what_these_tests_need(source: Source) -> None:
    shards = source.manifest.shards
    assert len(shards) >= 4 and max(shards.of("blocks")) > 1
    assert sum(count > 0 for count in shards.of("skipped_documents").tolist()) >= 2


def test_every_document_is_found_by_its_md5_with_all_its_copies(source: Source, tokenizer: Tokenizer) -> None:
    ids = list(source.documents())
    for number, text in enumerate(TEXTS):
        first, *others = with_md5(source, digest(text))
        assert not first.skipped and first.number == number
        assert first.ids().tolist() == ids[number].tolist() and tokenizer.decode(first.ids()) == text
        assert first.tokens == len(ids[number]) and first.first == sum(len(before) for before in ids[:number])
        assert all(other.skipped and other.tokens == first.tokens for other in others)
        assert 1 + len(others) == COPIES.count(text)
    assert not list(with_md5(source, digest("never written")))


def test_every_document_is_found_by_its_number(source: Source, tokenizer: Tokenizer) -> None:
    for number, text in enumerate(TEXTS):
        place = at_number(source, number)
        assert place.number == number and not place.skipped and tokenizer.decode(place.ids()) == text
    for number in (-1, len(TEXTS)):
        with pytest.raises(DataError, match=f"no document {number}; its stream has 120"):
            at_number(source, number)


def test_progress_is_told_of_every_byte_of_hashes(source: Source) -> None:
    told: list[int] = []
    assert not list(with_md5(source, bytes(16), told.append))
    assert sum(told) == 16 * len(COPIES)


def test_hashes_that_are_missing_or_cut_short_are_named(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(folder.parents[1], tmp_path / "copy")
    damaged = tmp_path / "copy" / "web" / "train"
    source = Source(damaged, tokenizer)
    name = damaged / source.manifest.shards.texts("name")[1].replace(".tar", ".hashes")
    name.write_bytes(name.read_bytes()[:-16])
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes, \d+ documents need"):
        hashes(source, 1)
    name.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        list(with_md5(source, bytes(16)))
