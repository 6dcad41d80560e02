"""The laws by themselves: as printed, without packages, to JSON and back, not further than they reach."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.law.formula import (
    ConceptLaw,
    DecayLaw,
    DenseLaw,
    FittedDecay,
    FittedLaw,
    LadderLaws,
    Offsets,
    Range,
    body_flops_per_token,
    interval,
)
from dlcm_lightning.scaling.law.synthetic import PLANTED, PLANTED_DECAY, PLANTED_DENSE
from tests.scaling.law.ladders import printed

SEEN = {"N": Range(1e8, 1e9), "D": Range(1e9, 2e10), "R": Range(2.0, 8.0), "P": Range(0.3, 0.7),
        "token_parameters": Range(3e7, 7e8), "concept_parameters": Range(3e7, 7e8)}
LAW = FittedLaw(PLANTED, {"E0": (1.5, 1.7)}, (replace(PLANTED, E0=1.5), PLANTED, replace(PLANTED, E0=1.7)), SEEN, 2.0,
                {"R2": 0.99}, (Offsets(1e8, 0.3, 2, {"t_tok": -1e6, "t_con": 0.0, "t_dat": 1e7}),))


@pytest.mark.parametrize("N, D, R, P", [(87e6, 1e8, 2, 0.3), (833e6, 1.6e10, 8, 0.7), (2e9, 1e12, 4, 0.5)])
def test_law_is_eq_22_as_printed(N: float, D: float, R: float, P: float) -> None:
    assert PLANTED.loss(N, D, R, P) == pytest.approx(printed(PLANTED, N, D, R, P), rel=1e-14)


def test_coarser_concepts_cost_loss_where_gamma_is_above_zero() -> None:
    assert PLANTED.gamma > 0
    assert PLANTED.loss(1e9, 1e10, 8, 0.5) > PLANTED.loss(1e9, 1e10, 2, 0.5)


def test_dense_law_is_the_limit_without_a_concept_term() -> None:
    bare = replace(PLANTED, A_con=0.0)
    dense = DenseLaw(bare.E0, bare.A_tok, bare.t_tok, bare.d1, bare.A_dat, bare.t_dat, bare.alpha)
    assert bare.loss(3e8, 1e10, 4, 0.0) == dense.loss(3e8, 1e10)


def test_decay_is_eq_23_as_printed() -> None:
    assert DecayLaw(0.02, 1.5, 0.1, -0.2).gain(3.0, 1e8, 4.0) == pytest.approx(
        0.02 * 3.0**1.5 * 4.0**0.1 * 1e8**-0.2, rel=1e-14)


def test_backbone_parameters_cost_one_token_in_r() -> None:
    assert body_flops_per_token(1e9, 4, 0.5) == 6 * (0.5e9 + 0.5e9 / 4)
    assert body_flops_per_token(1e9) == 6e9


def test_formula_needs_the_standard_library_only() -> None:
    code = ("import sys; import dlcm_lightning.scaling.law.formula\n"
            "print([name for name in ('numpy', 'scipy', 'pandas', 'torch', 'matplotlib', 'tqdm', 'yaml', 'omegaconf') "
            "if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]"


def test_laws_go_through_json_unchanged() -> None:
    decay = FittedDecay(PLANTED_DECAY, {"k": (0.1, 0.2)}, (PLANTED_DECAY,), {"runs": 3})
    dense = FittedLaw(PLANTED_DENSE, {}, (), {"N": Range(1.0, 2.0), "D": Range(1.0, 2.0)}, 4.0, {})
    laws = LadderLaws(LAW, dense, decay, None, {"table": "a.csv", "seed": 1})
    assert LadderLaws.from_json(laws.to_json()) == laws
    assert LadderLaws.from_json(laws.to_json()).to_json() == laws.to_json()


@pytest.mark.parametrize("text, word", [
    ("{", "not a law"), ("[]", "not a law"), ("{}", "not a law"), ('{"format": 99}', "format 99"),
    ('{"format": 1, "concept": {"law": {"E0": 1}}}', "not a law")])
def test_other_json_is_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        LadderLaws.from_json(text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"law\.json"):
        LadderLaws.read(tmp_path / "law.json")


def test_prediction_has_the_interval_of_the_bootstrap() -> None:
    found = LAW.predict(5e8, 1e10, 4, 0.5)
    assert found.loss == PLANTED.loss(5e8, 1e10, 4, 0.5) and found.factor == 1.0
    assert found.low == pytest.approx(found.loss - 0.095) and found.high == pytest.approx(found.loss + 0.095)


@pytest.mark.parametrize("values, name, factor", [
    ((3e9, 1e10, 4, 0.5), "N", 3.0), ((5e8, 1e12, 4, 0.5), "D", 50.0), ((5e8, 1e10, 32, 0.5), "R", 4.0),
    ((5e8, 1e10, 4, 0.98), "token_parameters", 3.0), ((5e8, 1e10, 0.5, 0.5), "R", 4.0)])
def test_extrapolation_is_refused_beyond_its_factor_unless_asked(values: tuple[float, float, float, float], name: str,
                                                                 factor: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} .* --extrapolation"):
        LAW.predict(*values)
    assert LAW.predict(*values, extrapolation=factor * 1.001).factor == pytest.approx(factor)


def test_interval_is_that_of_numpy() -> None:
    values = np.random.default_rng(0).normal(size=37).tolist()
    assert interval(values) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_constants_have_the_names_of_the_paper() -> None:
    assert list(ConceptLaw.__dataclass_fields__) == ["E0", "A_tok", "t_tok", "d1", "A_con", "gamma", "t_con", "d2",
                                                     "A_dat", "t_dat", "alpha"]
