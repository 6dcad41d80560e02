"""Texts that are shown cut into concepts: nothing is lost, no character is cut, nothing is markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlcm_lightning.config import BoundaryConfig, Config
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.model.dlcm import DLCM, build_model
from dlcm_lightning.training.callbacks.boundaries import PAGE, concepts_of, page
from dlcm_lightning.training.run import pretrain

TEXT = "naïve 🙂 <b>天地玄黄</b> &amp; 宇宙洪荒 ﷽ end"
CPU = torch.device("cpu")


@pytest.mark.parametrize("ratio", [2.0, 3.0, 7.0])
def test_concepts_joined_are_the_text_and_no_character_is_cut(run_config: Config, tokenizer: Tokenizer, ratio: float
                                                              ) -> None:
    model = replace(run_config.model, boundary=BoundaryConfig(form="fixed", target_ratio=ratio))
    built = build_model(model, torch.float32, "sdpa", seed=0)
    assert isinstance(built, DLCM)
    found = concepts_of(built, tokenizer, TEXT, 1000, CPU)
    whole = b"".join(tokenizer.pieces(tokenizer.encode_documents([TEXT])[0])).decode()
    assert "".join(found) == whole and TEXT in whole
    assert len(found) > 3 and not any("\N{REPLACEMENT CHARACTER}" in one for one in found)


def test_a_text_that_is_cut_short_ends_with_a_whole_character(run_config: Config, tokenizer: Tokenizer) -> None:
    model = build_model(run_config.model, torch.float32, "sdpa", seed=0)
    assert isinstance(model, DLCM)
    tokens = tokenizer.encode_documents(["x🙂"])[0]
    found = "".join(concepts_of(model, tokenizer, "x🙂", len(tokens) - 2, CPU))
    assert found.endswith("x")


def test_the_page_shows_every_concept_in_turn_and_escapes_the_text() -> None:
    written = page({"a<b": [["x < y", " & z", "天"]]}, "<run>")
    assert "<h2>a&lt;b</h2>" in written and "<h1>&lt;run&gt;</h1>" in written
    assert re.findall(r"<span class='c(\d)'>([^<]*)</span>", written) == [
        ("0", "x &lt; y"), ("1", " &amp; z"), ("2", "天")]


def test_a_run_leaves_the_page_of_its_last_step(run_config: Config) -> None:
    pretrain(run_config, lambda _: None)
    written = (Path(run_config.train.output_dir) / run_config.name / PAGE).read_text()
    assert "concepts at step 12 of 12" in written and "<h2>en</h2>" in written and "<h2>zh</h2>" in written
