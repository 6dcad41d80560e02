"""Evaluations as a whole: lm-eval's prompts and scores, exact log-likelihoods, and what cannot be asked."""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance

from dlcm_lightning.cli import main
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import USER_ERROR, CheckpointError, ConfigError, DataError
from dlcm_lightning.evaluation.tasks import local_tasks as local_module
from dlcm_lightning.evaluation.tasks.evaluate import evaluate, task_manager, what
from dlcm_lightning.evaluation.tasks.harness import ConceptLM, sampling_of
from dlcm_lightning.evaluation.tasks.local_tasks import local_tasks
from dlcm_lightning.evaluation.tasks.models import Question, open_model
from dlcm_lightning.evaluation.tasks.scoring import Request, Scorer
from dlcm_lightning.export.huggingface.folder import export_huggingface
from dlcm_lightning.export.portable import export, model_of, open_trained
from dlcm_lightning.inference import Generator
from dlcm_lightning.inference.sampling import Sampling
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.evaluate import evaluate as validation_table
from tests.evaluation.tasks.conftest import ROWS, SMALL, only, quiet, samples_of, write_subjects


def test_prompts_are_lm_evals_own(asked: Path) -> None:
    found = samples_of(asked, only(asked, "samples-*").stem.removeprefix("samples"))
    assert found["piqa", 1]["arguments"][0] == ["Question: Open jar 1\nAnswer:", " turn the lid"]
    assert found["race", 0]["arguments"][1] == [
        "Article: The high river of 0 is long.\n\nThe river is long\nHow long is it?", " 1 miles"]
    assert found["boolq", 2]["arguments"][1] == ["Water is wet, says page 2.\nQuestion: is water wet?\nAnswer:", " yes"]
    assert found["winogrande", 0]["arguments"][1] == [
        "The cup did not fit the box because the box", " was too big."]


def test_log_likelihoods_are_those_of_a_forward_of_each_text(asked: Path, trained_run: Path) -> None:
    trained = open_trained(trained_run)
    model = model_of(trained.config, trained.state, torch.float64, torch.device("cpu"), "run")
    found = samples_of(asked, only(asked, "samples-*").stem.removeprefix("samples"))
    counted = 0
    for sample in found.values():
        for (context, continuation), (answer,) in zip(sample["arguments"], sample["resps"], strict=True):
            whole = trained.tokenizer.encode_documents([context + continuation])[0][:-1].tolist()
            before = len(trained.tokenizer.encode_documents([context])[0]) - 1
            text = torch.tensor(whole)
            with torch.no_grad():
                from_all = model.logits(model(text[:-1], segments(len(text) - 1)).hidden).log_softmax(-1)
            expected = sum(from_all[place - 1, whole[place]].item() for place in range(before, len(whole)))
            assert float(answer[0]) == pytest.approx(expected, rel=1e-5)
            counted += 1
    assert counted > 80


def segments(length: int) -> Segments:
    return Segments.from_lengths([length])


@pytest.mark.parametrize("boundaries", ["thresholded", "half"])
def test_log_likelihoods_are_the_bits_per_byte_of_the_validation_table(trained_run: Path, boundaries: Any) -> None:
    """Of the same texts: every piece of every validation row, its tokens after its first."""
    table = validation_table(trained_run, None, ["train.precision=fp32"], quiet, boundaries)
    trained = open_trained(trained_run)
    config = trained.config
    reader = Reader(config.data, config.seed, config.model.vocab_size)
    model = model_of(config, trained.state, torch.float32, torch.device("cpu"), "run")
    asked, content = [], 0
    for batch in ValidationBatches(reader):
        starts = batch.documents.cu_seqlens.tolist()
        for begin, end in pairwise(starts):
            targets = [int(one) for one in batch.targets[begin:end] if one >= 0]
            if targets:
                asked.append(Request((int(batch.tokens[begin]),), tuple(targets)))
                content += sum(int(reader.token_bytes[one]) for one in targets)
    for batch_tokens in (64, 8192):
        nats = -sum(one.logprob for one in Scorer(model, boundaries, batch_tokens=batch_tokens).score(asked))
        assert nats / content / math.log(2) == pytest.approx(table["bits_per_byte"], rel=1e-6)


