"""The page of a model: what it is, what it was trained on, how well it does, and what it is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from dlcm_lightning import __version__
from dlcm_lightning.export.portable import Trained
from dlcm_lightning.flops import forward_flops_per_token, matrix_parameters
from dlcm_lightning.run_directory import METRICS_FILE

CURVES = "curves.svg"
COLOURS = ("#1f77b4", "#d95f02", "#2a9d4a", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
WIDTH, HEIGHT, MARGIN = 720, 300, 56


def validations(trained: Trained) -> list[dict[str, Any]]:
    """Of the run up to its checkpoint, oldest first; none where its metrics are not at hand."""
    if trained.folder is None or not (file := trained.folder / METRICS_FILE).is_file():
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed
        if one.get("kind") == "validation" and one["step"] <= trained.step:
            found[one["step"]] = one
    return [found[step] for step in sorted(found)]


def model_card(trained: Trained, name: str, dtype: str, drawn: bool) -> str:
    """Markdown, with the header that the Hub reads."""
    config, model = trained.config, trained.config.model
    weights = matrix_parameters(model)
    total = sum(tensor.numel() for tensor in trained.state.values())
    context = config.data.sequence_length
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation",
        "tags: [dlcm, concept-model, custom_code]", "---", "", f"# {name}", "",
        "A Dynamic Large Concept Model ([arXiv 2512.24617](https://arxiv.org/abs/2512.24617)), pretrained with "
        f"dlcm_lightning {__version__}: a light encoder reads tokens, a learned boundary cuts the text into concepts, "
        "a wide transformer runs once a concept, a decoder predicts the next token from both." if model.kind == "dlcm"
        else f"A dense LLaMA-like baseline, pretrained with dlcm_lightning {__version__}.", "",
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)',
        f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)',
        'batch = tokenizer(["The river"], return_tensors="pt")',
        "print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=64), skip_special_tokens=True)[0])",
        "```", "", "## Size", "", "| | |", "|---|---|", f"| parameters | {total:,} |",
        f"| without embeddings | {weights.non_embedding:,} |", f"| weights in | {dtype} |"]
    if model.kind == "dlcm":
        lines += [
            f"| encoder, backbone, decoder | {model.encoder_layers}, {model.backbone_layers}, {model.decoder_layers} "
            "layers |",
            f"| width of tokens, of concepts | {model.d_token}, {model.d_concept} |",
            f"| boundary | {model.boundary.form}, aimed at {model.boundary.target_ratio:g} tokens per concept |"]
    else:
        lines += [f"| layers, width | {model.decoder_layers}, {model.d_token} |"]
    lines += [
        f"| vocabulary | {model.vocab_size:,} |", f"| context | {context:,} tokens |",
        f"| forward FLOPs per token at that length | {forward_flops_per_token(model, context):.3g} |",
        "", "## Training", "",
        f"{trained.tokens:,} tokens in {trained.step:,} steps of {config.data.tokens_per_step:,}."
        if trained.step else "No step was made.", *_origin(trained), "",
        "| source | domain | weight |", "|---|---|---|",
        *(f"| {_cell(one.name)} | {_cell(one.domain)} | {one.weight:g} |" for one in config.data.sources), ""]
    lines += _results(validations(trained), drawn)
    lines += [
        "## Limits", "",
        "- A base model: it goes on a text. It follows no instructions, has no chat template, and was not made safe; "
        "it repeats what its data hold.",
        f"- Positions beyond {context:,} tokens were never seen in training.",
        *(["- Where concepts end is decided by a threshold here, and was drawn at random in training; tokens per "
           "concept differ (above).",
           "- A cache only goes forward: no assisted decoding, no cropping. Its layers stay on one device."]
          if model.kind == "dlcm" else []),
        "- The Python files are Apache-2.0. Under which licence the weights may be used depends on the data, and on "
        "the model that they begin with where there is one: whoever publishes them has to say.",
        "- `config.yaml` holds every setting of the run that trained it.", ""]
    return "\n".join(lines)


def _origin(trained: Trained) -> list[str]:
    """Where the weights come from, where they were not drawn."""
    source = (trained.upcycled or {}).get("source") or trained.config.train.init_from
    return ["", f"The weights begin with those of {source}."] if source else []


def _results(found: Sequence[dict[str, Any]], drawn: bool) -> list[str]:
    if not found:
        return []
    last = found[-1]
    concepts = "R_thresholded" in last
    head = "| validation | bits per byte |" + (" tokens per concept, drawn | thresholded |" if concepts else "")
    rows = [(domain, values) for domain, values in last.get("domains", {}).items()] + [("all", last)]
    lines = ["## Validation", "", head, "|---|---|" + ("---|---|" if concepts else "")]
    lines += [f"| {_cell(domain)} | {values['bits_per_byte']:.3f} |" + (
        f" {values['R_sampled']:.2f} | {values['R_thresholded']:.2f} |" if concepts else "") for domain, values in rows]
    return [*lines, "", *([f"![Bits per byte over training]({CURVES})", ""] if drawn else [])]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def curves(trained: Trained) -> str:
    """Bits per byte by domain over tokens as an SVG; nothing where there are not two validations."""
    found = validations(trained)
    if len(found) < 2:
        return ""
    lines = {domain: [(one["tokens"], one["domains"][domain]["bits_per_byte"]) for one in found
                      if domain in one.get("domains", {})] for domain in found[-1].get("domains", {})}
    lines["all"] = [(one["tokens"], one["bits_per_byte"]) for one in found]
    return draw(lines)


def draw(lines: dict[str, list[tuple[float, float]]]) -> str:
    """Curves by name, each of points (tokens, bits per byte), on one pair of axes."""
    points = [point for line in lines.values() for point in line]
    right, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    span = max(high - low, 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        return (MARGIN + x / right * (WIDTH - 2 * MARGIN - 90),
                MARGIN / 2 + (high - y) / span * (HEIGHT - 1.5 * MARGIN))

    drawn = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for tick in range(5):
        value = low + span * tick / 4
        _, y = place(0, value)
        end, _ = place(right, value)
        drawn.append(f'<line x1="{MARGIN}" x2="{end:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                     f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for tick in range(5):
        x, y = place(right * tick / 4, low)
        drawn.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{right * tick / 4:.3g}</text>')
    x, y = place(right / 2, low)
    drawn.append(f'<text x="{x:.1f}" y="{y + 36:.1f}" text-anchor="middle">bits per byte over tokens</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{WIDTH - MARGIN - 76}" y="{MARGIN / 2 + 16 * number + 8:.0f}" fill="{colour}">'
                     f"{escape(name)}</text>")
    return "\n".join([*drawn, "</svg>"]) + "\n"
