"""Shards: round trip, the format as others read it, and every way a shard can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.config import DataConfig
from dlcm_lightning.data.manifest import LARGEST, Manifest, build_index
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.source import read_manifest as manifest_of
from dlcm_lightning.data.store import LocalStore
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.data.verify import verify
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY, make_texts, write_split


def read_manifest(folder: Path) -> Manifest:
    return manifest_of(LocalStore(folder))


def train_texts(config: DataConfig, tokenizer: Tokenizer) -> list[str]:
    source = Source(Path(config.root) / "a" / "train", tokenizer)
    return [tokenizer.decode(ids) for ids in source.documents()]


def test_text_survives_shards(config: DataConfig, tokenizer: Tokenizer) -> None:
    written = make_texts("english", 300, seed=1)
    validation = Source(Path(config.root) / "a" / "validation", tokenizer).documents()
    kept = train_texts(config, tokenizer) + [tokenizer.decode(ids) for ids in validation]
    assert sorted(kept) == sorted(written)
    assert [text for text in written if text in set(kept)] == written


def test_any_window_equals_the_documents_end_to_end(config: DataConfig, tokenizer: Tokenizer) -> None:
    source = Source(Path(config.root) / "a" / "train", tokenizer)
    assert len(source.manifest.shards) > 1 and any(shard.blocks > 1 for shard in source.manifest.shards)
    documents = list(source.documents())
    stream = np.concatenate(documents)
    begins = np.cumsum([0, *map(len, documents)])[:-1]
    random = np.random.default_rng(0)
    for first in [0, source.tokens - 1, *random.integers(0, source.tokens - 1, 40).tolist()]:
        count = int(random.integers(1, min(3000, source.tokens - first) + 1))
        tokens, starts = source.read(first, count)
        assert tokens.tolist() == stream[first:first + count].tolist()
        assert starts.tolist() == [begin - first for begin in begins if first <= begin < first + count]
    for first, count in ((-1, 2), (0, 0), (source.tokens, 1), (0, source.tokens + 1)):
        with pytest.raises(IndexError):
            source.read(first, count)


@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_reads_the_shards(config: DataConfig, tokenizer: Tokenizer) -> None:
    folder = Path(config.root) / "a" / "train"
    tokens, lengths = [], []
    for shard in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            tokens.append(np.frombuffer(sample["tokens.u16"], dtype="<u2"))
            lengths.append(np.frombuffer(sample["lengths.u32"], dtype="<u4"))
    stream, _ = Source(folder, tokenizer).read(0, read_manifest(folder).tokens)
    assert np.concatenate(tokens).tolist() == stream.tolist()
    assert sum(map(len, lengths)) == read_manifest(folder).documents


def test_the_same_documents_give_the_same_bytes(build_corpus: Callable[[Path], DataConfig], config: DataConfig,
                                                tmp_path: Path) -> None:
    build_corpus(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for name in files:
        assert (tmp_path / name).read_bytes() == (Path(config.root) / name).read_bytes(), name


def test_the_manifest_counts_what_is_there(config: DataConfig, tokenizer: Tokenizer) -> None:
    manifest = read_manifest(Path(config.root) / "a" / "train")
    texts = train_texts(config, tokenizer)
    assert manifest.documents == len(texts)
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokens == sum(map(len, tokenizer.encode_documents(texts)))
    for shard in manifest.shards:
        assert sha256_of(Path(config.root) / "a" / "train" / shard.name) == shard.sha256


def test_nothing_pickled_is_ever_loaded(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    Reader(config, 0, VOCABULARY).step_batches(0)


@pytest.fixture
def damaged(config: DataConfig, tmp_path: Path) -> Path:
    """A copy of the corpus to damage; returns the folder of source a's training split."""
    shutil.copytree(config.root, tmp_path, dirs_exist_ok=True)
    return tmp_path / "a" / "train"


