"""What can be asked, of which models, and what is refused with which words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlcm_lightning.compose import save_config
from dlcm_lightning.config import BoundaryConfig, DataConfig
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.tokenizer import train_bpe
from dlcm_lightning.errors import CheckpointError, ConfigError, DataError
from dlcm_lightning.evaluation.analysis import analyze
from dlcm_lightning.export.portable import open_trained
from dlcm_lightning.run_directory import finished
from dlcm_lightning.training.evaluate import evaluate
from tests.evaluation.analysis.conftest import Analysed, analysed, quiet
from tests.synthetic import make_texts


def test_it_leaves_page_numbers_and_events_in_the_run(report: Analysed, run: Path) -> None:
    assert report.file == run / "analysis-00000009.html"
    assert (run / "analysis-00000009.json").is_file() and list((run / "analysis-00000009").iterdir())
    about = report.found["run"]
    assert (about["name"], about["step"], about["kind"]) == ("segmented", 9, "dlcm")
    assert about["parameters"] == sum(one.numel() for name, one in open_trained(run).state.items()
                                      if not name.startswith("boundary.") or name.endswith("weight"))
    assert report.found["against"]["kind"] == "dense" and 0 < about["threshold"] < 1
    assert "NaN" not in report.file.with_suffix(".json").read_text()


def test_the_same_model_on_the_same_rows_gives_the_same_files(report: Analysed, run: Path, dense_run: Path,
                                                              tmp_path: Path) -> None:
    again = analysed(analyze(run, against=dense_run, out=tmp_path / "again.html", log=quiet))
    assert again.page == report.page and again.found == report.found


def test_the_events_are_the_numbers_of_the_json(report: Analysed) -> None:
    events = EventAccumulator(str(report.file.with_suffix("")), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(one.step, one.value) for one in events.Scalars(tag)]

    for name in ("loss", "difference"):
        assert curve(f"analysis_position_in_concept/{name}") == [
            (one["position"], pytest.approx(one[name], rel=1e-6))
            for one in report.found["loss_by_position"]["positions"]]
    assert curve("analysis_tokens_seen/bits_per_byte") == [
        (one["from"], pytest.approx(one["bits_per_byte"], rel=1e-6))
        for one in report.found["bits_per_byte"]["by_tokens_seen"] if one["bits_per_byte"] is not None]
    assert len(curve("analysis_flops/decode_R_4")) == 8
    assert [step for step, _ in curve("analysis_stability/f1")] == [3, 6]
    counts = report.found["concept_lengths"]["domains"]["en"]["counts"]
    (histogram,) = events.Histograms("analysis_concept_length/en")
    assert histogram.histogram_value.bucket == [float(one) for one in counts]
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| casual English | " in texts["analysis/content_types/text_summary"]
    assert "\N{BOX DRAWINGS LIGHT VERTICAL}" in texts["analysis_concepts/zh/text_summary"]


def test_a_second_report_replaces_the_events_of_the_first(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        analyze(run, out=tmp_path / "one.html", rows=1, log=quiet)
    assert len(list((tmp_path / "one").glob("events.out.tfevents.*"))) == 1


def test_a_dense_model_gets_the_parts_that_it_has(dense_run: Path, run: Path, tmp_path: Path) -> None:
    found = analysed(analyze(dense_run, against=run, out=tmp_path / "dense.html", log=quiet))
    for name in ("content_types", "loss_by_position", "ratio_history", "concept_lengths", "alignment", "stability"):
        assert "a dense model does not cut texts into concepts" in found.found[name]["absent"]
    assert found.page.count("a dense model does not cut texts into concepts") == 6
    assert "threshold" not in found.found["run"] and "own" not in found.found["compute"]
    stated = evaluate(dense_run, None, [], quiet)
    assert found.found["bits_per_byte"]["all"]["bits_per_byte"] == pytest.approx(stated["bits_per_byte"], rel=1e-9)
    token = found.found["documents"]["domains"]["en"][0]["cells"][1]["tokens"][0]
    assert token["p"] is token["length"] is token["boundary"] is None and token["loss"] > 0


def test_an_export_says_the_same_and_what_it_lacks(exported: Path, report: Analysed) -> None:
    found = analysed(analyze(exported, log=quiet))
    assert found.file == exported / "analysis-00000009.html"
    assert "carries no metrics" in found.found["ratio_history"]["absent"]
    assert "an export is one model" in found.found["stability"]["absent"]
    for name in ("concept_lengths", "alignment", "content_types", "documents"):
        assert found.found[name] == report.found[name]
    assert found.found["bits_per_byte"]["all"]["bits_per_byte"] == report.found["bits_per_byte"]["all"]["bits_per_byte"]
    open_trained(exported)  # is still whole


@pytest.mark.parametrize("form", ["fixed", "rule"])
def test_forms_without_parameters_have_no_threshold(train: Callable[..., Path], form: str, tmp_path: Path) -> None:
    place = train(form, boundary=BoundaryConfig(form=form, rule_threshold=0.9))
    found = analysed(analyze(place, out=tmp_path / "page.html", rows=2, documents=1, log=quiet)).found
    assert found["run"]["threshold"] is None
    assert {one["rows"] for one in [found["rows"]]} == {4}
    if form == "fixed":
        assert {one["agreement"] for one in found["stability"]["checkpoints"]} == {1.0}
        assert found["concept_lengths"]["all"]["tenth"] == found["concept_lengths"]["all"]["ninetieth"] == 4


def test_an_older_step_is_looked_at_and_compared_with_the_newest(run: Path, tmp_path: Path) -> None:
    found = analysed(analyze(run, step=6, out=tmp_path / "older.html", documents=0, log=quiet)).found
    assert found["run"]["step"] == 6 and found["stability"]["newest"] == 9
    assert found["documents"]["domains"] == {"en": [], "zh": []}
    stated = evaluate(run, 6, [], quiet)
    assert found["bits_per_byte"]["all"]["bits_per_byte"] == pytest.approx(stated["bits_per_byte"], rel=1e-9)


def test_rows_are_those_of_evaluate_with_as_many(run: Path, tmp_path: Path) -> None:
    found = analysed(analyze(run, rows=2, out=tmp_path / "few.html", log=quiet)).found
    stated = evaluate(run, None, ["data.validation_rows=2"], quiet)
    assert found["rows"]["rows"] == 4
    assert found["bits_per_byte"]["all"]["bits_per_byte"] == pytest.approx(stated["bits_per_byte"], rel=1e-9)


def test_a_damaged_checkpoint_among_the_kept_ones_is_named_and_left_out(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for state in finished(copied, 6).glob("state-*"):
        state.write_bytes(b"x" + state.read_bytes()[1:])
    found = analysed(analyze(copied, rows=1, log=quiet))
    assert [one["step"] for one in found.found["stability"]["checkpoints"]] == [3]
    (skipped,) = found.found["stability"]["skipped"]
    assert skipped["step"] == 6 and "is damaged" in skipped["reason"] and "Step 6 is left out" in found.page


def corpus_of_another_tokenizer(config: DataConfig, folder: Path) -> Path:
    """The same sources and domains in other ids."""
    other = train_bpe(make_texts("english", 200, seed=9), 300)
    other.save(folder)
    for source in config.sources:
        tokenize_documents(make_texts("english", 200), other, folder / source.name, source=source.name,
                           domain=source.domain, validation_share=0.2, shard_bytes=8000, block_tokens=500)
    return folder


def test_another_tokenizer_is_refused_and_nothing_is_written(train: Callable[..., Path], run: Path, config: DataConfig,
                                                             tmp_path: Path) -> None:
    other = train("other_ids", root=str(corpus_of_another_tokenizer(config, tmp_path / "data")))
    with pytest.raises(ConfigError, match=r"--against .*other_ids.* is not that of .*compare runs that share a token"):
        analyze(run, against=other, out=tmp_path / "page.html", log=quiet)
    assert not list(tmp_path.glob("page*"))


def moved(run: Path, tmp_path: Path, **data: Any) -> Path:
    """An export of the run whose configuration names other data."""
    place = tmp_path / "moved"
    shutil.copytree(run, place)
    config = open_trained(place).config
    save_config(replace(config, data=replace(config.data, **data)), place / "config.yaml")
    about = json.loads((place / "portable.json").read_text())
    about["files"].pop("config.yaml")
    (place / "portable.json").write_text(json.dumps(about))
    return place


def test_data_that_are_gone_are_named_with_the_remedy(exported: Path, config: DataConfig, tmp_path: Path) -> None:
    place = moved(exported, tmp_path, root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"validation rows cannot be read: .*nowhere.*give data.root=\.\.\."):
        analyze(place, log=quiet)
    analyze(place, overrides=[f"data.root={config.root}"], rows=1, log=quiet)  # the remedy helps


def test_shards_that_are_deleted_are_named_with_the_remedy(exported: Path, config: DataConfig, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(config.root, data)
    for shard in (data / "a" / "validation").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"validation rows cannot be read: .*give data.root=\.\.\."):
        analyze(moved(exported, tmp_path, root=str(data)), log=quiet)


def test_rows_in_the_ids_of_another_tokenizer_are_refused(exported: Path, config: DataConfig, tmp_path: Path) -> None:
    data = corpus_of_another_tokenizer(config, tmp_path / "data")
    with pytest.raises(DataError, match="its ids mean other texts to this model"):
        analyze(moved(exported, tmp_path, root=str(data)), log=quiet)


def test_nothing_but_data_can_be_overridden(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.boundary.form: dlcm analyze looks at the model as it was trained"):
        analyze(run, overrides=["model.boundary.form=paper"], log=quiet)


@pytest.mark.parametrize(("asked", "said"), [
    ({"rows": 0}, "--rows 0: at least one"), ({"documents": -1}, "--documents -1: cannot be negative"),
    ({"out": "page.txt"}, r"--out page.txt: name a file that ends in .html"),
    ({"out": "nowhere/page.html"}, "there is no folder nowhere; give --out FILE.html"),
])
def test_what_cannot_be_asked_is_refused_at_once(run: Path, asked: dict[str, Any], said: str,
                                                 monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        analyze(run, log=quiet, **asked)


def test_a_step_that_is_not_kept_and_a_place_without_a_model_are_refused(run: Path, exported: Path, tmp_path: Path
                                                                         ) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint of step 4; there are 3, 6, 9"):
        analyze(run, step=4, log=quiet)
    with pytest.raises(CheckpointError, match="holds no checkpoint and is no exported model"):
        analyze(tmp_path, log=quiet)
    with pytest.raises(ConfigError, match="is an exported model, of step 9"):
        analyze(exported, step=3, log=quiet)


def test_a_run_that_may_only_be_read_is_refused_with_the_remedy(run: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != run)
    with pytest.raises(ConfigError, match=r"may only be read; give --out FILE\.html in a folder that can be written"):
        analyze(run, log=quiet)
    monkeypatch.undo()
    (tmp_path / "page").write_text("in the way of the events")
    with pytest.raises(ConfigError, match=r"cannot be written .*give --out FILE.html elsewhere"):
        analyze(run, out=tmp_path / "page.html", rows=1, log=quiet)
