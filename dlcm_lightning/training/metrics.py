"""From a tally to the numbers people look at."""

from __future__ import annotations

import math
from typing import Any

from dlcm_lightning.config import BoundaryConfig
from dlcm_lightning.training.objective import COLUMNS, Tally, rate_loss


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def _describe(sums: list[float], segmented: bool) -> dict[str, float]:
    """Metrics of one row of a tally (one domain, or all together)."""
    of = dict(zip(COLUMNS, sums, strict=True))
    metrics = {
        "loss": _ratio(of["nll"], of["targets"]),
        "bits_per_byte": _ratio(of["nll"], of["bytes"] * math.log(2)),
    }
    if segmented:
        mean = _ratio(of["p"], of["tokens"])
        metrics |= {
            "F": _ratio(of["sampled"], of["tokens"]),
            "G": mean,
            "R_sampled": _ratio(of["tokens"], of["sampled"]),
            "R_thresholded": _ratio(of["tokens"], of["thresholded"]),
            "p_sd": math.sqrt(max(0.0, _ratio(of["p_squared"], of["tokens"]) - mean * mean)),
            "p_near_half": _ratio(of["near_half"], of["tokens"]),
        }
    return metrics


def metrics_of(tally: Tally, domains: list[str], boundary: BoundaryConfig | None) -> dict[str, Any]:
    """Numbers of all domains together, and under "domains" of each that has tokens.

    loss in nats per target, bits_per_byte, F and G, R_sampled and R_thresholded in tokens per concept, p_sd,
    p_near_half, the share of tokens with |p - 1/2| < 0.05, concept_imbalance, the most concepts of a rank over the
    mean of all, averaged over steps, and rate_loss by the formula that is optimised: of the whole batch, or the mean of
    the documents'. Forms without one (rule, fixed) have none. boundary: None for a dense model, which has none of this.
    """
    sums = tally.domains.cpu()
    segmented = boundary is not None
    metrics: dict[str, Any] = _describe(sums.sum(0).tolist(), segmented)
    if boundary is not None:
        if boundary.learned and boundary.rate_scope == "global":
            metrics["rate_loss"] = rate_loss(tally.rate, tally.mean_probability, boundary.target_ratio).item()
        elif boundary.learned:
            metrics["rate_loss"] = _ratio(tally.scalar("document_rate_loss").item(), tally.scalar("documents").item())
        metrics["concept_imbalance"] = _ratio(tally.scalar("imbalance").item(), tally.scalar("steps").item())
    metrics["domains"] = {
        domain: _describe(row, segmented)
        for domain, row in zip(domains, sums.tolist(), strict=True) if row[COLUMNS.index("tokens")] > 0
    }
    return metrics
