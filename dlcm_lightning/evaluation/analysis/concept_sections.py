"""The page's parts on where concepts end: texts, content types, lengths, alignment, stability, R over training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlcm_lightning.evaluation.analysis.blocks import Section, figure, grid, missing, table
from dlcm_lightning.evaluation.analysis.formatting import fixed, inline, percent, plus_minus, visible, whole
from dlcm_lightning.evaluation.analysis.scales import Axis, spanning
from dlcm_lightning.evaluation.analysis.svg import Dot, Line, bar_chart, dot_chart, legend, line_chart

SERIES = 8
"""Colours of the page."""
TINTS = 4
"""Backgrounds of neighbouring concepts, in turn."""
UNIT_WORDS = {"words": "words", "sentences": "sentences", "lines": "lines", "signs": "punctuation, operators"}
CONVENTION_WORDS = {"last": "last token", "next": "first token after"}


def colour(number: int) -> int:
    """Of a series, from 1."""
    return number % SERIES + 1


def texts(report: Mapping[str, Any]) -> Section:
    parts = []
    for domain, shown in report["documents"]["domains"].items():
        if shown:
            parts.append(f"<h3>{inline(domain)}</h3>")
        for document in shown:
            more = f"The first {whole(document['tokens'])} tokens." if document["shortened"] else (
                f"{whole(document['tokens'])} tokens.")
            cells = "".join(map(_cell, document["cells"]))
            parts.append(f'<figure class="wide"><div class="doc" dir="ltr">{cells}</div>'
                         f"<figcaption>{more}</figcaption></figure>")
    dense = report["run"]["kind"] == "dense"
    lead = ("Validation texts, a few of each domain. Point at a token, or tap it, to see its own loss in nats."
            if dense else
            "Validation texts, a few of each domain. Tokens that one concept pools share a background; the last of "
            "them is the boundary that closes it. Text without a background lies after the last boundary and is "
            "pooled by nobody. Point at a token, or tap it, to see its p, the length of its concept and its own loss "
            "in nats.")
    return Section("documents", "Texts, cut into concepts" if not dense else "Texts", lead, "".join(parts))


def _cell(cell: Mapping[str, Any]) -> str:
    hints = "|".join(";".join(["" if token["p"] is None else fixed(token["p"], 3), "b" * bool(token["boundary"]),
                               "" if token["length"] is None else str(token["length"]),
                               "" if token["loss"] is None else fixed(token["loss"], 2)]) for token in cell["tokens"])
    tint = "" if cell["concept"] is None else f" c{cell['concept'] % TINTS}"
    shown = visible(cell["text"]).replace("\n", '<i class="nl"></i>\n')
    if not cell["text"]:
        shown, tint = '<i class="control"></i>', tint
    return f'<span class="t{tint}" data-i="{hints}">{shown}</span>'


def content(report: Mapping[str, Any]) -> Section:
    lead = ("The package brings ten short passages of each type, written for this purpose. It is a small sample: the "
            "interval is the middle 95&nbsp;% when passages are drawn anew. The tokens are those of this model's "
            "tokenizer, and the paper's texts are not public, so compare the order of the types and not the numbers.")
    found = report["content_types"]
    title = "Tokens per concept by type of content"
    if "absent" in found:
        return Section("content_types", title, lead, missing(found["absent"]))
    types = found["types"].values()
    nearest = min(found["types"]["code"]["paper"], key=lambda one: abs(float(one) - found["target"]))
    rows = [(one["title"], [
        Dot(one["paper"][nearest], 2, f"paper, target {nearest}: {one['paper'][nearest]}", hollow=True),
        Dot(one["tokens_per_concept"], 1, f"this model: {fixed(one['tokens_per_concept'])}", one["low"], one["high"])])
        for one in types]
    values = [value for one in types for value in (one["low"], one["high"], one["paper"][nearest], found["target"])]
    chart = dot_chart(rows, spanning("tokens per concept", values), title, rule=found["target"])
    key = legend([("this model, with its interval", 1, False), (f"paper at target {nearest}", 2, True)])
    lines = [[inline(one["title"]), fixed(one["tokens_per_concept"]), f"{fixed(one['low'])} to {fixed(one['high'])}",
              whole(one["tokens"]), whole(one["concepts"]), whole(one["passages"]),
              *(fixed(value) for value in one["paper"].values())] for one in types]
    targets = list(found["types"]["code"]["paper"])
    header = ["type", f"this model, R = {found['target']:g}", "interval", "tokens", "concepts", "passages",
              *(f"paper, R = {target}" for target in targets)]
    return Section("content_types", title, lead, grid(
        figure("This model and the paper's Table 5", chart, "Further right: longer concepts, more compression. The "
               "dashed line is this model's target; a type left of it is cut more finely than the average.", key))
        + table(header, lines))


def lengths(report: Mapping[str, Any]) -> Section:
    lead = ("How many tokens the concepts of the validation rows pool. The first token of a piece is a concept of its "
            "own by definition and is left out here; R counts all tokens and all boundaries.")
    found, title = report["concept_lengths"], "Lengths of concepts"
    if "absent" in found:
        return Section("concept_lengths", title, lead, missing(found["absent"]))
    longest, charts = found["longest"], []
    highest = max(_share(one["counts"], number) for one in found["domains"].values() for number in range(longest + 1))
    for number, (domain, one) in enumerate(found["domains"].items()):
        bars = [(str(length + 1) if length < longest else f"{longest + 1}+", _share(one["counts"], length),
                 f"{length + 1}{'+' * (length == longest)} tokens: {whole(count)} concepts")
                for length, count in enumerate(one["counts"])]
        charts.append(figure(domain, bar_chart(bars, "tokens", spanning("share", [0, highest]), domain, colour(number),
                                               marked=_bar_of(one["median"], longest)),
                             f"Median {one['median']}, mean {fixed(one['mean'])} tokens, {whole(one['concepts'])} "
                             "concepts. The dashed line is the median."))
    header = ["domain", "concepts", "mean", "10 % up to", "median", "90 % up to", "tokens", "boundaries", "R"]
    lines = [[inline(name), whole(one["concepts"]), fixed(one["mean"]), whole(one["tenth"]), whole(one["median"]),
              whole(one["ninetieth"]), whole(one["tokens"]), whole(one["boundaries"]), fixed(one["tokens_per_concept"])]
             for name, one in [*found["domains"].items(), ("all", found["all"])]]
    return Section("concept_lengths", title, lead, grid(*charts) + table(
        header, lines, "R is what training logs as R thresholded: all tokens over all boundaries."))


def _bar_of(length: int | None, longest: int) -> str:
    """The name of the bar that a length is counted in."""
    return "" if length is None else str(length) if length <= longest else f"{longest + 1}+"


def _share(counts: list[int], number: int) -> float:
    return counts[number] / (sum(counts) or 1)


def aligned(report: Mapping[str, Any]) -> Section:
    lead = ("Whether boundaries fall on the units of the text. The boundary token closes its concept, and the concept "
            "is seen from that token on; so a boundary can stand on the last token of a unit, or on the first token "
            "after it. Both are counted, and the one further above chance is shown. Chance is exact: the expected "
            "value when each piece's boundaries fall on any of its tokens, all choices alike.")
    found, title = report["alignment"], "Boundaries and the units of text"
    if "absent" in found:
        return Section("alignment", title, lead, missing(found["absent"]))
    rows, lines, names = [], [], [name for name in found["domains"] if name != "all"]
    for unit, words in UNIT_WORDS.items():
        dots = []
        for number, name in enumerate(names):
            one = found["domains"][name][unit]
            best = one[one["stronger"]]
            if best["enrichment"] is not None and best["units"] >= found["least_drawn"]:
                dots.append(Dot(best["enrichment"], colour(number), f"{name}, {CONVENTION_WORDS[one['stronger']]}: "
                                f"{fixed(best['enrichment'])} times chance"))
        rows.append((words, dots))
        for name in ["all", *names]:
            one = found["domains"][name][unit]
            for convention in ("last", "next"):
                measured = one[convention]
                mark = " \N{LEFTWARDS ARROW}" if convention == one["stronger"] and measured["enrichment"] else ""
                lines.append([inline(words), inline(name), CONVENTION_WORDS[convention] + mark,
                              whole(measured["units"]), percent(measured["precision"]), percent(measured["recall"]),
                              fixed(measured["f1"], 3),
                              percent(measured["random_precision"]), fixed(measured["enrichment"])])
    values = [dot.value for _, dots in rows for dot in dots] or [1.0]
    chart = dot_chart(rows, spanning("precision, times that of chance", values, include=(0, 1)), title, rule=1)
    header = ["unit", "domain", "boundary on the", "units", "precision", "recall", "F1", "precision by chance", "times"]
    return Section("alignment", title, lead, grid(figure(
        "How far above chance, by domain", chart, "Right of the dashed line, boundaries prefer the unit; left of it, "
        f"they avoid it. Drawn where there are at least {found['least_drawn']} units; scripts without spaces between "
        "words have next to no words in this count.",
        legend([(name, colour(number), False) for number, name in enumerate(names)]))) + table(
        header, lines, "The arrow marks the stronger of the two. Precision: of the boundaries, how many stand there. "
        "Recall: of these places, how many have a boundary. Units that share a token count once.", words=3))


def stable(report: Mapping[str, Any]) -> Section:
    lead = ("Decisions of the kept checkpoints against the newest one, on the same tokens; first tokens of pieces, "
            "which are always boundaries, are left out.")
    found, title = report["stability"], "How much the segmentation still moves"
    if "absent" in found:
        return Section("stability", title, lead, missing(found["absent"]))
    header = ["step", "same decision", "by chance", "F1", "by chance", "boundaries", "tokens", "R"]
    lines = [[whole(one["step"]), percent(one["agreement"], 2), percent(one["chance_agreement"], 2),
              fixed(one["f1"], 3), fixed(one["chance_f1"], 3), whole(one["boundaries"]), whole(one["tokens"]),
              fixed(one["tokens_per_concept"])] for one in found["checkpoints"]]
    notes = "".join(missing(f"Step {one['step']:,} is left out: {one['reason']}") for one in found["skipped"])
    chart = ""
    if len(lines) > 2:
        steps = [one["step"] for one in found["checkpoints"]]
        curves = [Line("F1", [(one["step"], one["f1"]) for one in found["checkpoints"]], 1),
                  Line("chance", [(one["step"], one["chance_f1"]) for one in found["checkpoints"]], 2, dashed=True)]
        chart = grid(figure(f"F1 against step {found['newest']:,}", line_chart(
            curves, Axis("step", min(steps), max(steps)), spanning("F1", [0, 1]), title), "The nearer to 1, the less "
            "the boundaries have moved since."))
    return Section("stability", title, lead, chart + table(
        header, lines, f"Against step {found['newest']:,}. By chance: what two segmentations of these rates would "
        "share if they knew nothing of each other.") + notes)


def history(report: Mapping[str, Any]) -> Section:
    lead = ("Tokens per concept while the model was trained, from its metrics.jsonl. Sampled is what the rate loss "
            "steers; thresholded is what inference gets.")
    found, title = report["ratio_history"], "R over training"
    if "absent" in found:
        return Section("ratio_history", title, lead, missing(found["absent"]))
    whole_run = [Line(words, list(zip(found["tokens"], found["all"][name], strict=True)), number + 1, short=words[:9])
                 for number, (name, words) in enumerate((("R_sampled", "sampled"), ("R_thresholded", "thresholded")))]
    by_domain = [Line(domain, list(zip(found["tokens"], one["R_thresholded"], strict=True)), colour(number))
                 for number, (domain, one) in enumerate(found["domains"].items())]
    x = Axis("tokens trained on", 0, found["tokens"][-1])
    band, charts = (found["low"], found["high"]), []
    said = (f"The band is the target {found['target']:g} and a tenth of it on either side; what lies far above is "
            "drawn at the edge.")
    each = (f" Each point is the mean of {found['lines_per_point']} lines." if found["lines_per_point"] > 1 else "")
    for words, lines, reading in (
            ("All domains", whole_run, f"{said} The gap between the two is what thresholding changes.{each}"),
            ("Thresholded, by domain", by_domain, f"{said} Domains may settle at lengths of their own.{each}")):
        values = [value for line in lines for _, value in line.points if value is not None]
        if not values:
            continue
        top = max(sorted(values)[int(0.98 * (len(values) - 1))], *band)
        clipped = [Line(line.name, [(at, None if value is None else min(value, top * 1.05))
                                    for at, value in line.points], line.colour) for line in lines]
        charts.append(figure(words, line_chart(
            clipped, x, spanning("tokens per concept", [min([*values, band[0]]), top * 1.05]), words, band=band,
            points=False), reading, legend([(line.name, line.colour, False) for line in lines])))
    last = [["all", *(fixed(found["all"][name][-1]) for name in found["all"])],
            *([inline(domain), *(fixed(one[name][-1]) for name in one)] for domain, one in found["domains"].items())]
    return Section("ratio_history", title, lead, grid(*charts) + table(
        ["domain", "sampled", "thresholded"], last, f"At the last point, step {found['steps'][-1]:,}."))


def positions(report: Mapping[str, Any]) -> Section:
    lead = ("The position of a predicted token is its place, from 0, among the tokens that its concept pools. That is "
            "also how far the predicting token lies after the newest boundary: at 0 it has just closed a concept, "
            "which the decoder sees for the first time. Errors are standard errors over documents.")
    found, title = report["loss_by_position"], "Loss by position in the concept"
    if "absent" in found:
        return Section("loss_by_position", title, lead, missing(found["absent"]))
    lines, last = found["positions"], found["last"]
    ticks = [(number, str(number) if number < last else f"{last}+") for number in range(0, last + 1, 2)]
    x = Axis("position of the predicted token", 0, last, ticks=ticks)

    def curve(name: str, value: str, error: str, number: int) -> Line:
        return Line(name, [(one["position"], one[value]) for one in lines], number,
                    [None if one.get(error) is None else (one[value] - one[error], one[value] + one[error])
                     for one in lines],
                    hints=[f"position {one['position']}: {plus_minus(one[value], one.get(error))} nats, "
                           f"{whole(one['tokens'])} tokens" for one in lines])

    own = curve("this model", "loss", "error", 1)
    curves = [own]
    compared = "difference" in lines[0]
    if compared:
        curves.append(curve("the other", "other_loss", "", 2))
    ends = [edge for one in own.spread if one for edge in one] + [value for line in curves for _, value in line.points
                                                                  if value is not None]
    charts = [figure("Loss", line_chart(curves, x, spanning("nats per token", ends), title),
                     "Lower is better. Bars are one standard error.",
                     legend([(line.name, line.colour, False) for line in curves]) if compared else "")]
    if compared:
        gap = curve("difference", "difference", "difference_error", 1)
        edges = [edge for one in gap.spread if one for edge in one] + [one["difference"] for one in lines]
        charts.append(figure("Difference: this model minus the other", line_chart(
            [gap], x, spanning("nats per token", edges, include=(0,)), "difference", rule=0),
            "Below the dashed line this model is better. The paper's model beats its baseline at positions 0 to 2 and "
            "from 16 on, with mixed results between."))
    header = ["position", "tokens", "documents", "loss"] + (["the other", "difference"] if compared else [])
    rows = [[str(one["position"]) + "+" * (one["position"] == last), whole(one["tokens"]), whole(one["documents"]),
             plus_minus(one["loss"], one["error"]),
             *([fixed(one["other_loss"], 3), plus_minus(one["difference"], one["difference_error"], sign=True)]
               if compared else [])] for one in lines]
    return Section("loss_by_position", title, lead, grid(*charts) + table(
        header, rows, "In nats, with one standard error over documents. Positions far back have few tokens."))
