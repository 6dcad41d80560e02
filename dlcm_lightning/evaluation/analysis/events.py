"""The figures as TensorBoard events: curves as scalars over their own x axis, histograms, tables and texts.

They stand in a folder beside the page, which is made anew; TensorBoard shows it as a run of its own, RUN/analysis-STEP.
The axis "step" of a scalar is the position in the concept, the tokens seen, the tokens of text, the tokens trained on.
Texts pass TensorBoard's Markdown, so that they are escaped and a bar stands between two concepts.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dlcm_lightning.data.inspection.table import escape_control_characters
from dlcm_lightning.evaluation.analysis.formatting import fixed, percent, whole

EVENTS = "events.out.tfevents.*"
BAR = "\N{BOX DRAWINGS LIGHT VERTICAL}"


def write_events(folder: Path, report: Mapping[str, Any]) -> None:
    """folder: made where it is not there; older events in it are removed."""
    folder.mkdir(exist_ok=True)
    for older in folder.glob(EVENTS):
        older.unlink()
    with SummaryWriter(str(folder)) as board:
        _bits(board, report["bits_per_byte"])
        for key, write in (("loss_by_position", _positions), ("ratio_history", _history),
                           ("concept_lengths", _lengths), ("content_types", _content), ("alignment", _alignment),
                           ("stability", _stability)):
            if "absent" not in report[key]:
                write(board, report[key])
        _compute(board, report["compute"])
        _documents(board, report["documents"])


def _curve(board: SummaryWriter, tag: str, points: Iterable[tuple[int, float | None]]) -> None:
    for step, value in points:
        if value is not None:
            board.add_scalar(tag, value, step)


def _table(board: SummaryWriter, tag: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [header, ["---"] * len(header), *rows]
    board.add_text(tag, "\n".join("| " + " | ".join(map(_safe, line)) + " |" for line in lines), 0)


def _safe(text: str) -> str:
    """For a cell of Markdown."""
    shown = html.escape(escape_control_characters(text))
    return "".join(f"&#{ord(one)};" if one in "|`*_[]\\~" else one for one in shown)


def _bits(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for name in ("bits_per_byte", "other_bits_per_byte", "difference"):
        if name in found["all"]:
            _curve(board, f"analysis_tokens_seen/{name}", ((one["from"], one[name]) for one in found["by_tokens_seen"]))
    _table(board, "analysis/bits_per_byte", ["domain", "bits per byte", "nats per token", "tokens", "bytes"],
           [[name, fixed(one["bits_per_byte"], 4), fixed(one["loss"], 4), whole(one["predicted_tokens"]),
             whole(one["bytes"])] for name, one in [*found["domains"].items(), ("all", found["all"])]])


def _positions(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for name in ("loss", "other_loss", "difference", "tokens"):
        if name in found["positions"][0]:
            _curve(board, f"analysis_position_in_concept/{name}",
                   ((one["position"], one[name]) for one in found["positions"]))


def _history(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for name, values in found["all"].items():
        _curve(board, f"analysis_training/{name}", zip(found["tokens"], values, strict=True))
    for domain, by_name in found["domains"].items():
        for name, values in by_name.items():
            _curve(board, f"analysis_training_domains/{name}_{domain}", zip(found["tokens"], values, strict=True))


def _lengths(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for domain, one in found["domains"].items():
        counts = one["counts"]
        values = range(1, len(counts) + 1)
        board.add_histogram_raw(
            f"analysis_concept_length/{domain}", min=1, max=len(counts), num=sum(counts),
            sum=sum(value * count for value, count in zip(values, counts, strict=True)),
            sum_squares=sum(value**2 * count for value, count in zip(values, counts, strict=True)),
            bucket_limits=[value + 0.5 for value in values], bucket_counts=counts, global_step=0)


def _content(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    types = list(found["types"].values())
    targets = list(types[0]["paper"])
    _table(board, "analysis/content_types",
           ["type", f"target {found['target']:g}", "low", "high", "tokens", *(f"paper, {one}" for one in targets)],
           [[one["title"], fixed(one["tokens_per_concept"]), fixed(one["low"]), fixed(one["high"]),
             whole(one["tokens"]), *(fixed(one["paper"][target]) for target in targets)] for one in types])


def _alignment(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    rows = [[unit, domain, convention, percent(one[convention]["precision"]), percent(one[convention]["recall"]),
             fixed(one[convention]["f1"], 3), percent(one[convention]["random_precision"]),
             fixed(one[convention]["enrichment"])]
            for domain, units in found["domains"].items() for unit, one in units.items()
            for convention in ("last", "next")]
    _table(board, "analysis/alignment",
           ["unit", "domain", "token", "precision", "recall", "F1", "by chance", "enrichment"], rows)


def _stability(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for name in ("agreement", "f1", "chance_agreement", "chance_f1"):
        _curve(board, f"analysis_stability/{name}", ((one["step"], one[name]) for one in found["checkpoints"]))


def _compute(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for phase, values in found["paper"]["relative"].items():
        _curve(board, f"analysis_flops_table_3/{phase}", zip(found["contexts"], values, strict=True))
    for phase, costs in found.get("own", {}).get("phases", {}).items():
        for one in costs["ratios"]:
            name = "found" if one["realised"] else f"{one['ratio']:g}"
            _curve(board, f"analysis_flops/{phase}_R_{name}", zip(found["contexts"], one["relative"], strict=True))


def _documents(board: SummaryWriter, found: Mapping[str, Any]) -> None:
    for domain, shown in found["domains"].items():
        texts = []
        for document in shown:
            spans = itertools.groupby(document["cells"], key=lambda cell: cell["concept"])
            joined = BAR.join("".join(cell["text"] for cell in cells) for _, cells in spans)
            texts.append(f"<p>{html.escape(escape_control_characters(joined, keep=chr(10)))}</p>")
        board.add_text(f"analysis_concepts/{domain}", "\n\n".join(texts), 0)
