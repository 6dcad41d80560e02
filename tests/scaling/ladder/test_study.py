"""What a study file may hold, and what is said where it holds something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dlcm_lightning.config import ConfigError
from dlcm_lightning.scaling.ladder.study import Rates, number
from dlcm_lightning.scaling.ladder.study_file import read_study, study_of

PLAIN: dict[str, Any] = {"name": "x", "base": "smoke", "tokens": 1000}


def test_a_number_stands_for_a_size_and_for_a_rate_and_a_text_for_a_variant() -> None:
    study = study_of({**PLAIN, "sizes": [2e5, {"name": "small", "overrides": ["model.d_token=64"]}],
                      "learning_rates": [1e-3, {"base": 2e-3, "lr_concept": 4e-3}], "variants": ["plain"]}, "here")
    assert [size.label for size in study.sizes] == ["200k", "small"]
    assert [rates.label for rates in study.learning_rates] == ["lr0.001", "lr0.002-concept0.004"]
    assert study.learning_rates[1].given == {"lr_token": 2e-3, "lr_concept": 4e-3, "lr_boundary": 2e-3}
    assert study.variants[0].name == "plain"


def test_a_rate_without_a_base_leaves_the_others_to_the_run_file() -> None:
    assert Rates(lr_other=1e-3).given == {"lr_other": 1e-3}


@pytest.mark.parametrize(("fields", "said"), [
    ({"rations": [2]}, r"rations = \[2\] \(in here\): there is no such field; did you mean ratios\?"),
    ({"decays": {"at": [1], "ovr": 0.1}}, r"decays\.ovr = 0\.1 .* did you mean over\?"),
    ({"sizes": 5}, r"sizes = 5 .*expected a list"),
    ({"sizes": ["big"]}, r"sizes\[0\]\.parameters = 'big' .*a finite number"),
    ({"sizes": [1e6, 1e6]}, "sizes = .*name each value once"),
    ({"sizes": [{"name": "a"}]}, "give a number of parameters, or name and overrides"),
    ({"ratios": [0.5]}, r"ratios\[\] = 0\.5"),
    ({"ratios": [float("nan")]}, r"ratios\[0\] = nan"),
    ({"backbone_shares": [1.0], "sizes": [1e6]}, "both excluded"),
    ({"backbone_shares": [0.5]}, "goes with sizes"),
    ({"backbone_shares": [0.5], "sizes": [{"name": "a", "overrides": ["model.d_token=64"]}]}, "P included"),
    ({"kinds": ["densse"]}, r"kinds\[\] = 'densse': choose one of dlcm, dense"),
    ({"seeds": [0.5]}, r"seeds\[0\] = 0\.5 .*a whole number"),
    ({"tokens": 0}, "give tokens or tokens_per_parameter"),
    ({"tokens_per_parameter": 20}, "give tokens or tokens_per_parameter"),
    ({"decays": {"at": [1]}}, "give the tokens between two"),
    ({"overrides": ["optim.total_tokens=5"]}, "write tokens"),
    ({"overrides": ["seed"]}, "write field=value"),
    ({"overrides": ["optim.decay_fraction=0.1"], "decays": {"at": [1]}, "validate_every": 10},
     r"overrides = 'optim\.decay_fraction=0\.1': decays sets this field itself"),
    ({"variants": [{"name": "a", "overrides": ["train.keep_every_tokens=5"]}], "decays": {"at": [1]},
      "validate_every": 10}, r"variants\[a\]\.overrides = 'train\.keep_every_tokens=5': decays sets"),
    ({"sizes": [{"name": "a", "overrides": ["optim.decay_fraction=0.1"]}], "decays": {"at": [1]},
      "validate_every": 10}, r"sizes\[a\]\.overrides = "),
    ({"name": "a/b"}, "letters, digits"),
    ({"table": "xlsx"}, "choose one of csv, parquet"),
    ({"variants": [{"name": "a", "by_width": {"w": []}}]}, "by_width"),
    ({"transfer": {}}, "give a proxy, or sweeps"),
    ({"transfer": {"proxy": 1e5, "fields": ["lr_tokn"]}}, "choose among lr_token"),
    ({"transfer": {"proxy": 1e5, "factors": [1, 2]}}, "three at least"),
    ({"transfer": {"proxy": 1e5, "factors": [2, 1, 4]}}, "ascending"),
    ({"transfer": {"proxy": 1e5, "factor": 1}}, "must lie above 1"),
    ({"transfer": {"sweeps": [{"name": "D", "widths": ["a"]}]}}, r"widths\[0\] = 'a'"),
    ({"transfer": {"sweeps": [{"name": "D", "widths": [{"name": "a"}, {"name": "b"}]}]}}, "ascending order"),
    ({"transfer": {"sweeps": [{"name": "D", "widths": [{"name": "a"}],
                               "variants": [{"name": "v", "by_width": {"c": []}}]}]}}, "the widths are a"),
])
def test_what_is_wrong_is_named_with_its_place(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        study_of({**PLAIN, **fields}, "here")
    assert "(in here)" in str(caught.value)


def test_a_file_that_is_not_there_is_answered_by_the_nearest_name(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"'ladder_cp': there is no such file; did you mean ladder_cpu\?"):
        read_study("ladder_cp")


def test_numbers_are_read_as_run_files_have_them(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("name: x\nbase: smoke\ntokens: 1_000_000\nsizes: [2e5]\n")
    study = read_study(str(file))
    assert study.tokens == 1_000_000 and study.sizes[0].parameters == 2e5


@pytest.mark.parametrize(("value", "text"), [
    (2e5, "200k"), (52224, "52.2k"), (1.5e6, "1.5M"), (8.7e7, "87M"), (12, "12"), (833e6, "833M"), (2.3e9, "2.3B"),
    (999_999.9999999, "1M")])
def test_sizes_are_named_as_people_name_them(value: float, text: str) -> None:
    assert number(value) == text
