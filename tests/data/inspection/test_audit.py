"""`dlcm data audit`: what it says of a run is what a reading of all its batches finds."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.batch import Unreadable
from dlcm_lightning.checkpoint.folder import Identity
from dlcm_lightning.cli import main
from dlcm_lightning.compose import save_config
from dlcm_lightning.config import Config, DataConfig, ModelConfig, OptimConfig, SourceConfig, WeightChange
from dlcm_lightning.data.inspection.account import find_md5, find_number, find_text
from dlcm_lightning.data.inspection.audit import Audit, open_audit
from dlcm_lightning.data.inspection.lookup import streams_of
from dlcm_lightning.data.inspection.weights import held
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.preprocessing.documents import digest
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from tests.checkpoints import leave_checkpoint
from tests.synthetic import VOCABULARY, make_texts

LENGTH, ROWS, BLOCK = 32, 8, 20
TEXTS = {"web": make_texts("english", 90, seed=1), "books": make_texts("english", 50, seed=2),
         "law": make_texts("chinese", 90, seed=1)}
CHANGES = [WeightChange(60 * LENGTH, {"web": 0.3, "books": 0.1, "law": 0.6}),
           WeightChange(700 * LENGTH + 1, {"web": 0.55, "law": 0.45})]
CASES: dict[str, dict[str, object]] = {
    "plain": {"seed": 1},
    "another seed": {"seed": 2},
    "weights that change": {"weight_changes": CHANGES},
    "a source that ends": {"caps": {"books": 1.5, "law": 2}, "seed": 5},
    "both": {"weight_changes": CHANGES, "caps": {"law": 2}},
}


@pytest.fixture(scope="module")
def root(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources in two domains, of several shards, one with copies."""
    root = tmp_path_factory.mktemp("audited")
    tokenizer.save(root)
    for name, texts in TEXTS.items():  # of `web` nine come thrice, among others: a shard of copies alone is not kept
        copies = [*texts[:9], *np.repeat(texts[:9], 2).tolist(), *texts[9:]] if name == "web" else texts
        tokenize_documents(copies, tokenizer, root / name, source=name, domain="zh" if name == "law" else "en",
                           validation_share=0.2, shard_bytes=1500, block_tokens=300)
    return root


def config_of(root: Path, runs: Path, seed: int = 3, caps: dict[str, float] | None = None,
              weight_changes: list[WeightChange] | None = None) -> Config:
    sources = [SourceConfig(name, domain, weight, (caps or {}).get(name, 0))
               for name, domain, weight in (("web", "en", 0.5), ("law", "zh", 1 / 3), ("books", "en", 1 / 6))]
    data = DataConfig(root=str(root), sequence_length=LENGTH, global_batch_size=ROWS, micro_batch_size=2,
                      block_rows=BLOCK,
                      validation_rows=3, shuffle_shards=2, sources=sources, weight_changes=weight_changes or [],
                      unreadable="mask")
    config = Config(name="mine", seed=seed, model=ModelConfig(vocab_size=VOCABULARY), data=data,
                    optim=OptimConfig(total_tokens=120 * ROWS * LENGTH, warmup_tokens=0))
    return replace(config, train=replace(config.train, output_dir=str(runs)))


def run_of(config: Config, *steps: int) -> Path:
    """The directory of a run as training leaves it, with checkpoints of these steps."""
    run = Path(config.train.output_dir) / config.name
    identity = Identity(reader_of(config).fingerprint, "float32")
    for step in steps:
        leave_checkpoint(run, step, config, identity)
    save_config(config, run / "config.yaml")
    return run


def reader_of(config: Config) -> Reader:
    return Reader(config.data, config.seed, config.model.vocab_size, verify_all=False)


