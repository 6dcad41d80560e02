"""The page: one file without a reference to any other, made from the numbers of the JSON alone.

Style and script stand in it; its content security policy allows this one script, by its hash, and nothing from
elsewhere. Foreign texts (documents, names of domains and runs) are escaped where they are put in: control characters
and those that turn the direction of writing are spelled out.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from dlcm_lightning.evaluation.analysis import concept_sections, cost_sections
from dlcm_lightning.evaluation.analysis.formatting import fixed, inline, large, plus_minus, whole

SECTIONS = (concept_sections.texts, cost_sections.bits, concept_sections.positions, concept_sections.content,
            concept_sections.lengths, concept_sections.aligned, concept_sections.history, concept_sections.stable,
            cost_sections.costs)


def _resource(name: str) -> str:
    return files("dlcm_lightning.evaluation.analysis").joinpath(name).read_text(encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """report: what the JSON holds."""
    script, style = _resource("page.js"), _resource("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    run = report["run"]
    title = inline(f"{run['name']}: analysis at step {run['step']:,}")
    sections = [section(report) for section in SECTIONS]
    links = " ".join(f'<a href="#{one.key}">{inline(one.title)}</a>' for one in sections)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<style>{style}</style></head>\n<body><header><h1>{title}</h1>{_facts(report)}<nav>{links}</nav></header>"
            f"\n<main>{chr(10).join(one.render() for one in sections)}</main>\n"
            f'<footer>Made by <code>dlcm analyze</code>. Every number stands in the JSON file of the same name; '
            'ticks of axes are round.</footer><div id="about" role="status" hidden></div>'
            f"<script>{script}</script></body></html>\n")


def _facts(report: Mapping[str, Any]) -> str:
    run, rows, other = report["run"], report["rows"], report["against"]
    quality = report["bits_per_byte"]["all"]
    tiles = [(fixed(quality["bits_per_byte"], 3), "bits per byte on the validation rows")]
    if other:
        tiles.append((plus_minus(quality["difference"], quality["difference_error"], sign=True),
                      "bits per byte, minus the other's"))
    if run["kind"] == "dlcm":
        tiles += [(fixed(run["tokens_per_concept"]), f"tokens per concept, target {run['target_ratio']:g}"),
                  (fixed(run["threshold"], 3), "threshold of p")]
    tiles += [(large(run["parameters"]), "parameters"), (large(run["tokens"]), "tokens trained on"),
              (whole(rows["tokens"]), f"tokens looked at, in {whole(rows['documents'])} documents")]
    kind = "dense" if run["kind"] == "dense" else f"DLCM, boundary form {inline(run['form'])}"
    said = f"{inline(run['place'])} \N{MIDDLE DOT} {kind} \N{MIDDLE DOT} computed in fp32"
    if other:
        said += (f"<br>compared with {inline(other['name'])}, step {whole(other['step'])} ({inline(other['place'])}, "
                 f"{other['kind']}, {large(other['parameters'])} parameters, {large(other['tokens'])} tokens), on the "
                 "same tokens")
    listed = "".join(f"<li><b>{number}</b><span>{words}</span></li>" for number, words in tiles)
    return f'<p class="sub">{said}</p><ul class="tiles">{listed}</ul>'
