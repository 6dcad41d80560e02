"""The command: prompts from everywhere, texts to screens and programs, mistakes in one line."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.cli import main
from dlcm_lightning.config import Config, OptimConfig, TrainConfig
from dlcm_lightning.data.tokenizer import train_bpe
from dlcm_lightning.errors import ConfigError
from dlcm_lightning.inference.terminal import Screen, read_prompts, spans_of
from dlcm_lightning.training.run import pretrain
from tests.conftest import MODEL
from tests.distributed.conftest import ROOT
from tests.synthetic import VOCABULARY, make_texts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A trained run, once."""
    data = replace(request.getfixturevalue("config"), global_batch_size=4, micro_batch_size=4)
    folder = tmp_path_factory.mktemp("generate")
    config = Config(name="test", seed=3, model=MODEL, data=data,
                    optim=OptimConfig(total_tokens=4 * data.tokens_per_step, warmup_tokens=data.tokens_per_step),
                    train=TrainConfig(output_dir=str(folder), precision="fp32", devices=1, nodes=1, log_every_steps=2,
                                      validate_every_steps=4, checkpoint_every_steps=2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DLCM_DEVICE", "cpu")
        pretrain(config, lambda _: None)
    return folder / "test"


def test_a_run_and_its_export_write_one_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    texts = []
    for place in (run, tmp_path / "out"):
        capsys.readouterr()
        assert main(["generate", str(place), "--prompt", "the river", "--seed", "3", "--max-tokens", "20"]) == 0
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out and texts[0].out.startswith("the river")
    assert "20 tokens in" in texts[0].err and "tokens per concept" in texts[0].err
    assert main(["generate", str(run), "--prompt", "the river", "--step", "2", "--greedy"]) == 0


def test_lines_of_json_say_everything(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the river"}\n\n{"prompt": "", "more": 1}\n')
    assert main(["generate", str(run), "--prompts", str(file), "--samples", "2", "--json", "--concepts", "--max-tokens",
                 "12"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["prompt"], one["sample"]) for one in lines] == [("the river", 0), ("the river", 1), ("", 0), ("", 1)]
    for one in lines:
        assert "".join(one["spans"]) == one["prompt"] + one["text"]
        assert one["concepts"] >= len(one["spans"]) - 1
        assert one["tokens_per_concept"] == pytest.approx(
            (one["prompt_tokens"] + one["tokens"] - 1) / one["concepts"], abs=1e-3)


def test_json_is_json_where_a_terminal_knows_ascii_alone(run: Path) -> None:
    command = ["generate", str(run), "--prompt", "你 é 🙂", "--json", "--max-tokens", "2"]
    done = subprocess.run([sys.executable, "-m", "dlcm_lightning", *command], capture_output=True, check=True, cwd=ROOT,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=120)
    assert json.loads(done.stdout)["prompt"] == "你 é 🙂"


def test_joiners_stay_in_a_text_and_control_characters_do_not() -> None:
    out = io.StringIO()
    Screen(False, False, out).span("می\u200cخواهم \u202e\x1b[1m", 0)
    assert out.getvalue() == "می\u200cخواهم \\u202e\\x1b[1m"


def test_concepts_are_coloured_or_barred(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for colour in ("always", "never"):
        assert main(["generate", str(run), "--prompt", "the river and", "--concepts", "--color", colour]) == 0
        shown[colour] = capsys.readouterr().out
    assert "\x1b[30;48;5;" in shown["always"] and "\x1b" not in shown["never"]
    assert "|" in shown["never"]


def test_who_reads_no_further_is_no_error(run: Path) -> None:
    command = [sys.executable, "-m", "dlcm_lightning", "generate", str(run), "--prompt", "the", "--samples", "40"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(120) == 0 and "Traceback" not in said, said


def test_prompts_come_from_lines_json_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\n two \n")
    assert read_prompts(["zero"], str(lines)) == ["zero", "one", " two "]
    lines.write_bytes("one\r\ntwo\u2028still two\x0b\r\n".encode())
    assert read_prompts([], str(lines)) == ["one", "two\u2028still two\x0b"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("三\n".encode())))
    assert read_prompts([], "-") == ["三"]
    wrong = tmp_path / "wrong.jsonl"
    for content, words in (("{", "line 1 is no JSON"), ('{"text": "a"}', 'no JSON with a field "prompt"'),
                           ('{"prompt": 3}', "is a int"), ("[1]", "line 1"), ("", "holds no prompt")):
        wrong.write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_prompts([], str(wrong))
    lines.write_bytes("\ufeffone\n".encode())
    assert read_prompts([], str(lines)) == ["one"]
    lines.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="not a text in UTF-8"):
        read_prompts([], str(lines))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts([], str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no prompt: give --prompt"):
        read_prompts([], None)


def test_spans_cut_texts_where_concepts_close() -> None:
    pieces = [b"", b"The", b" cat", b" s", "é".encode()[:1], "é".encode()[1:]]
    assert spans_of(pieces, [True, False, True, False, True, False]) == [("The cat", 1), (" s", 2), ("é", 3)]


@pytest.mark.parametrize(("given", "words"), [
    ([], "no prompt"), (["--prompt", "a", "--temperature", "nan"], "temperature = nan"),
    (["--prompt", "a", "--stop", ""], "stop = ''"), (["--prompt", "a b c " * 60], "the context is 64"),
    (["--prompt", "a", "--step", "3"], "no checkpoint of step 3"),
    (["--prompt", "a", "--max-tokens", "0"], "max_tokens = 0"),
    (["--prompt", "a", "--greedy", "--temperature", "1"], "--greedy"), (["--prompts", "nowhere"], "cannot be read"),
])
def test_mistakes_are_one_line(run: Path, given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), *given]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and said.startswith("dlcm: ")


def test_what_is_no_model_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2
    assert "is not there; name the directory of a run" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no checkpoint and is no exported model" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "tokenizer.json").unlink()
    assert main(["generate", str(copy), "--prompt", "a"]) == 2
    assert "tokenizer.json: missing" in capsys.readouterr().err
    texts = make_texts("english", 200) + make_texts("chinese", 200)
    others = ((texts[100:300], VOCABULARY, "is not the one that it was trained with"),
              (texts, VOCABULARY + 4, "put its own tokenizer there"))
    for texts, size, words in others:
        train_bpe(texts, size).save(copy)
        for command in (["generate", str(copy), "--prompt", "a"], ["export", str(copy), str(tmp_path / "wrong")],
                        ["export", str(copy), str(tmp_path / "wrong"), "--hf"]):
            assert main(command) == 2
            said = capsys.readouterr().err
            assert words in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "wrong").exists()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "config.yaml").unlink()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a"]) == 2
    assert "not a whole exported model" in capsys.readouterr().err