def test_rolling_log_likelihoods_count_every_token_once(trained_run: Path, tmp_path: Path) -> None:
    context = 32
    lm = opened(trained_run, tmp_path, Question(("piqa",), context=context))
    texts = ["The river is long. " * 40, "短", "One line."]
    found = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts])
    model = lm.scorer.model
    for text, sum_of_logs in zip(texts, found, strict=True):
        ids = lm.tok_encode(text)
        expected, done = 0.0, 1
        while done < len(ids):
            upto = min(len(ids), done + context)
            window = torch.tensor(ids[max(0, upto - 1 - context):upto - 1])
            with torch.no_grad():
                logs = model.logits(model(window, segments(len(window))).hidden).log_softmax(-1)
            expected += sum(logs[len(window) - (upto - place), ids[place]].item() for place in range(done, upto))
            done = upto
        assert sum_of_logs == pytest.approx(expected, rel=1e-5)
    assert len(lm.windows(texts[0])) > 3


def test_longer_texts_lose_their_beginning_and_it_is_said(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    evaluate(str(trained_run), Question(("race", "piqa"), context=20), data_dir=small_tasks, out=tmp_path,
             log=lines.append)
    assert "contexts were longer than the model's" in only(tmp_path, "table-*.md").read_text()


def test_texts_are_generated_as_by_the_generator(trained_run: Path, tmp_path: Path) -> None:
    lm = opened(trained_run, tmp_path)
    prompts = ["The river", "A boy walks", "水"]
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    found = lm.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])
    expected = Generator.load(trained_run).generate(
        prompts, Sampling(temperature=0, top_p=1.0, max_tokens=12, stop=("\n\n",)))
    assert found == [one.text for one in expected]
    with pytest.raises(ConfigError, match="num_beams"):
        sampling_of({"num_beams": 4})
    assert sampling_of({"do_sample": True, "temperature": 0.5, "until": "x"}) == Sampling(
        temperature=0.5, top_p=1.0, max_tokens=256, stop=("x",))
    greedy = Sampling(temperature=0, top_p=1.0, max_tokens=9)
    for options in ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}, {}, {"until": None, "top_k": None}):
        assert sampling_of({**options, "max_tokens": 9}) == greedy
    assert sampling_of({"temperature": 0.7}).temperature == 0.7, "as lm-eval understands it"


def test_a_prompt_that_is_asked_several_times_gets_several_texts_where_they_are_drawn(trained_run: Path, tmp_path: Path
                                                                                      ) -> None:
    lm = opened(trained_run, tmp_path)
    for drawn in (True, False):
        options = {"do_sample": drawn, "temperature": 1.0, "max_gen_toks": 12, "until": []}
        asked = [Instance("generate_until", {}, ("The river", options), 0) for _ in range(4)]
        found = lm.generate_until(asked)
        assert len(set(found)) == (4 if drawn else 1)
        assert lm.generate_until(asked) == found


def test_texts_are_cut_as_lm_eval_cuts_them(trained_run: Path, tmp_path: Path) -> None:
    """The last tokens that the model reads, and one that it only predicts."""
    lm = opened(trained_run, tmp_path, Question(("piqa",), context=8))
    assert lm.request([1, 2, 3], [4, 5]) == Request((1, 2, 3), (4, 5)) and not lm.cut
    assert lm.request([*range(1, 9)], [10, 11, 12]) == Request((3, 4, 5, 6, 7, 8), (10, 11, 12)) and len(lm.cut) == 1
    assert lm.request([1], [*range(10, 22)]) == Request((13,), tuple(range(14, 22)))
    with pytest.raises(DataError, match="likelihood of an empty text"):
        lm.request([1], [])


