"""Evaluations as a whole: the table, lm-eval's own numbers, resuming, ranks, and what cannot be asked."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dlcm_lightning.cli import main
from dlcm_lightning.cluster.world import free_port
from dlcm_lightning.data.loader import ValidationBatches
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import USER_ERROR, CheckpointError, ConfigError, DataError, RunError
from dlcm_lightning.evaluation.tasks import local_tasks as local_module
from dlcm_lightning.evaluation.tasks.evaluate import evaluate, task_manager, what
from dlcm_lightning.evaluation.tasks.harness import ConceptLM, HubLM, sampling_of
from dlcm_lightning.evaluation.tasks.local_tasks import local_tasks
from dlcm_lightning.evaluation.tasks.models import Question, open_model
from dlcm_lightning.evaluation.tasks.results import Line, lines_of
from dlcm_lightning.evaluation.tasks.scoring import Request, Scorer
from dlcm_lightning.evaluation.tasks.sharing import Answers
from dlcm_lightning.export.huggingface.folder import export_huggingface
from dlcm_lightning.export.portable import export, model_of, open_trained
from dlcm_lightning.inference import Generator
from dlcm_lightning.inference.sampling import Sampling
from dlcm_lightning.ops.segments import Segments
from dlcm_lightning.training.evaluate import evaluate as validation_table
from tests.evaluation.tasks.conftest import ROWS, write_subjects

SMALL = ("commonsense_qa", "hellaswag", "winogrande", "openbookqa", "piqa", "arc_challenge", "arc_easy", "boolq",
         "race")


def quiet(line: str) -> None:
    del line


def samples_of(out: Path, name: str = "") -> dict[tuple[str, int], Any]:
    return {(one["task"], one["doc_id"]): one for one in
            map(json.loads, (out / f"samples{name}.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def asked(trained_run: Path, small_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks without subjects, answered once."""
    out = tmp_path_factory.mktemp("out")
    lines = evaluate(str(trained_run), Question(SMALL), data_dir=small_tasks, out=out, samples=True, report=quiet)
    assert lines is not None and [line.name for line in lines] == [*SMALL, "average"]
    return out


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_the_table_says_what_was_asked_and_what_guessing_would_give(asked: Path) -> None:
    content = json.loads(only(asked, "results-*.json").read_text())
    table = {line["name"]: line for line in content["table"]}
    assert {name: table[name]["items"] for name in SMALL} == dict.fromkeys(SMALL, ROWS)
    assert {name: table[name]["chance"] for name in SMALL} == pytest.approx({
        "commonsense_qa": 20, "hellaswag": 25, "winogrande": 50, "openbookqa": 25, "piqa": 50, "arc_challenge": 25,
        "arc_easy": 25, "boolq": 50, "race": 25})
    assert table["arc_easy"]["split"] == "test" and table["arc_challenge"]["split"] == "validation"
    assert table["piqa"]["dlcm"] == 75.52 and table["piqa"]["baseline"] == 73.10
    for name in SMALL:
        theirs = content["lm_eval"]["results"][name]
        for metric, score in table[name]["scores"].items():
            assert score["value"] == 100 * theirs[f"{metric},none"]
            assert score["stderr"] == 100 * theirs[f"{metric}_stderr,none"]
    assert "acc_norm" in table["piqa"]["scores"] and "acc_norm" not in table["boolq"]["scores"]
    accs = [table[name]["scores"]["acc"]["value"] for name in SMALL]
    assert table["average"]["scores"]["acc"]["value"] == pytest.approx(sum(accs) / len(accs))
    errors = [table[name]["scores"]["acc"]["stderr"] for name in SMALL]
    assert table["average"]["scores"]["acc"]["stderr"] == pytest.approx(math.hypot(*errors) / len(errors))
    text = only(asked, "table-*.md").read_text()
    assert "bits per byte" in text and "42.24" in text and "| PIQA | validation | 3 |" in text
    assert list(asked.glob("events-*/events.out.tfevents.*"))


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
    """Of the same texts: every piece of every validation row, its tokens behind its first."""
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
             report=lines.append)
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


