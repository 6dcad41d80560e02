"""A plan as a run file: the known run as its base, and what differs from it.

    base: [run/dlcm_2b_1t]
    name: mine
    model: {d_token: 768, ...}

composes to the plan's configuration wherever the file lies: a base below `configs/` is named as it is there, any other
by its whole path.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlcm_lightning.atomic_io import write_atomically
from dlcm_lightning.compose import differences
from dlcm_lightning.errors import RunError
from dlcm_lightning.flops import matrix_parameters
from dlcm_lightning.scaling.estimate import duration
from dlcm_lightning.scaling.plan.plan import Plan
from dlcm_lightning.scaling.plan.report import interval, outside
from dlcm_lightning.shipped import root

COMMENT = 118
"""Characters of a line of the header."""
GROUPED = 10_000
"""Whole numbers from here on are written in groups of three digits."""


def write_run_file(plan: Plan, like_file: Path, command: str, to: Path) -> None:
    """RunError: something stands at `to` already, or it cannot be written."""
    text = run_file_text(plan, like_file, command, to)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.exists():
            raise RunError(f"{to} is there already; move it away, or choose another --out")
        write_atomically(to, text.encode())
    except OSError as error:
        raise RunError(f"{to} cannot be written: {error}; choose a folder that is yours") from error


def run_file_text(plan: Plan, like_file: Path, command: str, to: Path) -> str:
    """like_file: of the known run. command: the line that made the plan. to: where the file will lie."""
    lines = [f"# {line}" for text in _header(plan, command, to) for line in _wrapped(text)]
    lines.append(f"base: [{base_name(like_file, to)}]")
    lines += _yaml(_differing(plan))
    return "\n".join(lines) + "\n"


def _header(plan: Plan, command: str, to: Path) -> Iterator[str]:
    weights, hardware = matrix_parameters(plan.model), plan.hardware
    seconds = plan.flops / (hardware.ranks * hardware.peak_flops * hardware.mfu)
    yield (f"Planned: N = {weights.non_embedding:,}, P = {weights.backbone_share:.3f}, "
           f"R = {plan.model.boundary.target_ratio:g} on {plan.tokens:,} tokens, {plan.flops:.3e} FLOPs.")
    yield command
    yield f"dlcm pretrain {to}      (memory: dlcm estimate {to})"
    yield (f"Hardware: {hardware.nodes} x {hardware.gpus_per_node} GPUs of {hardware.gpu_bytes / 1e9:g} GB; "
           f"{duration(seconds)} at {100 * hardware.mfu:.3g} % of {hardware.peak_flops / 1e12:g} TFLOP/s "
           f"({hardware.mfu_origin}).")
    yield f"{plan.config.total_steps:,} steps of {plan.config.data.tokens_per_step:,} tokens."
    if plan.prediction is not None:
        yield f"Predicted: {interval(plan.prediction)} nats a token at constant rate, {outside(plan.prediction)}."
    for note in plan.notes:
        yield f"- {note}"
    yield "Not run yet: no time and no result to report."


def _wrapped(text: str) -> list[str]:
    """Lines of the header; a command stays whole, to be copied."""
    if text.startswith("dlcm "):
        return [text]
    return textwrap.wrap(text, COMMENT, break_long_words=False, break_on_hyphens=False,
                         subsequent_indent="  " if text.startswith("- ") else "")


def base_name(like_file: Path, to: Path) -> str:
    """How a run file at `to` names another as its base; compose.py looks in the folder configs above it, else beside
    it, and then among what is shipped."""
    like_file, to = like_file.resolve(), to.resolve()
    own = next((folder for folder in to.parents if folder.name == "configs"), to.parent)
    for folder in (own, root().resolve() / "configs"):
        if like_file.is_relative_to(folder):
            relative = like_file.relative_to(folder)
            if folder == own or not (own / relative).is_file():
                return str(relative.with_suffix("")) if relative.suffix == ".yaml" else str(relative)
    return str(like_file)


def _differing(plan: Plan) -> dict[str, Any]:
    """Fields that are not the known run's, as a tree."""
    tree: dict[str, Any] = {}
    for name in differences(plan.like, plan.config):
        *sections, key = name.split(".")
        value, node = asdict(plan.config), tree
        for section in sections:
            value, node = value[section], node.setdefault(section, {})
        node[key] = value[key]
    return {key: tree[key] for key in asdict(plan.config) if key in tree}


def _yaml(tree: dict[str, Any], margin: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{margin}{key}:"
            yield from _yaml(value, margin + "  ")
        elif isinstance(value, int):
            yield f"{margin}{key}: {value:_}" if value >= GROUPED else f"{margin}{key}: {value}"
        else:
            yield f"{margin}{key}: {value or repr(value)}"
