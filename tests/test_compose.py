"""Composition of YAML files and overrides: what wins, what is refused and in which words, what comes back."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlcm_lightning.compose import RENAMED, differences, load_config, load_saved_config, save_config
from dlcm_lightning.config import Config, ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))
SMOKE = CONFIGS / "run" / "smoke.yaml"
SOURCE = "{name: a, domain: code, weight: 1.0}"


def write(folder: Path, **files: str) -> Path:
    """A configs folder with the given files; returns the one called `run`."""
    for name, text in files.items():
        path = folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "configs" / "run.yaml"


def complete(text: str) -> str:
    return f"name: r\ndata: {{sources: [{SOURCE}]}}\n{text}"


# What is shipped


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_shipped_run_loads_and_is_named_like_its_file(file: Path) -> None:
    assert load_config(file).name == file.stem


@pytest.mark.parametrize("folder", ["model", "data", "optim"])
def test_every_shipped_part_loads_into_a_run(folder: str) -> None:
    files = sorted((CONFIGS / folder).glob("*.yaml"))
    assert files
    filling = ["name=part", "data.corpus=shards"]
    if folder != "data":
        filling.append(f"data.sources=[{SOURCE}]")
    for file in files:
        assert load_config(file, filling).name == "part"


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_header_of_a_run_gives_its_command_and_its_hardware(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    command = next(line for line in header if line.startswith(("# make pretrain", "# sbatch ")))
    if template := re.search(r"slurm/\w+\.sh", command):
        series = re.sub(r"_\d+m$", "_", file.stem)  # the ladder's template puts a size after
        assert f"configs/run/{series}" in (ROOT / template[0]).read_text()
    if given := re.search(r"CONFIG=(\S+)", command):
        assert given[1] == f"configs/run/{file.name}"
    assert template or given or file.stem == "quickstart"
    assert any(line.startswith("# Hardware: ") for line in header)


def test_run_of_the_paper_has_the_paper_s_recipe() -> None:
    config = load_config(CONFIGS / "run" / "dlcm_2b_1t.yaml")
    assert config.data.tokens_per_step == 512 * 8192
    assert config.optim.warmup_tokens == 2000 * config.data.tokens_per_step
    assert config.optim.total_tokens == 10**12
    assert config.optim.lr_token / config.model.s_token == pytest.approx(3e-4)
    assert config.optim.weight_decay == 0.1
    assert config.optim.max_grad_norm == 1.0
    assert {source.name: source.weight for source in config.data.sources} == {
        "nemotron-cc": 0.50, "map-cc": 0.25, "opencoder": 0.15, "megamath": 0.10,
    }


def test_baseline_differs_from_the_run_of_the_paper_in_name_and_model_only() -> None:
    changed = differences(*(load_config(CONFIGS / "run" / f"{name}_1t.yaml") for name in ("dlcm_2b", "dense_1b")))
    assert {field.partition(".")[0] for field in changed} == {"name", "model"}


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_source_gets_whole_rows_of_a_block(file: Path) -> None:
    data = load_config(file).data
    for source in data.sources:
        rows = source.weight * data.block_rows
        assert rows == pytest.approx(round(rows), abs=1e-6)


# What wins


def test_later_wins_bases_then_file_then_overrides_in_order(tmp_path: Path) -> None:
    run = write(
        tmp_path,
        grandparent="optim: {beta1: 0.1, beta2: 0.1, max_grad_norm: 0.1, epsilon: 0.1, weight_decay: 0.1}",
        first="base: [grandparent]\noptim: {beta2: 0.2, max_grad_norm: 0.2, epsilon: 0.2, weight_decay: 0.2}",
        second="optim: {max_grad_norm: 0.3, epsilon: 0.3, weight_decay: 0.3}",
        run=complete("base: [first, second]\noptim: {epsilon: 0.4, weight_decay: 0.4}"),
    )
    optim = load_config(run, ["optim.weight_decay=0.5", "optim.weight_decay=0.6"]).optim
    assert (optim.beta1, optim.beta2, optim.max_grad_norm) == (0.1, 0.2, 0.3)
    assert (optim.epsilon, optim.weight_decay) == (0.4, 0.6)


def test_lists_are_replaced_whole(tmp_path: Path) -> None:
    run = write(
        tmp_path,
        mixture="data: {sources: [{name: x, domain: d, weight: 0.5}, {name: y, domain: d, weight: 0.5}]}",
        run=complete("base: [mixture]"),
    )
    assert [source.name for source in load_config(run).data.sources] == ["a"]


def test_one_base_may_be_reached_by_two_ways(tmp_path: Path) -> None:
    run = write(tmp_path, root="seed: 1", left="base: [root]", right="base: [root]",
                run=complete("base: [left, right]"))
    assert load_config(run).seed == 1


def test_override_reaches_one_item_of_a_list() -> None:
    config = load_config(SMOKE, ["data.sources[0].weight=0.2", "data.sources[5].weight=0.3"])
    assert [source.weight for source in config.data.sources] == [0.2, 0.19, 0.06, 0.12, 0.13, 0.3]
    assert load_config(SMOKE).data.sources[0].weight == 0.25


def test_a_field_may_refer_to_another_and_to_a_default(tmp_path: Path) -> None:
    run = write(tmp_path, run=complete("optim: {lr_token: 0.5, lr_concept: '${optim.lr_token}'}\n"
                                       "seed: ${model.head_dim}"))
    config = load_config(run)
    assert config.optim.lr_concept == 0.5
    assert config.seed == 64


def test_file_outside_a_configs_folder_finds_bases_beside_it(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("seed: 3")
    (tmp_path / "run.yaml").write_text(complete("base: [part]"))
    assert load_config(tmp_path / "run.yaml").seed == 3


# What is refused


@pytest.mark.parametrize(("override", "named", "remedy"), [
    ("model.d_tokn=3", "model.d_tokn = 3", "did you mean model.d_token?"),
    ("d_token=3", "d_token = 3", "did you mean model.d_token?"),
    ("modell.d_concept=3", "modell = {'d_concept': 3}", "did you mean model?"),
    ("model.boundary.frm=paper", "model.boundary.frm = 'paper'", "did you mean model.boundary.form?"),
    ("zzz=1", "zzz = 1", "a run has name, seed, model, data, optim, train"),
    ("model.d_token=abc", "model.d_token = 'abc'", "expected a whole number"),
    ("model.d_token=true", "model.d_token = True", "expected a whole number"),
    ("model.d_token=1.5", "model.d_token = 1.5", "expected a whole number"),
    ("seed=null", "seed = None", "expected a whole number"),
    ("optim.total_tokens=1e9", "optim.total_tokens = 1000000000.0", "write it out, 1000000000"),
    ("optim.max_grad_norm=.inf", "optim.max_grad_norm = inf", "expected a finite number"),
    ("optim.max_grad_norm=.nan", "optim.max_grad_norm = nan", "expected a finite number"),
    ("optim.max_grad_norm=[1]", "optim.max_grad_norm = [1]", "expected a finite number"),
    ("model.boundary.previous_rate=2", "model.boundary.previous_rate = 2", "expected true or false"),
    ("model.kind=dens", "model.kind = 'dens'", "choose one of dlcm, dense (did you mean dense?)"),
    ("train.precision=16", "train.precision = '16'", "choose one of auto, bf16, fp32, fp64"),
    ("data.sources=[{name: null}]", "data.sources[0].name = None", "put it in quotes"),
    ("data.sources=[{name: [a]}]", "data.sources[0].name = ['a']", "put it in quotes"),
    ("seed=99999999999999999999", "seed = 99999999999999999999", "at most 9,223,372,036,854,775,807"),
    ("seed=1e400", "seed = inf", "expected a whole number"),
    ("data=3", "data = 3", "write fields below it, such as data.corpus"),
    ("seed.x=3", "seed = {'x': 3}", "expected a whole number"),
    ("data.sources.weight=1", "data.sources = {'weight': 1}", "expected a list"),
    ("data.sources[9].weight=1", "data.sources[9] = {'weight': 1}", "6 items"),
    ("data.sources[0].weigth=1", "data.sources[0].weigth = 1", "did you mean data.sources[0].weight?"),
    ("data.sources[1].weight=much", "data.sources[1].weight = 'much'", "expected a finite number"),
    ("data.sources=[{nam: a}]", "data.sources[0].nam = 'a'", "did you mean data.sources[0].name?"),
    ("seed=[", "seed = '['", "not a YAML value"),
    ("seed", "'seed'", "written field=value"),
    ("=3", "'=3'", "written field=value"),
])
def test_bad_override_is_answered_with_field_value_and_remedy(override: str, named: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(SMOKE, [override])
    before, _, after = str(refusal.value).partition(" (command line): ")
    assert before == named
    assert remedy in after


def test_bad_value_in_a_file_is_answered_with_that_file(tmp_path: Path) -> None:
    run = write(tmp_path, part="optim: {wieght_decay: 0.1}", run=complete("base: [part]"))
    with pytest.raises(ConfigError) as refusal:
        load_config(run)
    assert str(refusal.value) == (f"optim.wieght_decay = 0.1 (in {tmp_path}/configs/part.yaml): there is no such "
                                  "field; did you mean optim.weight_decay?")


@pytest.mark.parametrize(("value", "field"), [("${sed}", "seed"), ("???", "seed")])
def test_value_that_leads_nowhere_is_named(value: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} \(in .*smoke.yaml\): "):
        load_config(SMOKE, [f"{field}={value}"])


def test_refusal_of_the_dataclasses_passes_through_untouched() -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(SMOKE, ["model.kv_heads_token=3"])
    assert str(refusal.value) == "model.kv_heads_token = 3: must divide model.heads_token = 2"


def test_missing_run_file_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"smok\.yaml': there is no such file; did you mean .*smoke\.yaml\?"):
        load_config(SMOKE.with_name("smok.yaml"))


def test_missing_base_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    run = write(tmp_path, **{"model/tiny": "seed: 1", "run": complete("base: [model/tinny]")})
    with pytest.raises(ConfigError, match=r"^base = 'model/tinny' \(in .*run\.yaml\): .*did you mean model/tiny\?"):
        load_config(run)


def test_bases_that_form_a_circle_are_refused(tmp_path: Path) -> None:
    run = write(tmp_path, first="base: [second]", second="base: [first]", run=complete("base: [first]"))
    with pytest.raises(ConfigError, match=r"circle, run\.yaml -> first\.yaml -> second\.yaml -> first\.yaml"):
        load_config(run)


@pytest.mark.parametrize(("text", "named"), [
    ("base: model/debug", "base = 'model/debug'"),
    ("base: [1]", "base = [1]"),
    ("seed: [1", "not readable as YAML"),
    ("seed: 1\nseed: 2", "not readable as YAML"),
    ("- 1\n- 2", "holds a list"),
])
def test_malformed_file_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_config(write(tmp_path, run=text))


# What comes back


@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_saved_config_loads_back_equal_and_without_bases(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["optim.lr_token=0.1234567890123456789", "train.output_dir='on'"])
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    save_config(config, saved)  # over the first one
    assert load_config(saved) == config
    assert "base" not in {line.partition(":")[0] for line in saved.read_text().splitlines()}
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_differences_are_named_by_their_dotted_fields() -> None:
    config = load_config(SMOKE)
    assert differences(config, config) == []
    other = load_config(SMOKE, ["seed=1", "model.boundary.form=paper", "data.sources[0].weight=0.24",
                                "data.sources[1].weight=0.2"])
    assert differences(config, other) == [
        "seed", "model.boundary.form", "data.sources[0].weight", "data.sources[1].weight",
    ]
    fewer: Config = load_config(SMOKE, [f"data.sources=[{SOURCE}]"])
    assert differences(config, replace(fewer, seed=config.seed)) == ["data.sources"]


def test_loading_takes_no_torch() -> None:
    program = ("import sys; from dlcm_lightning import compose, config, flops; "
               f"flops.matrix_parameters(compose.load_config({str(SMOKE)!r}).model); "
               "print(sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          cwd=CONFIGS.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["1e5", "007", "1_000", "0x1f", "true", "off", "2026-11-26", "1:30", "null", "~"])
def test_text_fields_take_the_text_as_it_is_typed(tmp_path: Path, text: str) -> None:
    assert load_config(SMOKE, [f"train.output_dir=a/{text}"]).train.output_dir == f"a/{text}"
    if text not in ("null", "~", "1:30"):  # which YAML reads as nothing, and what is no name
        assert load_config(SMOKE, [f"name={text}"]).name == text
        run = write(tmp_path, run=f"name: {text}\ndata: {{sources: [{{name: {text}, domain: d, weight: 1}}]}}")
        config = load_config(run)
        assert (config.name, config.data.sources[0].name) == (text, text)
        assert load_config(SMOKE, [f"data.sources=[{{name: {text}, domain: {text}, weight: 1}}]"]
                           ).data.sources[0].domain == text
    assert load_config(SMOKE, [f"train.output_dir='{text}'"]).train.output_dir == text.replace("~", str(Path.home()))


@pytest.mark.parametrize("name", [
    "..", ".", "../x", "a/b", "-x", ".hidden", "a b", "a;b", "a\nb", "$HOME", "x" * 129, ""])
def test_names_that_would_lead_elsewhere_or_need_quotes_are_refused(name: str) -> None:
    for override in (f"name={name}", f"data.sources[0].name={name}"):
        with pytest.raises(ConfigError, match="letters, digits"):
            load_config(SMOKE, [override])


def test_a_home_and_variables_in_a_path_are_replaced_and_addresses_are_no_folders(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOT_SET", raising=False)
    config = load_config(SMOKE, ["train.output_dir=~/runs", "data.root=$SCRATCH/shards"])
    assert (config.train.output_dir, config.data.root) == (f"{Path.home()}/runs", "/scratch/shards")
    assert load_config(SMOKE, ["data.root=s3://bucket/$SCRATCH"]).data.root == "s3://bucket//scratch"
    for override, said in (("data.root=$NOT_SET/x", "NOT_SET is not set"),
                           ("train.output_dir=s3://b/x", "file systems"),
                           ("train.output_dir=file:x", "file systems"), ("train.output_dir=s3:/b/x", "file systems"),
                           ("train.output_dir=", "give a path"),
                           ("train.output_dir=~nobody-of-that-name/x", "no home folder")):
        with pytest.raises(ConfigError, match=said):
            load_config(SMOKE, [override])


@pytest.mark.parametrize("override", [
    "optim.total_tokens=10000000000000000000000", "optim.total_tokens=1000000000000000001", "data.sequence_length=0",
    "data.sequence_length=99999999999", "data.global_batch_size=-1", "model.vocab_size=99999999999",
                                      "model.head_dim=1000000000",
    "model.encoder_layers=100000", "data.workers=100000", "seed=-1", "optim.max_grad_norm=1e300", "optim.lr_token=1e9",
    "model.rope_base=-1", "model.rope_base=0", "job.step_minutes=1e9", "train.keep_every_tokens=-1",
    "data.sources[0].max_epochs=1e30", "model.boundary.target_ratio=1e300", "train.devices=1000000", "train.nodes=-1",
])
def test_every_number_is_bounded_where_it_is_given(override: str) -> None:
    with pytest.raises(ConfigError, match=r"must be|use 0 or more|at most|must exceed|even head"):
        load_config(SMOKE, [override])


@pytest.mark.parametrize(("old", "new"), sorted(RENAMED.items()))
def test_an_old_field_name_is_refused_with_the_new_one_and_understood_where_a_run_saved_it(
    old: str, new: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(old)} = .*the field is called {re.escape(new)} now"):
        load_config(SMOKE, [f"{old}=3"])
    saved = tmp_path / "config.yaml"
    config = load_config(SMOKE)
    save_config(config, saved)
    key = new.split(".")[1]
    text = re.sub(rf"^  {key}:", f"  {old.split('.')[1]}:", saved.read_text(), count=1, flags=re.MULTILINE)
    assert text != saved.read_text()
    saved.write_text(text)
    with pytest.raises(ConfigError, match="the field is called"):
        load_config(saved)
    assert load_saved_config(saved) == config
    assert load_saved_config(saved, ["seed=9"]).seed == 9