def opened(run: Path, out: Path, question: Question | None = None) -> ConceptLM:
    lm = open_model(str(run), question or Question(("piqa",)), None, out, torch.device("cpu"), None).lm
    assert isinstance(lm, ConceptLM)
    return lm


@pytest.mark.parametrize("name", ["ceval-valid", "cmmlu", "mmlu"])
def test_groups_of_subjects_run_from_their_releases(trained_run: Path, tmp_path: Path, name: str) -> None:
    subjects = list(local_module.leaves_of(task_manager(), local_module.BY_NAME[name]))
    assert len(subjects) == {"ceval-valid": 52, "cmmlu": 67, "mmlu": 57}[name]
    write_subjects(tmp_path / "questions", name, subjects)
    lines = evaluate(str(trained_run), Question((name,)), data_dir=tmp_path / "questions", out=tmp_path, samples=True,
                     log=quiet)
    assert lines is not None and lines[0].items == 2 * len(subjects) and lines[0].chance == 25
    found = samples_of(tmp_path, f"-{name}")
    right = [one["acc"] for one in found.values()]
    assert lines[0].scores["acc"][0] == pytest.approx(100 * sum(right) / len(right))
    prompt = next(iter(found.values()))["arguments"][2]
    assert prompt[1] == " C" and ("Answer:" if name == "mmlu" else "答案：") in prompt[0] and "\nC. 丙\n" in prompt[0]
    with_one = evaluate(str(trained_run), Question((name,), fewshot=1, limit=1), data_dir=tmp_path / "questions",
                        out=tmp_path, samples=True, log=quiet)
    assert with_one is not None and with_one[0].items == len(subjects)
    first = next(iter(samples_of(tmp_path, f"-{name}-1shot-limit1").values()))
    assert first["arguments"][0][0].count("\nC. 丙\n") == 2
    next((tmp_path / "questions" / name).rglob(f"*{subjects[3]}*")).unlink()
    for file in (tmp_path / "questions" / name).rglob(f"{subjects[3]}*"):
        file.unlink()
    with pytest.raises(DataError, match=rf"1 of {len(subjects)} subjects have no file, such as {subjects[3]}"):
        evaluate(str(trained_run), Question((name,)), data_dir=tmp_path / "questions", out=tmp_path, log=quiet)


def test_a_hugging_face_model_scores_item_by_item_what_lm_eval_gives_it(
        hub_folder: Path, small_tasks: Path, tmp_path: Path) -> None:
    names = ("piqa", "arc_easy", "boolq", "race")
    evaluate(f"hf:{hub_folder}", Question(names), data_dir=small_tasks, out=tmp_path, samples=True, log=quiet)
    ours = samples_of(tmp_path, what(Question(names)))
    theirs = simple_evaluate("hf", model_args={"pretrained": str(hub_folder), "dtype": "float32"}, device="cpu",
                             batch_size=8, tasks=local_tasks(task_manager(), names, small_tasks, 0)[0], num_fewshot=0)
    assert theirs is not None
    counted = 0
    for name in names:
        for sample in theirs["samples"][name]:
            mine = ours[name, sample["doc_id"]]
            assert [list(one) for one in sample["arguments"]] == mine["arguments"]
            for ((one, greedy),), ((two, mine_greedy),) in zip(sample["resps"], mine["resps"], strict=True):
                assert float(two) == pytest.approx(one, rel=1e-6) and str(greedy) == str(mine_greedy)
                counted += 1
            assert sample["acc"] == mine["acc"]
    assert counted == ROWS * (2 + 4 + 2 + 4)


