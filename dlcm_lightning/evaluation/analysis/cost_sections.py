"""The page's parts on what a model gives and costs: bits per byte, and FLOPs beside a dense model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlcm_lightning.evaluation.analysis.blocks import Section, figure, grid, missing, table
from dlcm_lightning.evaluation.analysis.concept_sections import colour
from dlcm_lightning.evaluation.analysis.formatting import fixed, inline, large, percent, plus_minus, whole
from dlcm_lightning.evaluation.analysis.scales import Axis, brief, spanning
from dlcm_lightning.evaluation.analysis.svg import Line, legend, line_chart

PHASE_WORDS = {"score": "reading, head on every token", "prefill": "reading (prefill)", "decode": "writing (decode)"}


def bits(report: Mapping[str, Any]) -> Section:
    lead = ("Bits per byte of the validation rows, thresholded: the numbers of <code>dlcm evaluate</code> on these "
            "rows in fp32. Errors are standard errors over documents.")
    found = report["bits_per_byte"]
    compared = "other_bits_per_byte" in found["all"]
    header = ["domain", "bits per byte", *(["the other", "difference"] if compared else []), "nats per token",
              "predicted tokens", "bytes", "documents"]

    def cells(one: Mapping[str, Any]) -> list[str]:
        return [plus_minus(one["bits_per_byte"], one["error"]),
                *([fixed(one["other_bits_per_byte"], 3),
                   plus_minus(one["difference"], one["difference_error"], sign=True)] if compared else []),
                fixed(one["loss"], 3), whole(one["predicted_tokens"]), whole(one["bytes"]), whole(one["documents"])]

    rows = [[inline(name), *cells(one)] for name, one in [*found["domains"].items(), ("all", found["all"])]]
    buckets = [one for one in found["by_tokens_seen"] if one["bits_per_byte"] is not None]
    labels = [str(one["from"]) if one["from"] == one["to"] else f"{one['from']}\N{EN DASH}{one['to']}"
              for one in found["by_tokens_seen"]]
    x = Axis("tokens of the document seen, from", buckets[0]["from"], buckets[-1]["from"], True,
             [(one["from"], brief(one["from"])) for one in buckets])
    curves = [Line("this model", [(one["from"], one["bits_per_byte"]) for one in buckets], 1,
                   [None if one["error"] is None else (one["bits_per_byte"] - one["error"],
                                                       one["bits_per_byte"] + one["error"]) for one in buckets],
                   hints=[f"{one['from']} to {one['to']} tokens seen: {fixed(one['bits_per_byte'], 3)} bits per byte, "
                          f"{whole(one['predicted_tokens'])} tokens" for one in buckets])]
    if compared:
        curves.append(Line("the other", [(one["from"], one["other_bits_per_byte"]) for one in buckets], 2))
    ends = [edge for one in curves[0].spread if one for edge in one]
    ends += [value for line in curves for _, value in line.points if value is not None]
    chart = figure("By how much of the document it sees", line_chart(
        curves, x, spanning("bits per byte", ends), "bits"), "How much context helps: a model that uses what came "
        "before falls from left to right.",
                   legend([(line.name, line.colour, False) for line in curves]) if compared else "")
    seen = [[label, *cells(one)] for label, one in zip(labels, found["by_tokens_seen"], strict=True)]
    return Section("bits_per_byte", "Bits per byte", lead, table(header, rows, "Lower is better." + (
        " Difference: this model minus the other, below zero this model is better." if compared else ""))
        + grid(chart) + table(["tokens seen", *header[1:]], seen, "Seen: tokens of the piece up to and with the "
                              "predicting one. The end of a text is predicted too and has no bytes."))


def costs(report: Mapping[str, Any]) -> Section:
    lead = ("FLOPs per token, counted from the shapes. The dense partner is made as the paper makes its baseline: "
            "equal width, as many layers as the three stacks together, and an FFN that gives equal matrix weights per "
            "token in the body at the target R. It stays the same while R varies. FLOPs are no time: decoding is bound "
            "by memory, which is not counted here.")
    found = report["compute"]
    body = missing("A dense model has no one DLCM beside it; the paper's model stands alone below.")
    if "own" in found:
        body = _own(found)
    return Section("compute", "FLOPs beside a dense model", lead, body + _paper(found))


def _own(found: Mapping[str, Any]) -> str:
    own, contexts = found["own"], found["contexts"]
    x = Axis("tokens of text", contexts[0], contexts[-1], True)
    charts = []
    everything = [value for phase in ("prefill", "decode") for one in own["phases"][phase]["ratios"]
                  for value in one["relative"]]
    y = spanning("FLOPs, dense = 1", everything, include=(0, 1))
    for phase in ("prefill", "decode"):
        lines = [Line(_ratio_name(one), list(zip(contexts, one["relative"], strict=True)), colour(number),
                      dashed=one["realised"], short=f"R = {one['ratio']:.3g}",
                      hints=[f"{_ratio_name(one)}, {brief(context)} tokens: {fixed(value, 3)} of dense"
                             for context, value in zip(contexts, one["relative"], strict=True)])
                 for number, one in enumerate(own["phases"][phase]["ratios"])]
        words = PHASE_WORDS[phase]
        charts.append(figure(words.capitalize(), line_chart(lines, x, y, words, rule=1),
                             f"Below the dashed line at 1 this model needs fewer FLOPs than the dense partner of R = "
                             f"{own['target']:g}.",
                             legend([(line.name, line.colour, line.dashed) for line in lines])))
    partner = own["partner"]
    rows = [[words, _ratio_name(one), *(f"{large(flops)} ({fixed(relative)})" for flops, relative in
                                        zip(one["dlcm"], one["relative"], strict=True))]
            for phase, words in PHASE_WORDS.items() for one in own["phases"][phase]["ratios"]]
    rows += [[words, "dense", *(large(one) for one in own["phases"][phase]["dense"])]
             for phase, words in PHASE_WORDS.items()]
    reading = (f"FLOPs per token, and in brackets relative to the dense partner: {partner['layers']} layers, width "
               f"{partner['width']}, {partner['heads']} heads, FFN {fixed(partner['ffn'], 1)}.")
    return grid(*charts) + table(["tokens of text", "R", *map(brief, contexts)], rows, reading, words=2)


def _ratio_name(one: Mapping[str, Any]) -> str:
    return f"R = {fixed(one['ratio'])}, as found" if one["realised"] else f"R = {one['ratio']:g}"


def _paper(found: Mapping[str, Any]) -> str:
    paper, contexts = found["paper"], found["contexts"]
    at, saved, weights = paper["at_context"], paper["saved"], paper["weights_per_token"]
    reached = paper["reached"]
    text = (f"<h3>The paper's model and its claim</h3><p>The paper speaks of "
            f"{percent(paper['claimed'], 0)} lower inference FLOPs. Its Table 3 is matched: body weights per token are "
            f"{whole(int(weights['dlcm']))} in the DLCM at R = {paper['target']:g} and {whole(int(weights['dense']))} "
            f"in the baseline. By this count, at {brief(paper['context'])} tokens, the DLCM needs {fixed(at['score'])} "
            f"of the baseline's FLOPs with the head on every token, {fixed(at['prefill'])} in prefill and "
            f"{fixed(at['decode'])} in decoding: a saving of {percent(saved['score'], 0)}, "
            f"{percent(saved['prefill'], 0)} and {percent(saved['decode'], 0)}, all of it from attention. Against a "
            f"dense model of the same <em>parameters</em>, {whole(weights['same_parameters'])} body weights that every "
            f"token meets, the DLCM's body takes {fixed(paper['of_same_parameters'])} of the FLOPs; the "
            f"backbone takes {percent(paper['backbone_share'], 0)} of the DLCM's own body.</p>")
    lines = [Line(words, list(zip(contexts, paper["relative"][phase], strict=True)), number + 1, short=phase,
                  hints=[f"{brief(context)} tokens: {fixed(value, 3)} of dense"
                         for context, value in zip(contexts, paper["relative"][phase], strict=True)])
             for number, (phase, words) in enumerate(PHASE_WORDS.items())]
    values = [value for line in lines for _, value in line.points if value is not None]
    chart = figure(f"Table 3's model at R = {paper['target']:g}", line_chart(
        lines, Axis("tokens of text", contexts[0], contexts[-1], True),
        spanning("FLOPs, baseline = 1", values, include=(0, 1)), "Table 3", rule=1 - paper["claimed"]),
        f"The dashed line is the claimed saving of {percent(paper['claimed'], 0)}.",
        legend([(line.name, line.colour, False) for line in lines]))
    by_context = [[PHASE_WORDS[phase], *(fixed(one, 3) for one in paper["relative"][phase])] for phase in PHASE_WORDS]
    by_ratio = [[PHASE_WORDS[phase], *(fixed(one, 3) for one in paper["over_ratios"][phase]),
                 "not here" if reached[phase] is None else f"R = {reached[phase]}"] for phase in PHASE_WORDS]
    return text + grid(chart) + table(
        [f"R = {paper['target']:g}, tokens of text", *map(brief, contexts)], by_context,
        "FLOPs relative to the baseline.") + table(
        [f"at {brief(paper['context'])} tokens", *(f"R = {ratio}" for ratio in paper["ratios"]),
         f"{percent(paper['claimed'], 0)} saved from"], by_ratio,
        f"The baseline stays that of R = {paper['target']:g}, so that a larger R saves body FLOPs too.")
