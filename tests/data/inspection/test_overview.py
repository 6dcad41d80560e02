"""`dlcm data inspect`: exact epochs, the points where weights change, documents that cannot drive the terminal."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig, ModelConfig, OptimConfig, SourceConfig, WeightChange
from dlcm_lightning.data.inspection.overview import documents, open_run, overview, plan
from dlcm_lightning.data.manifest import Shards, parse_manifest, write_manifest
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.synthetic import VOCABULARY, make_texts

HOSTILE = "quiet\x1b[2J\x1b]0;owned\x07\u202etxt\x9b31m\n| all whole\r\tthe end"
LENGTH, ROWS, BLOCK = 32, 8, 20
CHANGE = WeightChange(100 * LENGTH, {"web": 0.25, "law": 0.5, "books": 0.25})


@pytest.fixture(scope="module")
def root(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    tokenizer.save(root)
    english = make_texts("english", 80, seed=3)
    for name, texts, licence in (("web", [*english[:60], *english[:20]], "CC BY\x1b[31m 4.0"),
                                 ("books", english[50:], ""),
                                 ("law", [HOSTILE, *make_texts("chinese", 60)], "公有领域")):
        tokenize_documents(texts, tokenizer, root / name, source=name, domain="zh" if name == "law" else "en",
                           validation_share=0.2, shard_bytes=1500, block_tokens=300,
                           about={"licence": licence} if licence else {})
    return root


def config_of(root: Path, *changes: WeightChange, tokens: int = 100 * ROWS * LENGTH, **caps: float) -> Config:
    sources = [SourceConfig(name, domain, weight, caps.get(name, 0))
               for name, domain, weight in (("web", "en", 0.5), ("law", "zh", 0.3), ("books", "en", 0.2))]
    return Config(name="mine", seed=4, model=ModelConfig(vocab_size=VOCABULARY),
                  data=DataConfig(root=str(root), sequence_length=LENGTH, global_batch_size=ROWS, block_rows=BLOCK,
                                  sources=sources, shuffle_shards=2, weight_changes=list(changes)),
                  optim=OptimConfig(total_tokens=tokens, warmup_tokens=0))


@pytest.mark.parametrize("tokens", [1, 7 * ROWS * LENGTH, 100 * ROWS * LENGTH, 100 * ROWS * LENGTH + 1])
@pytest.mark.parametrize("caps", [{}, {"books": 1.5}, {"books": 1, "law": 2}])
@pytest.mark.parametrize("changes", [[], [CHANGE]])
def test_epochs_are_those_that_drawing_every_sample_counts(
    root: Path, tokens: int, caps: dict[str, float], changes: list[WeightChange]
) -> None:
    config = config_of(root, *changes, tokens=tokens, **caps)
    reader = open_run(config)
    drawn = reader.mixture.draw(np.arange(config.total_steps * ROWS))
    for number, one in enumerate(plan(config, reader)):
        rows = drawn.rows[drawn.sources == number]
        assert one.rows == len(rows)
        assert one.epochs == Fraction(len(rows), (reader.training_stream("en") + reader.training_stream("zh"))[
            ("web", "books", "law").index(one.name)].rows(LENGTH))
        assert one.epochs <= caps.get(one.name, 10**9)


def test_the_tree_states_weights_counts_epochs_and_licences(root: Path) -> None:
    config = config_of(root, books=2)
    reader = open_run(config)
    lines = list(overview(config, reader))
    cells = {line.split()[0]: line.split() for line in lines[2:] if line}
    for one in plan(config, reader):
        manifest = parse_manifest((root / one.name / "train" / "manifest.json").read_bytes(), "")
        found = cells[one.name]
        assert found[1] == f"{100 * float(one.weight):.2f}"
        assert found[3] == f"{100 * one.rows / 800:.2f}"
        assert found[5:10] == [
            f"{manifest.tokens:,d}", str(manifest.documents), f"{manifest.tokens / manifest.documents:.0f}",
            f"{manifest.text_bytes / manifest.tokens:.2f}", str(len(manifest.shards))]
        assert f"{float(one.epochs):.3f}" in found
    shards = parse_manifest((root / "web" / "train" / "manifest.json").read_bytes(), "").shards
    skipped = shards.total("skipped_documents")
    assert skipped and cells["web"][10] == str(skipped)
    web, law, books = (next(line for line in lines if line.startswith(f"  {name}"))
                       for name in ("web", "law", "books"))
    assert web.endswith("CC BY\\x1b[31m 4.0") and law.endswith("公有领域") and books.split()[-1] == "2"
    assert lines.index(books) == lines.index(web) + 1 and cells["en"][1] == "70.00" and cells["all"][1] == "100.00"
    assert cells["law"][1:5] == cells["zh"][1:5] and cells["law"][1] == "30.00"


def test_points_where_weights_change_are_named_with_their_reason(root: Path) -> None:
    config = config_of(root, CHANGE, books=1)
    reader = open_run(config)
    said = [line for line in overview(config, reader) if line.startswith("from ")]
    stretches = [one for one in reader.mixture.stretches if one.first_block * BLOCK < 800]
    assert len(said) == len(stretches) - 2 == 2, "the block in which books ends is none of its own"
    assert said[0] == (f"from {100 * LENGTH:,d} tokens, step 13 (data.weight_changes): web 25.00 %, law 50.00 %, "
                       "books 25.00 %")
    tokens = stretches[3].first_block * BLOCK * LENGTH
    step = stretches[3].first_block * BLOCK // ROWS + 1
    assert said[1].startswith(f"from {tokens:,d} tokens, step {step} (books has ")
    assert said[1].endswith("been read max_epochs times): web 33.33 %, law 66.67 %")


def test_a_budget_that_outlasts_the_data_is_said_with_the_remedy(root: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(root, web=1, law=1, books=1)
    reader = open_run(config)
    rows = reader.mixture.samples or 0
    assert rows == sum(part.order.rows for part in reader.mixture.parts)
    assert 0 < rows < 800 and sum(one.rows for one in plan(config, reader)) == rows
    steps = rows // ROWS
    save_config(config, tmp_path / "run.yaml")
    assert main(["data", "inspect", str(tmp_path / "run.yaml")]) == 2
    spoken = capsys.readouterr()
    assert f"after {rows * LENGTH:,d} tokens, {steps:,d} whole steps" in spoken.out
    assert f"set optim.total_tokens to {steps * ROWS * LENGTH} or less" in spoken.out
    assert "document 0 of " in spoken.out and "max_epochs times" in spoken.err
    assert main(["data", "inspect", str(tmp_path / "run.yaml"), "--documents", "0",
                 f"optim.total_tokens={steps * ROWS * LENGTH}"]) == 0
    spoken = capsys.readouterr()
    assert "The data end" not in spoken.out and "document 0" not in spoken.out
    assert main(["data", "inspect", str(tmp_path / "run.yaml"),
                 f"optim.total_tokens={(steps + 1) * ROWS * LENGTH}"]) == 2


def test_documents_cannot_drive_the_terminal_nor_pass_for_output(root: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    save_config(config_of(root), tmp_path / "run.yaml")
    assert main(["data", "inspect", str(tmp_path / "run.yaml"), "--documents", "3", "--characters", "50"]) == 0
    said = capsys.readouterr().out
    assert all(one.isprintable() or one in "\n" for one in said)
    lines = said.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("law, document 0 of "))
    assert lines[at + 1] == "  | quiet\\x1b[2J\\x1b]0;owned\\x07\\u202etxt\\x9b31m"
    assert lines[at + 2].startswith("  | | all whole\\r ") and lines[at + 2].endswith("the end")
    assert sum(line.startswith(f"{name}, document ") for line in lines for name in ("web", "law", "books")) == 9
    beginning = next(line for line in lines if line.startswith("web, document 0 of "))
    text = make_texts("english", 80, seed=3)
    shown = lines[lines.index(beginning) + 1].removeprefix("  | ")
    assert len(shown) == 50 and any(one.startswith(shown) for one in text)
    assert lines[lines.index(beginning) + 2] == "  | …"


def test_long_lines_are_folded_and_long_documents_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    tokenize_documents(["\n".join(["cat " * 100] * 40), *make_texts("english", 50)], tokenizer, tmp_path / "web",
                       source="web", domain="en", validation_share=0.2)
    config = config_of(tmp_path)
    config = replace(config, data=replace(config.data, sources=[SourceConfig("web", "en", 1.0)]))
    lines = list(documents(open_run(config), 1, 5000))
    assert len(lines) == 2 + 12 + 1 and lines[-1] == "  | …" and max(map(len, lines)) <= 120
    assert "".join(line[4:] for line in lines[2:6]).startswith("cat cat")


def test_a_sample_corpus_is_inspected_and_what_it_lacks_is_said(root: Path, tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    config = replace(config, data=replace(config.data, corpus="sample", tokenizer="bpe"))
    save_config(config, tmp_path / "run.yaml")
    assert main(["data", "inspect", str(tmp_path / "run.yaml")]) == 2
    assert "the sample corpus is not there yet; `dlcm prepare`" in capsys.readouterr().err
    shutil.copytree(root, tmp_path / f"bpe-{VOCABULARY}")
    shutil.rmtree(tmp_path / f"bpe-{VOCABULARY}" / "books")
    assert main(["data", "inspect", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "the sample corpus lacks books" in said and "  web   62.50 %" in said
    assert main(["data", "verify", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "the sample corpus lacks books" in said and "of 2 sources" in said


def test_a_hundred_thousand_shards_are_inspected_in_seconds(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    folder = tmp_path / "root" / "web" / "train"
    manifest = parse_manifest((folder / "manifest.json").read_bytes(), "")
    first = manifest.shards[0]
    many = Shards.from_entries(replace(first, name=f"{number:06d}-00000.tar") for number in range(100_000))
    totals = {name: many.total(name) for name in ("documents", "tokens", "text_bytes")}
    write_manifest(folder, replace(manifest, shards=many, **totals))
    config = config_of(tmp_path / "root", CHANGE, tokens=10**12, books=3)
    began = time.perf_counter()
    lines = list(overview(config, open_run(config)))
    assert time.perf_counter() - began < 5  # 0.5 s on an idle core
    assert any("100,000" in line for line in lines)


def test_what_the_reader_refuses_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        open_run(config_of(root / "nowhere"))