def test_an_export_is_asked_like_its_run(asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    out = export(trained_run, tmp_path / "model")
    evaluate(str(out), Question(SMALL), data_dir=small_tasks, out=tmp_path / "out", samples=True, log=quiet)
    assert samples_of(tmp_path / "out", what(Question(SMALL))) == samples_of(asked, what(Question(SMALL)))


def test_an_export_for_transformers_scores_through_lm_evals_own_class_what_ours_does(
        asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    """Padded batches there, packed ones here."""
    folder = export_huggingface(trained_run, tmp_path / "hf")
    names = ("piqa", "arc_easy", "race")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        evaluate(f"hf:{folder}", Question(names), data_dir=small_tasks, out=tmp_path / "out", log=quiet)
    question = Question(names, trust_remote_code=True)
    evaluate(f"hf:{folder}", question, data_dir=small_tasks, out=tmp_path / "out", samples=True, log=quiet)
    ours = samples_of(asked, what(Question(SMALL)))
    for key, sample in samples_of(tmp_path / "out", what(question)).items():
        assert sample["arguments"] == ours[key]["arguments"]
        for (one,), (two,) in zip(sample["resps"], ours[key]["resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5)


def test_half_precision_says_how_many_boundaries_it_moves(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    evaluate(str(trained_run), Question(("piqa",), precision="bf16"), data_dir=small_tasks, out=tmp_path,
             log=lines.append)
    assert any("boundary decisions on its validation rows are not those of fp32" in line for line in lines)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--tasks", "piqa"], "name a run or an export, or --model"),
    (["RUN", "--tasks", "piqa", "--model", "hf:x"], "one of the two"),
    (["--tasks", "piqa", "--model", "gpt2"], "write hf:"),
    (["RUN", "--tasks", "no_such_task"], "no_such_task: no task of lm-eval"),
    (["RUN", "--tasks", "arc_eas"], "do you mean arc_easy"),
    (["RUN", "--tasks", ","], "name tasks of lm-eval"),
    (["RUN", "--tasks", "piqa", "data.root=x"], "data.root=x: --tasks takes no fields"),
    (["RUN", "--limit", "3"], "--limit: a validation table has none; give --tasks too"),
    (["RUN", "--samples"], "--samples: a validation table has none"),
    (["RUN", "--precision", "bf16"], "--precision: a validation table has none; give --tasks too, or a field such as"),
    (["RUN", "--fewshot", "0"], "--fewshot: a validation table has none"),
    ([], "name the directory of a run"),
    (["RUN", "--tasks", "piqa", "--data-dir", "nowhere"], "nowhere/piqa: missing; PIQA needs"),
    (["RUN", "--tasks", "lambada_openai", "--data-dir", "TASKS"], "files are known for"),
    (["RUN", "--tasks", "piqa", "--data-dir", "TASKS", "--fewshot", "2"], "no local files of solved questions"),
    (["nowhere", "--tasks", "piqa", "--data-dir", "TASKS"], "nowhere: is not there"),
    (["--model", "hf:nowhere", "--tasks", "piqa", "--data-dir", "TASKS"], "hf:nowhere: transformers cannot load it"),
    (["--model", "hf:x", "--tasks", "piqa", "--data-dir", "TASKS", "--boundaries", "half"], "are for models of this"),
    (["RUN", "--tasks", "piqa", "--data-dir", "TASKS", "--out", "/proc/none"], "give another --out"),
])
def test_what_cannot_be_asked_is_said_in_a_line(trained_run: Path, small_tasks: Path, tmp_path: Path, said: str,
                                                arguments: list[str], monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    named = {"RUN": str(trained_run), "TASKS": str(small_tasks)}
    assert main(["evaluate", *(named.get(one, one) for one in arguments)]) == USER_ERROR
    assert said in capsys.readouterr().err


def test_without_lm_eval_it_is_said_how_to_get_it(trained_run: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    assert main(["evaluate", str(trained_run), "--tasks", "piqa"]) == USER_ERROR
    assert "--tasks: needs lm_eval; pip install 'dlcm-lightning[eval]'" in capsys.readouterr().err


def test_an_export_has_no_validation_table(trained_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"an exported model; dlcm evaluate .* --tasks"):
        validation_table(export(trained_run, tmp_path / "model"), None, [], quiet)


def test_a_damaged_model_is_refused(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    out = export(trained_run, tmp_path / "model")
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(CheckpointError):
        evaluate(str(out), Question(("piqa",)), data_dir=small_tasks, out=tmp_path / "out", log=quiet)