@pytest.fixture(params=CASES)
def config(root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    return config_of(root, tmp_path, **CASES[request.param])  # type: ignore[arg-type]


def rows_read(config: Config, steps: int) -> dict[int, tuple[int, list[int]]]:
    """By reading every batch of three ranks: domain and tokens of every sample."""
    reader, found = reader_of(config), {}
    for step in range(steps):
        for batch in (one for rank in range(3) for one in reader.step_batches(step, rank, 3)):
            tokens = batch.tokens.reshape(-1, LENGTH).tolist()
            for place, sample in enumerate(batch.samples.tolist()):
                if sample >= 0:
                    assert sample not in found
                    found[sample] = (int(batch.domains[place]), tokens[place])
    assert sorted(found) == list(range(steps * ROWS))
    return found


@pytest.mark.parametrize("step", [0, 1, 7, 60, 120])
def test_the_account_is_what_reading_every_batch_counts(config: Config, step: int) -> None:
    audit = open_audit(run_of(config, 60), at_step=step)
    consumed = audit.consumed()
    drawn = reader_of(config).mixture.draw(np.arange(step * ROWS))
    domains = Counter(domain for domain, _ in rows_read(config, step).values())
    for number, one in enumerate(consumed):
        mine = drawn.sources == number
        assert one.rows == mine.sum()
        assert one.begun == (drawn.epochs[mine].max(initial=-1) + 1)
        assert one.epochs == Fraction(int(mine.sum()), len(set(range(audit.reader.mixture.parts[number].order.rows))))
    for domain, name in enumerate(config.data.domains):
        assert sum(one.rows for one in consumed if one.domain == name) == domains[domain]
    assert sum(one.exact for one in consumed) == step * ROWS


def test_what_the_weights_promise_is_their_sum_over_samples(config: Config) -> None:
    reader = reader_of(config)
    stretches = list(held(reader.mixture, config.data))
    audit = open_audit(run_of(config, 60), at_step=111)
    expected = [Fraction(0)] * 3
    for sample in range(111 * ROWS):
        now = [one for one in stretches if one.first_block * BLOCK <= sample][-1]
        expected = [row + weight for row, weight in zip(expected, now.weights, strict=True)]
    assert [one.exact for one in audit.consumed()] == expected
    for one in open_audit(audit.run, at_step=110).consumed():
        assert abs(one.rows - one.exact) < 110 * ROWS // BLOCK  # less than a row in every block


def test_stretches_hold_the_configured_weights_without_what_is_used_up(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path, **CASES["both"])  # type: ignore[arg-type]
    mixture = reader_of(config).mixture
    first, second, ending, ended, back = held(mixture, config.data)
    assert sum(first.weights) == 1 and [round(60 * weight, 9) for weight in first.weights] == [30, 20, 10]
    assert not first.changed and (second.first_block, second.changed) == (3, True)
    assert second.weights == (Fraction(3, 10), Fraction(6, 10), Fraction(1, 10)) and not second.used_up
    left = mixture.stretches[2].shares[1]  # in the block where law ends, the others have the rest by their weights
    assert 0 < left < 0.6 * BLOCK and ending.weights[1] == Fraction(left, BLOCK) and not ending.used_up
    assert ending.weights[0] == 3 * ending.weights[2] and sum(ending.weights) == 1
    assert ended.weights == (Fraction(3, 4), 0, Fraction(1, 4)) and ended.used_up == ("law",) and not ended.changed
    assert (ended.first_block, back.first_block, back.changed) == (ending.first_block + 1, 36, True)
    assert back.weights == (1, 0, 0) and back.used_up == ("law",), "what ended stays so where it has a weight again"
    law = mixture.parts[1]
    assert mixture.given(10**6)[1] == int(law.max_epochs * law.order.rows)


def documents_by_sample(config: Config, split: str = "train") -> dict[tuple[str, int], list[tuple[int, int, int]]]:
    """By source and document: (sample, epoch, tokens of it) of every row that holds some of it, over the budget."""
    reader = reader_of(config)
    drawn = reader.mixture.draw(np.arange(config.total_steps * ROWS))
    owners = [np.repeat(np.arange(stream.manifest.documents), [len(one) for one in stream.documents()])
              for stream in streams_of(reader, split)]
    found = defaultdict(list)
    for sample, (source, row, epoch) in enumerate(zip(*(
            one.tolist() for one in (drawn.sources, drawn.rows, drawn.epochs)), strict=True)):
        for document, tokens in Counter(owners[source][row * LENGTH:(row + 1) * LENGTH].tolist()).items():
            found[reader.sources[source].name, document].append((sample, epoch, tokens))
    return found


def test_a_document_is_found_in_exactly_the_samples_that_hold_it(config: Config) -> None:
    audit = open_audit(run_of(config, 60))
    expected = documents_by_sample(config)
    read = rows_read(config, config.total_steps)
    seen = 0
    for number, source in enumerate(audit.reader.sources):
        stream = streams_of(audit.reader, "train")[number]
        for document in range(stream.manifest.documents):
            place = find_number(audit, f"{source.name}:{document}")
            found = audit.appearances(place)
            assert [(one.sample, one.epoch, one.tokens) for one in found] == expected[source.name, document]
            ids = place.ids().tolist()
            for one in found:
                at = one.row * LENGTH - place.first
                piece = ids[max(0, at):at + LENGTH]
                assert len(piece) == one.tokens
                assert read[one.sample][1][max(0, -at):max(0, -at) + len(piece)] == piece
            seen += len(found)
    assert seen > 1500


def test_a_text_is_found_by_reading_the_rows_for_it(config: Config, tokenizer: Tokenizer) -> None:
    """Nothing of the order is used here but what comes out of the batches."""
    audit = open_audit(run_of(config, 60))
    text_of = {sample: bytes(np.array(tokens, dtype=">u2")) for sample, (_, tokens) in
               rows_read(config, config.total_steps).items()}
    several = 0
    for name in TEXTS:
        for text in TEXTS[name]:
            ids = tokenizer.encode_documents([text])[0]
            whole = bytes(ids.astype(">u2"))
            holding = [sample for sample, content in text_of.items() if whole in content]
            identity, places = find_text(audit, text.encode())
            assert identity == hashlib.md5(text.encode()).digest()
            assert sum(not place.skipped for place in places) == 1
            assert sum(place.skipped for place in places) == (2 if name == "web" and text in TEXTS[name][:9] else 0)
            if places[0].source not in streams_of(audit.reader, "train"):
                assert not holding
                continue
            found = audit.appearances(next(place for place in places if not place.skipped))
            assert [one.sample for one in found if one.tokens == len(ids)] == holding
            several += len(holding)
    assert several > 40


def test_unreadable_rows_count_once_and_only_before_the_position(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path, seed=1)
    run = run_of(config, 60)
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    damaged = sorted((copy / "law" / "train").glob("*.tar"))[1]
    content = bytearray(damaged.read_bytes())
    content[600:-1] = b"\xff" * len(content[600:-1])
    damaged.write_bytes(content)
    broken = Reader(replace(config.data, root=str(copy)), config.seed, VOCABULARY, verify_all=False)
    missed: list[Unreadable] = [row for _, row in broken.read_steps(0, 90).unreadable]
    assert len(missed) > 10 and any(row.sample >= 60 * ROWS for row in missed)
    lines = [json.dumps(asdict(row)) for row in missed]
    (run / "unreadable-00000.jsonl").write_text("\n".join([*lines[::2], *lines[:4:2]]) + "\n")
    (run / "unreadable-00001.jsonl").write_text("\n".join(lines[1::2]) + "\n" + lines[0][:20])
    audit = open_audit(run)
    expected = {row.sample for row in missed if row.sample < 60 * ROWS}
    assert set(audit.unreadable) == expected and set(audit.unreadable.values()) == {"law"}
    assert {one.name: one.unreadable for one in audit.consumed()} == {"web": 0, "law": len(expected), "books": 0}
    (run / "unreadable-00001.jsonl").write_text('{"sample": "x"}\n')
    with pytest.raises(DataError, match="no record of an unreadable row"):
        _ = open_audit(run).unreadable


def test_the_newest_checkpoint_decides_and_any_step_may_be_asked_for(root: Path, tmp_path: Path) -> None:
    config = config_of(root, tmp_path)
    run = run_of(config, 10, 30, 50)
    assert open_audit(run).step == 50 and open_audit(run).samples == 50 * ROWS
    (run / "checkpoints" / "step-00000050" / "manifest.json").write_text("{")
    assert open_audit(run).step == 30
    assert open_audit(run, at_step=120).samples == 120 * ROWS
    for step in (-1, 121):
        with pytest.raises(DataError, match=f"--at-step {step}: the run has 120 steps"):
            open_audit(run, at_step=step)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="holds no checkpoint"):
        open_audit(run)
    with pytest.raises(DataError, match="it is no run"):
        open_audit(tmp_path)