def opening(config: DataConfig, folder: Path) -> Reader:
    settings = {**config.__dict__, "root": str(folder.parent.parent)}
    return Reader(DataConfig(**settings), 0, VOCABULARY)


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    found = json.loads((folder / "manifest.json").read_text())
    change(found)
    (folder / "manifest.json").write_text(json.dumps(found))


def put(found: dict, column: str, value: object) -> None:
    """Changes what a manifest says of its first shard."""
    found["shards"][column][0] = value


def test_the_copy_is_sound_before_damage(config: DataConfig, damaged: Path) -> None:
    assert opening(config, damaged).step_batches(0)[0].tokens.shape == (128,)


def test_a_flipped_bit_names_its_shard(config: DataConfig, damaged: Path) -> None:
    content = bytearray((damaged / "000000-00001.tar").read_bytes())
    content[700] ^= 1
    (damaged / "000000-00001.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a/train/000000-00001\.tar: sha256 .* the manifest states .* rebuild"):
        opening(config, damaged)


def test_a_truncated_shard_names_itself_and_both_sizes(config: DataConfig, damaged: Path) -> None:
    content = (damaged / "000000-00000.tar").read_bytes()
    (damaged / "000000-00000.tar").write_bytes(content[:3000])
    with pytest.raises(DataError, match=rf"a/train/000000-00000\.tar: 3000 bytes, the manifest states {len(content)}"):
        opening(config, damaged)


def test_a_missing_shard_or_index_is_named(config: DataConfig, damaged: Path) -> None:
    (damaged / "000000-00001.index").rename(damaged / "kept")
    with pytest.raises(DataError, match=r"000000-00001\.tar: cannot be read .*000000-00001\.index"):
        opening(config, damaged)
    (damaged / "kept").rename(damaged / "000000-00001.index")
    (damaged / "000000-00001.tar").unlink()
    with pytest.raises(DataError, match=r"000000-00001\.tar: missing, though the manifest lists it"):
        opening(config, damaged)


def test_a_wrong_index_is_refused_before_it_is_used(config: DataConfig, damaged: Path) -> None:
    path = damaged / "000000-00000.index"
    index = build_index(damaged / "000000-00000.tar")
    assert path.read_bytes() == index.tobytes()
    for place, value in (((0, 0), 10**12), ((0, 1), 3), ((0, 2), -5), ((0, 3), 10**9), ((0, 0), 2**63 - 8),
                         ((0, 1), 2**62), ((0, 1), -2**63), ((0, 3), 2**62)):
        wrong = index.copy()
        wrong[place] = value
        path.write_bytes(wrong.tobytes())
        with pytest.raises(DataError, match=r"000000-00000\.index: does not fit"):
            opening(config, damaged)
    index[0, 0] += 2
    path.write_bytes(index.tobytes())
    with pytest.raises(DataError, match=r"000000-00000\.index: not the index of its shard"):
        opening(config, damaged)
    path.write_bytes(index.tobytes()[:-8])
    with pytest.raises(DataError, match=r"000000-00000\.index: .* rows need"):
        opening(config, damaged)


