"""The table of a validation, for people: bits per byte of each domain beside what counting models reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dlcm_lightning.data.ngram import NgramBaseline, ngram_baselines
from dlcm_lightning.data.reader import Reader
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log


def baselines_of(reader: Reader, log: Log) -> list[NgramBaseline]:
    """Those of the validation rows; none where shards that they count are damaged: the model was trained all the
    same."""
    try:
        return ngram_baselines(reader)
    except DataError as error:
        log(f"unigram and trigram are left out: {error}")
        return []


def validation_table(validation: dict[str, Any], counted: Iterable[NgramBaseline]) -> str:
    """Per domain: bits per byte beside the n-gram baselines of the same rows, tokens per concept."""
    baselines = {one.domain: one for one in counted}
    segmented = "R_sampled" in validation
    header = f"{'validation':<12}{'bits/byte':>10}{'unigram':>10}{'trigram':>10}"
    lines = [header + (f"{'R sampled':>12}{'R thresh.':>11}" if segmented else "")]
    for domain, metrics in validation["domains"].items():
        baseline = baselines.get(domain)
        figures = f"{baseline.unigram:>10.3f}{baseline.trigram:>10.3f}" if baseline else f"{'-':>10}{'-':>10}"
        line = f"{domain:<12}{metrics['bits_per_byte']:>10.3f}{figures}"
        if segmented:
            line += f"{metrics['R_sampled']:>12.2f}{metrics['R_thresholded']:>11.2f}"
        lines.append(line)
    line = f"{'all':<12}{validation['bits_per_byte']:>10.3f}{'':>20}"
    if segmented:
        line += f"{validation['R_sampled']:>12.2f}{validation['R_thresholded']:>11.2f}"
    return "\n".join([*lines, line])
