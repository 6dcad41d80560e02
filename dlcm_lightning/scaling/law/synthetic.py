"""Trajectories of a ladder with planted constants, to see whether a fit finds them: no measurement of anything.

`python -m dlcm_lightning.scaling.law.synthetic ladder.csv` writes such a table.

The grid is the paper's: N in {87M, 274M, 468M, 833M}, P in {30, 50, 70 %}, R in {2, 4, 8}, 20 tokens a parameter (ours:
the paper prints no budget). No constant of its law is printed either, so the planted ones are made up: of the size that
published laws of dense models have, and gains in concepts that a fit has to work for.

Noise has two parts: what a run has as a whole (seed, order of data), and what one validation has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dlcm_lightning.scaling.law.formula import ConceptLaw, DecayLaw, DenseLaw, body_flops_per_token

SIZES = (87e6, 274e6, 468e6, 833e6)
SHARES = (0.3, 0.5, 0.7)
RATIOS = (2.0, 4.0, 8.0)
TOKENS_PER_PARAMETER = 20.0
PLANTED = ConceptLaw(E0=1.6, A_tok=260.0, t_tok=8e6, d1=0.36, A_con=52.0, gamma=0.25, t_con=2e7, d2=0.31, A_dat=900.0,
                     t_dat=3e7, alpha=0.34)
PLANTED_DENSE = DenseLaw(E0=1.6, A_tok=330.0, t_tok=1e7, d1=0.34, A_dat=900.0, t_dat=3e7, alpha=0.34)
PLANTED_DECAY = DecayLaw(k=0.02, a=1.4, b=0.08, c=0.02)


def ladder(law: ConceptLaw | None = PLANTED, dense: DenseLaw | None = PLANTED_DENSE, *,
           sizes: Sequence[float] = SIZES, shares: Sequence[float] = SHARES, ratios: Sequence[float] = RATIOS,
           decay: DecayLaw | None = PLANTED_DECAY, seeds: int = 1, points: int = 16,
           tokens_per_parameter: float = TOKENS_PER_PARAMETER, run_noise: float = 0.002, noise: float = 0.002,
           ratio_noise: float = 0.01, seed: int = 0) -> pd.DataFrame:
    """A table as `table.py` reads it. run_noise, noise: standard deviations of log loss, of a whole run and of one
    measurement. ratio_noise: of the realised R around its target. points: stable rows of a run."""
    generator = np.random.default_rng(seed)
    rows = []
    rungs = [("dlcm", N, P, R) for N in sizes for P in shares for R in ratios] if law else []
    rungs += [("dense", N, 0.0, 1.0) for N in sizes] if dense else []
    for kind, N, P, target in rungs:
        for one in range(seeds):
            run = f"{kind}-{N / 1e6:.0f}m" + (f"-p{100 * P:.0f}-r{target:g}" if kind == "dlcm" else "") + f"-s{one}"
            R = target * float(np.exp(generator.normal(0, ratio_noise))) if kind == "dlcm" else 1.0
            whole = generator.normal(0, run_noise)
            end = tokens_per_parameter * N
            formula = law if kind == "dlcm" else dense
            assert formula is not None
            flops = body_flops_per_token(N, R, P)
            for D in np.linspace(end / points, end, points):
                loss = formula.loss(N, float(D), R, P) * float(np.exp(whole + generator.normal(0, noise)))
                rows.append((run, kind, N, P, target, R, D, loss, "stable", flops * D, one))
            if decay is not None:
                gain = decay.gain(loss, N, R) * float(np.exp(generator.normal(0, 10 * noise)))
                rows.append((run, kind, N, P, target, R, 1.1 * end, loss - gain, "decayed", flops * 1.1 * end, one))
    return pd.DataFrame(rows, columns=["run", "kind", "N", "P", "R_target", "R", "tokens", "loss", "phase", "flops",
                                       "seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the table of a made-up ladder on the paper's grid.")
    parser.add_argument("file", type=Path, help="csv to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    arguments = parser.parse_args()
    table = ladder(seed=arguments.seed)
    table.to_csv(arguments.file, index=False)
    print(f"{arguments.file}: {table['run'].nunique()} made-up runs, {len(table)} rows; noise of 0.2 % a run and "
          "0.2 % a measurement")


if __name__ == "__main__":
    main()