def test_a_manifest_that_disagrees_with_its_shards_is_refused(config: DataConfig, damaged: Path) -> None:
    original = (damaged / "manifest.json").read_text()
    changes: list[tuple[Callable[[dict], None], str]] = [
        (lambda found: found.update(tokens=found["tokens"] + 1), r"states tokens = \d+, its shards sum to"),
        (lambda found: [column.pop() for column in found["shards"].values()], "its shards sum to"),
        (lambda found: (put(found, "documents", found["shards"]["documents"][0] + 1),
                        found.update(documents=found["documents"] + 1)), "does not fit the shard"),
        (lambda found: put(found, "sha256", "0" * 64), "sha256"),
        (lambda found: put(found, "name", "../../evil.tar"), "must be a plain name"),
        (lambda found: put(found, "name", "/etc/evil.tar"), "must be a plain name"),
        (lambda found: put(found, "name", "..\\evil.tar"), "must be a plain name"),
        (lambda found: put(found, "name", ".evil.tar"), "must be a plain name"),
        (lambda found: put(found, "name", found["shards"]["name"][1]), "two shards have the same name"),
        (lambda found: put(found, "name", 5), "name holds what is no text"),
        (lambda found: put(found, "tokens", -5), "tokens holds what is no count"),
        (lambda found: put(found, "tokens", 1.5), "tokens holds what is no count"),
        (lambda found: put(found, "tokens", "5"), "tokens holds what is no count"),
        (lambda found: put(found, "blocks", LARGEST + 1), "blocks holds what is no count"),
        (lambda found: put(found, "size", 2**70), "not a manifest"),
        (lambda found: found["shards"]["size"].pop(), "of unequal lengths"),
        (lambda found: found["shards"].pop("size"), "shards have the columns"),
        (lambda found: found.update(shards=[]), "not a manifest"),
        (lambda found: found.update(more=1), "not a manifest"),
        (lambda found: found.update(dtype="object"), "dtype = 'object'"),
        (lambda found: found.update(dtype="uint32"), "its tokenizer has 360 ids, which are uint16"),
        (lambda found: found.update(format=99), "format 99; this version reads 2"),
        (lambda found: found.pop("tokenizer"), "not a manifest"),
        (lambda found: found.update(vocab_size=10), "states vocab_size = 10"),
    ]
    for change, message in changes:
        (damaged / "manifest.json").write_text(original)
        change_manifest(damaged, change)
        with pytest.raises(DataError, match=message):
            opening(config, damaged)
    for content in (b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (damaged / "manifest.json").write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
            opening(config, damaged)


def rewrite(damaged: Path, ids: list[int]) -> None:
    """Replaces a shard by one with other ids, sizes and sha256 made to agree: only the content is wrong."""
    shutil.rmtree(damaged)
    manifest = read_manifest(damaged.parent / "validation")
    write_split(damaged, [(np.array(ids), 5)], source="a", domain="en", tokenizer=manifest.tokenizer,
                vocab_size=60_000)
    change_manifest(damaged, lambda found: found.update(vocab_size=VOCABULARY))


def test_a_token_id_beyond_the_vocabulary_is_refused(config: DataConfig, damaged: Path, tokenizer: Tokenizer) -> None:
    rewrite(damaged, [0, *[5] * 500, 50_000, 1])
    with pytest.raises(DataError, match=r"000000-00000\.tar: token id 50000 beyond the vocabulary of 360"):
        opening(config, damaged)
    with pytest.raises(DataError, match="token id 50000"):  # also where a corpus is too large to be verified
        Source(damaged, tokenizer).read(450, 53)


def test_another_tokenizer_is_refused(config: DataConfig, damaged: Path) -> None:
    change_manifest(damaged, lambda found: found.update(tokenizer="f" * 64))
    with pytest.raises(DataError, match="made with tokenizer ffffffffffff"):
        opening(config, damaged)
    with pytest.raises(DataError, match=r"360 ids, but model\.vocab_size = 300"):
        Reader(config, 0, 300)


def test_a_source_or_domain_without_a_row_is_refused(config: DataConfig, damaged: Path) -> None:
    rewrite(damaged, [0, 5, 1])
    with pytest.raises(DataError, match=r"source 'a' .*: 3 training tokens .* fill no row of 64 \+ 1"):
        opening(config, damaged)
    shutil.copytree(Path(config.root) / "a" / "train", damaged, dirs_exist_ok=True)
    validation = damaged.parent / "validation"
    manifest = read_manifest(validation)
    shutil.rmtree(validation)
    write_split(validation, [], source="a", domain="en", split="validation", tokenizer=manifest.tokenizer)
    with pytest.raises(DataError, match="domain 'en': 0 validation tokens fill no row"):
        opening(config, damaged)


def test_a_source_that_is_not_there_is_refused(config: DataConfig, damaged: Path) -> None:
    shutil.rmtree(damaged.parent)
    with pytest.raises(DataError, match=r"a/train/manifest\.json: missing"):
        opening(config, damaged)


# Documents that are skipped


def with_duplicates(texts: list[str]) -> list[str]:
    """Repeats single texts, runs of them, and whole blocks; the first of each stays where it was."""
    repeated = []
    for place, text in enumerate(texts):
        repeated.append(text)
        if place % 7 == 3:
            repeated.append(texts[place - 3])
        if place in (60, 61, 200):
            repeated += texts[:50]
    return [*repeated, *texts[-3:]]


@pytest.fixture(scope="module")
def thinned(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Source]:
    """A source without duplicates, and one where they lie in the shards and are skipped."""
    texts = make_texts("english", 300, seed=4)
    sources = []
    for name, documents in (("plain", texts), ("skipping", with_duplicates(texts))):
        folder = tmp_path_factory.mktemp("thinned") / name
        tokenize_documents(documents, tokenizer, folder, source=name, domain="d", shard_bytes=8000, block_tokens=500)
        sources.append(Source(folder / "train", tokenizer))
    plain, skipping = sources
    assert skipping.manifest.shards.total("skipped_documents") > 100
    return plain, skipping


def test_what_is_skipped_is_not_in_the_stream(thinned: tuple[Source, Source]) -> None:
    plain, skipping = thinned
    assert skipping.tokens == plain.tokens and skipping.manifest.text_bytes == plain.manifest.text_bytes
    wanted, starts = plain.read(0, plain.tokens)
    random = np.random.default_rng(1)
    windows = [(first, 1) for first in starts[:200].tolist()]
    windows += [(int(first), int(random.integers(1, 2000))) for first in random.integers(0, plain.tokens - 1, 300)]
    for first, count in [(0, plain.tokens), *windows]:
        count = min(count, plain.tokens - first)
        tokens, found = skipping.read(first, count)
        assert tokens.tolist() == wanted[first:first + count].tolist()
        assert found.tolist() == [start - first for start in starts if first <= start < first + count]
    for number in (0, 1, 57, 250):
        mine, theirs = next(skipping.documents(number)), next(plain.documents(number))
        assert mine.tolist() == theirs.tolist()
    verify(skipping)


def test_another_list_of_skipped_documents_is_found_by_its_sum(thinned: tuple[Source, Source], tokenizer: Tokenizer,
                                                               tmp_path: Path) -> None:
    shutil.copytree(thinned[1].store.where(), tmp_path / "copy")
    found = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    number = next(number for number, digest in enumerate(found["shards"]["skip_sha256"]) if digest)
    found["shards"]["skip_sha256"][number] = "0" * 64
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(DataError, match=r"\.skip: sha256 .*, the manifest states 000000000000"):
        verify(Source(tmp_path / "copy", tokenizer))


def test_a_list_of_skipped_documents_that_does_not_fit_is_refused(thinned: tuple[Source, Source], tokenizer: Tokenizer,
                                                                  tmp_path: Path) -> None:
    folder = thinned[1].store.where()
    number = int(np.flatnonzero(thinned[1].manifest.shards.of("skipped_documents"))[0])
    name = thinned[1].manifest.shards[number].name.replace(".tar", ".skip")
    sound = np.frombuffer((Path(folder) / name).read_bytes(), "<i8").reshape(-1, 4)
    for place, value in (((0, 0), 10**6), ((0, 1), sound[0, 1] + 1), ((0, 2), sound[0, 2] + 1), ((0, 3), 1),
                         ((0, 3), 2**62), ((0, 0), -1)):
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        wrong = sound.copy()
        wrong[place] = value
        (tmp_path / "copy" / name).write_bytes(wrong.tobytes())
        source = Source(tmp_path / "copy", tokenizer)
        with pytest.raises(DataError, match=r"\.skip|skipped documents"):
            source.read(0, source.tokens)
        with pytest.raises(DataError, match=r"\.skip|skipped documents"):
            verify(source)
