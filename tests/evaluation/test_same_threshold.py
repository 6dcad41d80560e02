"""The threshold that training has steered is the one of everything that uses the model, and the paper's rule is one
word of the configuration away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlcm_lightning.compose import load_saved_config
from dlcm_lightning.config import Config, Threshold
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.evaluation.tasks.scoring import Request, Scorer
from dlcm_lightning.export.huggingface.folder import export_huggingface
from dlcm_lightning.export.portable import export, load_model, model_of, open_trained
from dlcm_lightning.inference import Generator
from dlcm_lightning.inference.sampling import Sampling
from dlcm_lightning.model.dlcm import DLCM, LanguageModel
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.run import pretrain

TEXT = "The river is long. A boy walks by the water. 河水很长。"


def run_with(config: Config, rule: Threshold) -> Path:
    """A run whose threshold has gone far from one half, or would have."""
    boundary = replace(config.model.boundary, threshold=rule, threshold_step=0.9, target_ratio=8.0)
    optim = replace(config.optim, total_tokens=60 * config.data.tokens_per_step)
    config = replace(config, name=rule, model=replace(config.model, boundary=boundary), optim=optim)
    pretrain(config, lambda message: None)
    return Path(config.train.output_dir) / rule


def boundaries_of(model: LanguageModel, ids: torch.Tensor) -> list[bool]:
    with torch.no_grad():
        segmentation = model(ids, Segments.from_lengths([len(ids)])).segmentation
    return segmentation.boundaries.tolist()


@pytest.mark.parametrize("rule", ["calibrated", "half"])
def test_whatever_uses_a_model_cuts_by_the_threshold_it_was_trained_to(run_config: Config, tmp_path: Path,
                                                                       rule: Threshold) -> None:
    run = run_with(run_config, rule)
    trained = open_trained(run)
    assert abs(trained.state["boundary.threshold"]) > 0.2, "steered either way"
    ids = torch.tensor(Tokenizer.load(run).encode_documents([TEXT])[0][:-1].tolist())
    model = model_of(trained.config, trained.state, torch.float32, torch.device("cpu"), "run")
    assert isinstance(model, DLCM)
    expected = boundaries_of(model, ids)
    with torch.no_grad():
        p = model(ids, Segments.from_lengths([len(ids)])).segmentation.probabilities
    above = torch.sigmoid(trained.state["boundary.threshold"]) if rule == "calibrated" else torch.tensor(0.5)
    assert expected == (p >= above).tolist()
    model.cut_by("half" if rule == "calibrated" else "calibrated")
    assert boundaries_of(model, ids) != expected, "or nothing would be noticed here"

    exported = load_model(export(run, tmp_path / "exported"))
    assert boundaries_of(exported, ids) == expected
    completion = Generator.load(run).generate([TEXT], Sampling(temperature=0, max_tokens=2))[0]
    assert completion.boundaries[:len(ids)] == expected
    Scorer(exported, "half" if rule == "calibrated" else "calibrated")
    scored = Scorer(exported).score([Request(tuple(ids[:-1].tolist()), (int(ids[-1]),))])[0]
    assert boundaries_of(exported, ids) == expected

    folder = export_huggingface(run, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits[-2].log_softmax(-1)[ids[-1]].item(), scored.logprob, rtol=1e-5, atol=0)
    assert load_saved_config(run / "config.yaml", []).model.boundary.threshold == rule
