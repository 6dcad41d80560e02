"""`dlcm data verify`: every kind of damage in every kind of file, all of it at once, and files nobody lists."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import fsspec
import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig, ModelConfig, OptimConfig, SourceConfig
from dlcm_lightning.data.inspection.inventory import Found, verify_folder, verify_run
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY, make_texts


@pytest.fixture(scope="module")
def pristine(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of several shards, one with copies."""
    root = tmp_path_factory.mktemp("pristine")
    tokenizer.save(root)
    texts = make_texts("english", 120)
    for name, found in (("web", [*texts, *texts[:30]]), ("law", make_texts("chinese", 90))):
        tokenize_documents(found, tokenizer, root / name, source=name, domain="en", validation_share=0.2,
                           shard_bytes=2000, block_tokens=300, about={"licence": "CC BY"})
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "root")
    return tmp_path / "root"


def verified(place: Path, workers: int = 2) -> tuple[Found, list[str]]:
    said: list[str] = []
    return verify_folder(str(place), workers, said.append), said


def flip(file: Path, at: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


def run_of(root: Path, *names: str) -> Config:
    sources = [SourceConfig(name, "en", 1 / len(names)) for name in names]
    return Config(name="mine", model=ModelConfig(vocab_size=VOCABULARY),
                  data=DataConfig(root=str(root), sequence_length=64, sources=sources),
                  optim=OptimConfig(total_tokens=64, warmup_tokens=0))


def test_a_sound_corpus_is_whole_and_everything_was_looked_at(pristine: Path) -> None:
    shards = list(pristine.glob("*/*/*.tar"))
    assert len(shards) > 10 and {shard.parent.name for shard in shards} == {"train", "validation"}
    for workers in (1, 5):
        found, said = verified(pristine, workers)
        assert not said
        assert found == Found(sources=2, shards=len(shards), bytes=sum(one.stat().st_size for one in shards))
    one, said = verified(pristine / "web")
    assert one.shards == len(list(pristine.glob("web/*/*.tar"))) and one.sources == 1 and not said
    assert verify_run(run_of(pristine, "law"), 1, said.append).shards == found.shards - one.shards and not said


def test_a_flipped_bit_is_found_wherever_it_is_in_a_shard_its_index_or_its_skips(root: Path) -> None:
    random.seed(1)
    for pattern in ("web/train/*.tar", "web/train/*.index", "web/train/*.skip", "law/validation/*.tar"):
        files = sorted(root.glob(pattern))
        assert files, pattern
        for _ in range(12):
            file = random.choice(files)
            at = random.randrange(file.stat().st_size), random.randrange(8)
            flip(file, *at)
            found, said = verified(root)
            assert found.damaged == 1 and len(said) == 1, (file, at)
            assert said[0].startswith("damaged: ") and file.stem in said[0] and "rebuild" in said[0]
            flip(file, *at)
    assert not verified(root)[1]


def test_a_flipped_bit_of_a_manifest_is_said_unless_only_readers_read_it(root: Path) -> None:
    random.seed(2)
    file = root / "web" / "train" / "manifest.json"
    content = file.read_bytes()
    for_readers = [range(content.index(key), content.index(b"\n", content.index(key) + 12))
                   for key in (b'"domain"', b'"licence"')]
    places = [place for place in range(len(content)) if not any(place in those for those in for_readers)]
    silent = []
    for place in random.sample(places, 200):
        flip(file, place)
        if not verified(root / "web", 1)[1]:
            silent.append(content[place - 20:place + 20])
        file.write_bytes(content)
    assert not silent


def test_all_damages_are_named_not_only_the_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = sorted((root / "web" / "train").glob("*.tar"))
    flip(train[0], 700)
    train[1].unlink()
    train[2].with_suffix(".index").unlink()
    train[3].with_suffix(".hashes").unlink()
    train[4].write_bytes(train[4].read_bytes()[:-512])
    (root / "web" / "validation" / "manifest.json").write_text("{")
    flip(sorted((root / "law" / "train").glob("*.tar"))[-1], 700)
    found, said = verified(root)
    assert found.damaged == len(said) == 7
    for place, expected in ((train[0], "sha256"), (train[1], "missing"), (train[4], "bytes, the manifest states"),
                            (train[2].with_suffix(".index"), "No such file"),
                            (train[3].with_suffix(".hashes"), "missing"),
                            (root / "web" / "validation" / "manifest.json", "not a manifest"),
                            (root / "law" / "train", "sha256")):
        assert any(str(place) in line and expected in line and line.startswith("damaged: ") for line in said), place
    save_config(run_of(root, "law", "web"), root / "run.yaml")
    for arguments in ([str(root)], [str(root / "run.yaml"), "--workers", "3"]):
        assert main(["data", "verify", *arguments]) == 2
        spoken = capsys.readouterr()
        assert sorted(spoken.out.splitlines()) == sorted(said)
        assert spoken.err.startswith("dlcm: 7 damages in ") and "of 2 sources" in spoken.err


def test_files_that_nobody_lists_are_said_and_do_no_harm(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web = root / "web"
    shutil.copy(next((web / "train").glob("*.tar")), web / "train" / "999999-00000.tar")
    without = next(one for one in (web / "train").glob("*.tar") if not one.with_suffix(".skip").exists())
    without.with_suffix(".skip").write_bytes(b"")
    (web / "README").touch()
    (root / ".books.unfinished").mkdir()
    (web / "validation" / "evil\x1b[2J").touch()
    found, said = verified(root)
    assert not found.damaged and len(said) == 4 and all(line.startswith("note: ") for line in said)
    text = "\n".join(said)
    assert f"999999-00000.tar, {without.stem}.skip belong to no manifest" in text.replace(
        f"{without.stem}.skip, 999999-00000.tar", f"999999-00000.tar, {without.stem}.skip")
    assert "README belongs to no manifest" in text and ".books.unfinished: a build that is not finished" in text
    assert "evil\\x1b[2J" in text and "\x1b" not in text
    assert main(["data", "verify", str(root)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all whole: ")


def test_a_renamed_source_is_said(root: Path) -> None:
    (root / "web").rename(root / "books")
    found, said = verified(root)
    assert not found.damaged and len(said) == 2 and all("its manifest is that of 'web'" in line for line in said)


def test_a_source_that_is_missing_is_a_damage_and_no_source_at_all_an_error(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert verify_run(run_of(root, "web", "never"), 1, said.append).damaged == 2
    assert all("never" in line and "holds no finished source" in line for line in said)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no source; name a data\.root"):
        verified(tmp_path / "empty")
    assert main(["data", "verify", str(tmp_path / "empty")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["data", "verify", str(root), "--workers", "-1"])
    assert main(["data", "verify", str(root), "seed=1"]) == 2


def test_a_corpus_behind_an_address_is_verified_too(root: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(root), "/verified", recursive=True)
    try:
        said: list[str] = []
        assert verify_folder("memory://verified", 2, said.append) == verified(root)[0] and not said
        system.pipe_file("/verified/web/train/extra.tar", b"x")
        system.rm_file(next(one for one in system.ls("/verified/law/train", detail=False) if one.endswith(".hashes")))
        assert verify_folder("memory://verified", 2, said.append).damaged == 1
        assert len(said) == 2 and "extra.tar belongs" in said[0] and ".hashes: missing" in said[1]
    finally:
        system.rm("/verified", recursive=True)
