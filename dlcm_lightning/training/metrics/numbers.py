"""From sums to the numbers people look at.

They are computed where the sums are, so that logging them waits for no device: `metric_tensors` for Lightning's
`self.log`, `metrics_of` for files and tables, which reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dlcm_lightning.config import BoundaryConfig
from dlcm_lightning.training.metrics.sums import COLUMNS, MetricSums
from dlcm_lightning.training.rate_loss import rate_loss


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """nan where there is nothing to divide by."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)


def _describe(sums: Tensor, boundary: BoundaryConfig | None) -> dict[str, Tensor]:
    """sums (..., len(COLUMNS)) -> metrics (...), of a domain or of all together."""
    of = dict(zip(COLUMNS, sums.unbind(-1), strict=True))
    metrics = {
        "loss": _ratio(of["nll"], of["targets"]),
        "bits_per_byte": _ratio(of["nll"], of["bytes"] * math.log(2)),
    }
    if boundary is not None:
        mean = _ratio(of["p"], of["tokens"])
        metrics |= {
            "F": _ratio(of["sampled"], of["tokens"]),
            "G": mean,
            "R_sampled": _ratio(of["tokens"], of["sampled"]),
            "R_thresholded": _ratio(of["tokens"], of[boundary.threshold]),
            "R_half": _ratio(of["tokens"], of["half"]),
            "p_sd": (_ratio(of["p_squared"], of["tokens"]) - mean * mean).clamp(min=0).sqrt(),
            "p_near_half": _ratio(of["near_half"], of["tokens"]),
        }
    return metrics


def _of_the_batch(sums: MetricSums, boundary: BoundaryConfig) -> dict[str, Tensor]:
    """What only the whole batch has."""
    metrics = {}
    if boundary.learned and boundary.rate_scope == "global":
        metrics["rate_loss"] = rate_loss(sums.rate, sums.mean_probability, boundary.target_ratio)
    elif boundary.learned:
        metrics["rate_loss"] = _ratio(sums.scalar("document_rate_loss"), sums.scalar("documents"))
    metrics["concept_imbalance"] = _ratio(sums.scalar("imbalance"), sums.scalar("steps"))
    return metrics


def metric_tensors(sums: MetricSums, domains: list[str], boundary: BoundaryConfig | None) -> dict[str, Tensor]:
    """() float64 each, on the device of the sums: the numbers of `metrics_of` as NAME and NAME/DOMAIN. nan where a
    domain has no tokens. No collective, no host sync."""
    rows = torch.cat([sums.domains.sum(0, keepdim=True), sums.domains])  # (1 + domains, C)
    by_name = {name: values.unbind() for name, values in _describe(rows, boundary).items()}
    metrics = {name: values[0] for name, values in by_name.items()}
    if boundary is not None:
        metrics |= _of_the_batch(sums, boundary)
    return metrics | {f"{name}/{domain}": value for name, values in by_name.items()
                      for domain, value in zip(domains, values[1:], strict=True)}


def metrics_of(sums: MetricSums, domains: list[str], boundary: BoundaryConfig | None) -> dict[str, Any]:
    """Numbers of all domains together, and under "domains" of each that has tokens.

    loss in nats per target, bits_per_byte, F and G, R_sampled, R_thresholded and R_half in tokens per concept (drawn,
    by the model's own threshold, by the paper's one half), p_sd, p_near_half, the share of tokens with |p - 1/2| <
    0.05, concept_imbalance, the most concepts of a rank over the mean of all, averaged over steps, and rate_loss by the
    formula that is optimised: of the whole batch, or the mean of the documents'. Forms without one (rule, fixed) have
    none. boundary: None for a dense model, which has none of this.
    """
    sums = sums.to(torch.device("cpu"))
    metrics: dict[str, Any] = {"domains": {}}
    present = [domain for domain, row in zip(domains, sums.domains, strict=True) if row[COLUMNS.index("tokens")] > 0]
    for name, value in metric_tensors(sums, domains, boundary).items():
        name, _, domain = name.partition("/")
        if not domain:
            metrics[name] = value.item()
        elif domain in present:
            metrics["domains"].setdefault(domain, {})[name] = value.item()
    metrics["domains"] = metrics.pop("domains")  # last
    return metrics