def test_what_is_answered_is_not_computed_twice_and_the_rest_is_the_same(
        asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that lost its end, as by a kill in the middle of a line."""
    shutil.copytree(asked, tmp_path / "out")
    file = only(tmp_path / "out", "answers/*/rank-00000.jsonl")
    kept = file.read_bytes().splitlines(keepends=True)
    batches: list[int] = []
    before = Scorer.score_batch

    def counted(self: Scorer, requests: list[Request]) -> Any:
        batches.append(len(requests))
        return before(self, requests)

    monkeypatch.setattr(Scorer, "score_batch", counted)
    question = Question(SMALL)

    def again() -> dict[tuple[str, int], Any]:
        batches.clear()
        evaluate(str(trained_run), question, data_dir=small_tasks, out=tmp_path / "out", samples=True, report=quiet)
        return samples_of(tmp_path / "out", what(question))

    whole = samples_of(asked, what(question))
    assert again() == whole and batches == []
    assert len(kept) >= 1
    file.write_bytes(b"".join(kept[:-1]) + kept[-1][: len(kept[-1]) // 2])
    assert again() == whole and len(batches) == 1
    assert again() == whole and batches == [], "what was written behind the torn line is read"
    for other in (Question(SMALL, "half"), Question(SMALL, batch_tokens=512)):
        batches.clear()
        evaluate(str(trained_run), other, data_dir=small_tasks, out=tmp_path / "out", report=quiet)
        assert batches, "another question has answers of its own"


def ranks(arguments: list[str], out: Path, count: int = 2) -> list[str]:
    """What each rank says."""
    command = [sys.executable, "-m", "dlcm_lightning", "evaluate", *arguments, "--out", str(out), "--samples"]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "DLCM_DEVICE": "cpu", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    started = [subprocess.Popen(command, env={**here, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(count)]
    said = [rank.communicate(timeout=240)[0] for rank in started]
    assert [rank.returncode for rank in started] == [0] * count, said
    return said


def test_two_ranks_answer_as_one(asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    """Bit for bit: batches are planned for all, and go round."""
    said = ranks([str(trained_run), "--tasks", ",".join(SMALL), "--data-dir", str(small_tasks), "--batch-tokens",
                  "512"], tmp_path)
    assert "average of 9" in said[0] and "average" not in said[1]
    assert len(list(tmp_path.glob("answers/*/rank-*.jsonl"))) == 2
    evaluate(str(trained_run), Question(SMALL, batch_tokens=512), data_dir=small_tasks, out=tmp_path / "alone",
             samples=True, report=quiet)
    name = what(Question(SMALL))
    assert samples_of(tmp_path, name) == samples_of(tmp_path / "alone", name)
    other = samples_of(asked, name)  # other batches: equal but for rounding
    for key, sample in samples_of(tmp_path, name).items():
        for (one,), (two,) in zip(sample["resps"], other[key]["resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5)


@pytest.mark.parametrize("name", ["ceval-valid", "cmmlu", "mmlu"])
def test_groups_of_subjects_run_from_their_releases(trained_run: Path, tmp_path: Path, name: str) -> None:
    subjects = list(local_module.leaves_of(task_manager(), local_module.BY_NAME[name]))
    assert len(subjects) == {"ceval-valid": 52, "cmmlu": 67, "mmlu": 57}[name]
    write_subjects(tmp_path / "questions", name, subjects)
    lines = evaluate(str(trained_run), Question((name,)), data_dir=tmp_path / "questions", out=tmp_path, samples=True,
                     report=quiet)
    assert lines is not None and lines[0].items == 2 * len(subjects) and lines[0].chance == 25
    found = samples_of(tmp_path, f"-{name}")
    right = [one["acc"] for one in found.values()]
    assert lines[0].scores["acc"][0] == pytest.approx(100 * sum(right) / len(right))
    prompt = next(iter(found.values()))["arguments"][2]
    assert prompt[1] == " C" and ("Answer:" if name == "mmlu" else "答案：") in prompt[0] and "\nC. 丙\n" in prompt[0]
    with_one = evaluate(str(trained_run), Question((name,), fewshot=1, limit=1), data_dir=tmp_path / "questions",
                        out=tmp_path, samples=True, report=quiet)
    assert with_one is not None and with_one[0].items == len(subjects)
    first = next(iter(samples_of(tmp_path, f"-{name}-1shot-limit1").values()))
    assert first["arguments"][0][0].count("\nC. 丙\n") == 2
    next((tmp_path / "questions" / name).rglob(f"*{subjects[3]}*")).unlink()
    for file in (tmp_path / "questions" / name).rglob(f"{subjects[3]}*"):
        file.unlink()
    with pytest.raises(DataError, match=rf"1 of {len(subjects)} subjects have no file, such as {subjects[3]}"):
        evaluate(str(trained_run), Question((name,)), data_dir=tmp_path / "questions", out=tmp_path, report=quiet)


@pytest.fixture(scope="module")
def hub_folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public architecture with drawn weights, in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(trained_run / "tokenizer.json"), eos_token="<eos>",
                                        bos_token="<bos>", pad_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_hugging_face_model_scores_item_by_item_what_lm_eval_gives_it(
        hub_folder: Path, small_tasks: Path, tmp_path: Path) -> None:
    names = ("piqa", "arc_easy", "boolq", "race")
    evaluate(f"hf:{hub_folder}", Question(names), data_dir=small_tasks, out=tmp_path, samples=True, report=quiet)
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


def test_ranks_share_a_hugging_face_model_once(hub_folder: Path, small_tasks: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's class would share questions itself where it sees ranks and GPUs."""
    names = ("piqa", "boolq")
    ranks(["--model", f"hf:{hub_folder}", "--tasks", ",".join(names), "--data-dir", str(small_tasks)], tmp_path)
    evaluate(f"hf:{hub_folder}", Question(names), data_dir=small_tasks, out=tmp_path / "alone", samples=True,
             report=quiet)
    assert samples_of(tmp_path, what(Question(names))) == samples_of(tmp_path / "alone", what(Question(names)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    lm = HubLM(str(hub_folder), "cpu", "float32", 8, None, False)
    assert (lm.rank, lm.world_size) == (0, 1) and os.environ["RANK"] == "1"


def result_of(name: str, subtasks: dict[str, list[str]], leaves: dict[str, tuple[str, int, list[str]]]) -> Line:
    """The line of a group or task; leaves: by name, output type, requests of each question, metrics."""
    samples = {leaf: [{"doc_id": number, "arguments": [["", ""]] * count, "metrics": metrics} for number in range(3)]
               for leaf, (_, count, metrics) in leaves.items()}
    return lines_of({"results": {leaf: {"acc,none": 0.5, "acc_stderr,none": 0.1} for leaf in leaves},
                     "groups": {group: {"acc,none": 0.5, "acc_stderr,none": "N/A"} for group in subtasks},
                     "group_subtasks": subtasks, "samples": samples,
                     "configs": {leaf: {"output_type": kind} for leaf, (kind, _, _) in leaves.items()}}, [name], {})[0]


def test_groups_of_groups_count_the_questions_of_their_leaves() -> None:
    line = result_of("mmlu", {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["a", "b"], "mmlu_other": ["c"]},
                     {leaf: ("multiple_choice", 4, ["acc"]) for leaf in "abc"})
    assert (line.items, line.chance, line.scores["acc"]) == (9, 25, (50, None))


@pytest.mark.parametrize(("kind", "asked", "metrics", "chance"), [
    ("multiple_choice", 4, ["acc", "acc_norm"], 25), ("multiple_choice", 8, ["acc", "acc_mutual_info"], 25),
    ("loglikelihood", 1, ["acc", "perplexity"], None), ("generate_until", 1, ["exact_match"], None)])
def test_chance_is_that_of_choices(kind: str, asked: int, metrics: list[str], chance: float | None) -> None:
    assert result_of("one", {}, {"one": (kind, asked, metrics)}).chance == chance


def test_tags_are_their_tasks(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    lines = evaluate(str(trained_run), Question(("ai2_arc", "piqa")), data_dir=small_tasks, out=tmp_path, report=quiet)
    assert lines is not None
    assert [line.name for line in lines] == ["arc_challenge", "arc_easy", "piqa", "average"]
    with pytest.raises(ConfigError, match="arc_easy is named twice"):
        evaluate(str(trained_run), Question(("ai2_arc", "arc_easy")), data_dir=small_tasks, out=tmp_path, report=quiet)


def test_no_answer_replaces_that_to_another_question(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    shutil.copytree(small_tasks, tmp_path / "elsewhere")
    for _ in range(2):
        for data in (small_tasks, tmp_path / "elsewhere"):
            evaluate(str(trained_run), Question(("piqa",)), data_dir=data, out=tmp_path / "out", report=quiet)
    found = sorted((tmp_path / "out").glob("results-piqa*.json"))
    assert {json.loads(file.read_text())["question"]["questions_from"] for file in found} == {
        str(small_tasks), str(tmp_path / "elsewhere")} and len(found) == 2
    assert len(list((tmp_path / "out").glob("events-piqa*/events.out.tfevents.*"))) == 2


def test_ranks_with_other_questions_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = Answers(tmp_path, None)
    monkeypatch.setattr(answers, "_gathered", lambda mine: [mine, mine + "x"] if isinstance(mine, str) else [mine])
    with pytest.raises(DataError, match="other questions than each other"):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], lambda batch: [[0.0, True]])


def test_a_failure_is_told_to_all_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = Answers(tmp_path, None)
    told: list[Any] = []
    monkeypatch.setattr(answers, "_gathered", lambda mine: told.append(mine) or [mine])

    def fails(batch: list[Any]) -> list[Any]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], fails)
    assert told[-1] == ({}, "MemoryError: no room")
    monkeypatch.setattr(answers, "_gathered", lambda mine: [mine, ({}, "MemoryError: no room")]
                        if isinstance(mine, tuple) else [mine])
    with pytest.raises(RunError, match=r"rank 1 has failed \(MemoryError: no room\)"):
        answers.of("loglikelihood", [("a", "b")], lambda asked: [[0]], lambda batch: [[0.0, True]])


def test_an_export_is_asked_like_its_run(asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    out = export(trained_run, tmp_path / "model")
    evaluate(str(out), Question(SMALL), data_dir=small_tasks, out=tmp_path / "out", samples=True, report=quiet)
    assert samples_of(tmp_path / "out", what(Question(SMALL))) == samples_of(asked, what(Question(SMALL)))


def test_an_export_for_transformers_scores_through_lm_evals_own_class_what_ours_does(
        asked: Path, trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    """Padded batches there, packed ones here."""
    folder = export_huggingface(trained_run, tmp_path / "hf")
    names = ("piqa", "arc_easy", "race")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        evaluate(f"hf:{folder}", Question(names), data_dir=small_tasks, out=tmp_path / "out", report=quiet)
    question = Question(names, trust_remote_code=True)
    evaluate(f"hf:{folder}", question, data_dir=small_tasks, out=tmp_path / "out", samples=True, report=quiet)
    ours = samples_of(asked, what(Question(SMALL)))
    for key, sample in samples_of(tmp_path / "out", what(question)).items():
        assert sample["arguments"] == ours[key]["arguments"]
        for (one,), (two,) in zip(sample["resps"], ours[key]["resps"], strict=True):
            assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-5)


def test_half_precision_says_how_many_boundaries_it_moves(trained_run: Path, small_tasks: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    evaluate(str(trained_run), Question(("piqa",), precision="bf16"), data_dir=small_tasks, out=tmp_path,
             report=lines.append)
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
        evaluate(str(out), Question(("piqa",)), data_dir=small_tasks, out=tmp_path / "out", report=quiet)


def test_questions_have_names_of_their_own() -> None:
    plain = Question(tuple(task for task in local_module.BY_NAME))
    assert what(plain) == ""
    assert what(Question(("piqa",), "sampled", "bf16", 2, 10, 64)) == "-piqa-sampled-bf16-2shot-limit10-context64"


