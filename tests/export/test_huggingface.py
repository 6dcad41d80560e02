"""What `dlcm export --hf` writes, loaded by transformers where this package cannot be imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning import __version__
from dlcm_lightning.cli import main
from dlcm_lightning.compose import load_saved_config, save_config
from dlcm_lightning.config import BoundaryConfig, Config, DataConfig, OptimConfig, TrainConfig
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.export.huggingface.bundle import modelling_files
from dlcm_lightning.export.huggingface.folder import _framing
from dlcm_lightning.export.huggingface.model_card import draw
from dlcm_lightning.export.portable import load_model, load_state
from dlcm_lightning.training.run import pretrain
from tests.conftest import MODEL

WORKER = Path(__file__).with_name("transformers_worker.py")
PROMPTS = ["the river and the stone", "", "of", "第一章 the hills " * 4]


def trained(data: DataConfig, folder: Path, **model: object) -> Path:
    data = replace(data, global_batch_size=4, micro_batch_size=4)
    config = Config(
        name="test", seed=3, model=replace(MODEL, **model), data=data,  # type: ignore[arg-type]
        optim=OptimConfig(total_tokens=6 * data.tokens_per_step, warmup_tokens=data.tokens_per_step, lr_other=3e-3),
        train=TrainConfig(output_dir=str(folder), precision="fp32", devices=1, nodes=1, log_every_steps=2,
                          validate_every_steps=3, checkpoint_every_steps=3))
    pretrain(config, lambda _: None)
    return folder / "test"


@pytest.fixture
def run(config: DataConfig, tmp_path: Path) -> Path:
    return trained(config, tmp_path / "runs")


@pytest.mark.parametrize("model", [{}, {"boundary": BoundaryConfig(form="paper")}, {"kind": "dense"}],
                         ids=["both", "paper", "dense"])
def test_transformers_does_with_it_what_it_does_with_any_model(
        model: dict[str, object], config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    run = trained(config, tmp_path / "runs", **model)
    assert main(["export", str(run), str(tmp_path / "hf"), "--hf"]) == 0
    capsys.readouterr()
    given = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    assert main(["generate", str(tmp_path / "hf"), *given, "--greedy", "--json", "--max-tokens", "16",
                 "--context", "200"]) == 0
    (tmp_path / "texts").write_text(capsys.readouterr().out)
    done = subprocess.run([sys.executable, str(WORKER), str(tmp_path / "hf"), str(tmp_path / "texts"), str(tmp_path)],
                          capture_output=True, text=True, timeout=600, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]


def test_it_is_an_export_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "plain")]) == 0
    assert main(["export", str(tmp_path / "plain"), str(tmp_path / "hf"), "--hf"]) == 0
    small = ["--split-megabytes", "0.1", "--dtype", "bf16"]
    assert main(["export", str(run), str(tmp_path / "parts"), "--hf", *small]) == 0
    plain, through = load_state(tmp_path / "plain"), load_state(tmp_path / "hf")
    assert plain.keys() == through.keys() and all((plain[name] == through[name]).all() for name in plain)
    load_model(tmp_path / "parts")
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert all(name.startswith("model.") for name in index["weight_map"])
    assert main(["generate", str(tmp_path / "parts"), "--prompt", "the", "--max-tokens", "3"]) == 0


def test_names_in_a_text_are_spelled_out_though_a_tokenizer_does_not_call_them_special(
        run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = run / "tokenizer.json"
    definition = json.loads(file.read_text())
    for number, (name, special) in enumerate((("<think>", False), ("<tool>", True)), 360):
        definition["added_tokens"].append({
            "id": number, "content": name, "special": special, "normalized": False, "lstrip": False, "rstrip": False,
            "single_word": False})
    assert _framing(Tokenizer(json.dumps(definition), "<s>", "</s>"))["added_tokens"][-2]["special"] is True
    (tmp_path / "tokenizer.json").write_text(json.dumps(_framing(Tokenizer(json.dumps(definition), "<s>", "</s>"))))
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>",
                                                  eos_token="</s>", split_special_tokens=True)
    own = Tokenizer(json.dumps(definition), "<s>", "</s>")
    for text in ("a <think> b", "<tool>", "</s> <s>", "the river"):
        assert loaded(text)["input_ids"] == own.encode_documents([text])[0][:-1].tolist(), text


def test_every_command_that_takes_an_export_takes_the_folder(config: DataConfig, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(config, tmp_path / "runs", kind="dense")
    for name, flags in (("plain", []), ("hf", ["--hf"])):
        assert main(["export", str(run), str(tmp_path / name), *flags]) == 0
    assert main(["export", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    for name in ("plain", "hf", "back"):
        begun = replace(load_saved_config(run / "config.yaml"), name=f"from-{name}")
        save_config(replace(begun, train=replace(begun.train, init_from=str(tmp_path / name))), tmp_path / "run.yaml")
        assert main(["pretrain", str(tmp_path / "run.yaml")]) == 0, name
        assert main(["upcycle", str(tmp_path / name), str(tmp_path / f"up-{name}"), "--config", str(run / "config.yaml")
                     ]) == 0, capsys.readouterr().err
        assert main(["generate", str(tmp_path / name), "--prompt", "the", "--max-tokens", "3"]) == 0
    assert main(["export", str(tmp_path / "up-hf"), str(tmp_path / "card"), "--hf"]) == 0
    assert f"begin with those of {tmp_path / 'hf'}" in (tmp_path / "card" / "README.md").read_text()


def test_the_card_says_what_it_is_and_what_it_is_not(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--hf"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "license:" not in card
    for words in ("## Limits", "has no chat template", "| a | en | 0.7 |", "| all |",
                  "curves.svg", "1,536 tokens in 6 steps of 256"):
        assert words in card, words
    assert (tmp_path / "hf" / "curves.svg").read_text().count("<polyline") == 3  # two domains, and all
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings and settings["padding_side"] == "left"
    assert main(["export", str(run), str(tmp_path / "early"), "--hf", "--step", "3"]) == 0
    assert "curves.svg" not in (tmp_path / "early" / "README.md").read_text()


def test_the_files_are_the_package_s_own_but_for_their_imports() -> None:
    files = modelling_files(__version__)
    assert {"modeling_dlcm.py", "configuration_dlcm.py", "model_dlcm.py", "ops_attention.py"} <= files.keys()
    for name, content in files.items():
        tree = ast.parse(content)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, f"{name}: {node.module}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not any((one or "").startswith("dlcm_lightning") for one in names), f"{name}: {names}"
    own = (Path(__file__).parents[2] / "dlcm_lightning/ops/scan.py").read_text().splitlines()
    assert files["ops_scan.py"].splitlines()[1:] == own
    assert not {"lightning", "omegaconf", "deepspeed", "webdataset"} & {
        word for content in files.values() for line in content.splitlines() if line.startswith(("import ", "from "))
        for word in line.split()}


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "not one of the tokenizers library"),
])
def test_what_cannot_be_exported_is_said(spoil: object, words: str, run: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    spoil(run)  # type: ignore[operator]
    assert main(["export", str(run), str(tmp_path / "hf"), "--hf"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("dlcm: ") and words in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["runs"]


def test_a_half_written_folder_is_not_taken(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "hf"), "--hf"]) == 0
    (tmp_path / "hf" / "model.safetensors").write_bytes((tmp_path / "hf" / "model.safetensors").read_bytes()[:-8])
    assert main(["generate", str(tmp_path / "hf"), "--prompt", "a"]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_curves_stay_on_the_page() -> None:
    drawn = draw({"en": [(10, 2.0), (20, 1.5)], "all": [(10, 3.0), (20, 1.0)]})
    points = [tuple(map(float, point.split(","))) for line in drawn.splitlines() if "<polyline" in line
              for point in line.split('points="')[1].split('"')[0].split()]
    assert len(points) == 4 and all(0 <= x <= 720 and 0 <= y <= 300 for x, y in points)
    assert points[0][1] > points[2][1], "more bits per byte stand higher"
