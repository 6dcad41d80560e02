"""Laws with planted constants, as `dlcm ladder fit` would write them; what a plan is asked in the tests."""

from __future__ import annotations

from dataclasses import replace

from dlcm_lightning.compose import load_config
from dlcm_lightning.config import Config
from dlcm_lightning.scaling.law.formula import (
    ConceptLaw,
    DecayLaw,
    DenseLaw,
    FittedDecay,
    FittedLaw,
    LadderLaws,
    Range,
)
from dlcm_lightning.scaling.plan.plan import Plan, plan
from dlcm_lightning.scaling.plan.request import Request

PLANTED = ConceptLaw(E0=1.6, A_tok=260.0, t_tok=8e6, d1=0.36, A_con=52.0, gamma=0.25, t_con=2e7, d2=0.31, A_dat=900.0,
                     t_dat=3e7, alpha=0.34)
"""Its best R lies within 2 to 8, its best P at the largest or beyond."""
COARSE_IS_DEAR = replace(PLANTED, A_con=20.0, gamma=0.6)
"""Its best P lies within 0.3 to 0.7, its best R at the least or below."""
DENSE = DenseLaw(E0=1.6, A_tok=330.0, t_tok=1e7, d1=0.34, A_dat=900.0, t_dat=3e7, alpha=0.34)
SEEN = {"N": Range(87e6, 833e6), "D": Range(1e8, 17e9), "R": Range(1.98, 8.05), "P": Range(0.3, 0.7),
        "token_parameters": Range(26e6, 583e6), "concept_parameters": Range(26e6, 583e6)}


def fitted(law: ConceptLaw = PLANTED, extrapolation: float = 4.0) -> FittedLaw:
    samples = tuple(replace(law, A_dat=amount) for amount in (880.0, 900.0, 920.0))
    return FittedLaw(law, {}, samples, SEEN, extrapolation, {})


def laws(law: ConceptLaw = PLANTED, extrapolation: float = 4.0) -> LadderLaws:
    dense = FittedLaw(DENSE, {}, (replace(DENSE, A_dat=880.0), replace(DENSE, A_dat=920.0)),
                      {name: SEEN[name] for name in ("N", "D")}, extrapolation, {})
    decay = FittedDecay(DecayLaw(k=0.02, a=1.4, b=0.08, c=0.02), {}, (), {})
    return LadderLaws(fitted(law, extrapolation), dense, decay, None, {"table": "ladder.csv"})


def like(run: str = "dlcm_2b_1t") -> Config:
    return load_config(run)


def planned(request: Request, run: str = "dlcm_2b_1t", law: LadderLaws | None = None, name: str = "planned") -> Plan:
    return plan(request, like(run), law, name)