def test_other_data_than_the_runs_are_refused(root: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run = run_of(config_of(root, tmp_path), 60)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    moved = open_audit(run, [f"data.root={copy}"])
    assert [one.rows for one in moved.consumed()] == [one.rows for one in open_audit(run).consumed()]
    shutil.rmtree(copy / "law")
    tokenize_documents(TEXTS["law"][:-1], tokenizer, copy / "law", source="law", domain="zh", validation_share=0.2,
                       shard_bytes=1500, block_tokens=300)
    for overrides in ([f"data.root={copy}"], ["seed=4"], ["data.sequence_length=16"], ["data.block_rows=40"],
                      ["data.shuffle_shards=3"]):
        with pytest.raises(DataError, match=r"not those that .*step-00000060 was trained on"):
            open_audit(run, overrides)


def test_a_configuration_that_gives_another_past_is_refused_and_another_future_is_not(root: Path, tmp_path: Path
                                                                                      ) -> None:
    config = config_of(root, tmp_path)
    run = run_of(config, 60)  # 480 rows, 24 blocks
    ahead = replace(config, data=replace(config.data, weight_changes=[WeightChange(480 * LENGTH, {"law": 1.0})]))
    save_config(ahead, run / "config.yaml")
    audit = open_audit(run)
    assert audit.reader.mixture.stretches[-1].first_block == 24
    assert [one.rows for one in audit.consumed()] == audit.reader.mixture.given(480)
    past = replace(config, data=replace(config.data, weight_changes=[WeightChange(460 * LENGTH, {"law": 1.0})]))
    for other in (past, replace(config, data=replace(config.data, global_batch_size=16))):
        save_config(other, run / "config.yaml")
        with pytest.raises(DataError, match="gives other rows before step 60"):
            open_audit(run)


@pytest.fixture
def audit(root: Path, tmp_path: Path) -> Audit:
    return open_audit(run_of(config_of(root, tmp_path), 60))


def test_a_text_with_the_line_end_of_an_editor_is_found(audit: Audit) -> None:
    text = TEXTS["books"][3]
    for content in (text, text + "\n", text + "\r\n", "\ufeff" + text):
        identity, places = find_text(audit, content.encode())
        assert identity == digest(text) and len(places) == 1
    assert find_text(audit, (text + " ").encode()) == (digest(text + " "), [])
    with pytest.raises(DataError, match="not UTF-8"):
        find_text(audit, b"\xff")
    assert [place.number for place in find_md5(audit, digest(text))] == [places[0].number]


def test_the_command_says_all_of_it(audit: Audit, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(audit.run)

    def said(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["data", "audit", run, *arguments]) == code
        spoken = capsys.readouterr()
        return spoken.err if code else spoken.out

    whole = said()
    for one in audit.consumed():
        line = next(line for line in whole.splitlines() if line.startswith(f"  {one.name}"))
        assert line.split()[5:7] == [f"{one.rows * LENGTH:,d}", f"{one.rows:,d}"]
        assert float(line.split()[7]) == pytest.approx(float(one.rows - one.exact), abs=0.005)
    assert "at step 60 of 120 (newest checkpoint step-00000060)" in whole and "this position is the end of one" in whole
    assert "this position is 8 rows into one" in said("--at-step", "1")

    train = streams_of(audit.reader, "train")[0].manifest
    text = next(text for text in TEXTS["web"][:9]
                if not any("validation" in place.source.place for place in find_md5(audit, digest(text))))
    places = find_md5(audit, digest(text))
    found = audit.appearances(next(place for place in places if not place.skipped))
    (tmp_path / "text").write_text(text)
    by_file = said("--document", str(tmp_path / "text"))
    assert f"{len(places)} copies in the shards" in by_file and "left out, as a copy" in by_file
    assert by_file.count(" seen\n") == sum(one.sample < 480 for one in found) > 0
    assert by_file.count(" to come\n") == sum(one.sample >= 480 for one in found) > 0
    for one in found:
        assert f"{one.sample * LENGTH:,d}" in by_file and f"{one.sample // ROWS + 1:,d}" in by_file
    assert said("--md5", digest(text).hex()) == by_file
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert said("--document", "-") == by_file
    assert f"md5 {digest(text).hex()}" in said("--number", f"web:{places[0].number}")
    assert "never trained on; " in said("--number", "web/validation:0")
    assert "never seen" in said("--md5", "0" * 32)
    assert "write 32 hexadecimal digits" in said("--md5", "12", code=2)
    for wrong in ("web", "never:1", "web/test:1", "web:x"):
        assert "write SOURCE:N or SOURCE/validation:N" in said("--number", wrong, code=2)
    assert f"no document {train.documents}" in said("--number", f"web:{train.documents}", code=2)
    assert "cannot be read" in said("--document", str(tmp_path / "nothing"), code=2)


def test_an_unreadable_row_was_not_seen(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    place = find_number(audit, "law:5")
    sample = audit.appearances(place)[0].sample
    line = json.dumps(asdict(Unreadable(sample, "law", "gone")))
    (audit.run / "unreadable-00000.jsonl").write_text(line + "\n")
    assert main(["data", "audit", str(audit.run), "--number", "law:5"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.endswith(" unreadable"))
    assert f" {sample:,d} " in line


def test_a_shard_whose_text_is_not_what_its_md5_says_is_noticed(
    audit: Audit, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    file = sorted((copy / "books" / "train").glob("*.hashes"))[0]
    content = bytearray(file.read_bytes())
    content[:16] = bytes(16)
    file.write_bytes(content)
    assert main(["data", "audit", str(audit.run), f"data.root={copy}", "--md5", "0" * 32]) == 0
    assert "caution: its tokens decode to a text of another md5" in capsys.readouterr().out
