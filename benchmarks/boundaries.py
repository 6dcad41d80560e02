"""Which form of the boundary holds up: `python -m benchmarks.boundaries` trains the forms of `model.boundary.form`
at R = 2, 4, 8 on the sample corpus, one short run each, and writes `docs/boundaries.md`.

Every run has the same model, data order, noise and length; only form and target differ. Raw numbers, hardware and
versions go to `benchmarks/results/boundaries.json`; runs that are found finished are not repeated, so that an
interrupted study continues (remove the runs to measure anew).

Numbers of a run: over the last third of its steps the R of drawn boundaries, of those by the calibrated threshold, and
the standard deviation of F; and the final validation three times, cut by the calibrated threshold, at one half, and
drawn as in training. Which threshold a run is given has no part in its training, so that one run tells of all three.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dlcm_lightning.compose import load_config
from dlcm_lightning.model.boundary import Boundaries
from dlcm_lightning.training.device import choose_device, describe_hardware
from dlcm_lightning.training.evaluate import evaluate
from dlcm_lightning.training.run import pretrain

FORMS = ("paper", "centred", "biased", "both")
RATIOS = (2, 4, 8)
RULES: tuple[Boundaries, ...] = ("calibrated", "half", "sampled")
CONFIG = "configs/run/boundary_study.yaml"
RESULTS = Path("benchmarks/results/boundaries.json")
PAGE = Path("docs/boundaries.md")


def measure(form: str, ratio: int, overrides: list[str]) -> dict[str, Any]:
    """One run, and what it came to."""
    config = load_config(CONFIG, [f"name=boundary-{form}-R{ratio}", f"model.boundary.form={form}",
                                  f"model.boundary.target_ratio={ratio}", *overrides])
    report = pretrain(config, lambda message: tqdm.write(message) if "validation" not in message else None)
    text = (Path(config.train.output_dir) / config.name / "metrics.jsonl").read_text()
    training = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    last = training[len(training) * 2 // 3:]
    rates = [line["F"] for line in last]
    run = Path(config.train.output_dir) / config.name
    return {
        "form": form, "target": ratio, "steps": report.steps, "tokens": report.tokens,
        "R_sampled": 1 / statistics.fmean(rates), "sd_F": statistics.stdev(rates),
        "R_calibrated": 1 / statistics.fmean(1 / line["R_thresholded"] for line in last),
        "validation": {rule: evaluate(run, None, [], lambda message: None, rule) for rule in RULES},
    }


def row(result: dict[str, Any], domains: list[str]) -> str:
    by_rule = result["validation"]
    validation = by_rule["calibrated"]
    per_domain = [
        f"{validation['domains'][domain]['R_sampled']:.2f} / {validation['domains'][domain]['R_thresholded']:.2f}"
        for domain in domains
    ]

    def on_target(ratio: float) -> str:
        return f"{ratio:.2f} ({ratio / result['target'] - 1:+.1%})"

    return "| " + " | ".join([
        str(result["target"]), result["form"], on_target(result["R_sampled"]), on_target(result["R_calibrated"]),
        on_target(validation["R_thresholded"]), f"{validation['R_half']:.2f}", *per_domain,
        *(f"{by_rule[rule]['bits_per_byte']:.3f}" for rule in RULES), f"{result['sd_F']:.3f}",
        f"{validation['p_sd']:.2f}", f"{validation['p_near_half']:.0%}",
    ]) + " |"


def page(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    domains = list(results[0]["validation"]["calibrated"]["domains"])
    head = ["target R", "form", "R drawn, last third", "R calibrated, last third", "R calibrated, validation",
            "R at one half, validation", *domains, *(f"bits per byte, {rule}" for rule in RULES), "sd of F", "sd of p",
            "p within .05 of .5"]
    steps = {(result["steps"], result["tokens"]) for result in results}
    lengths = "; ".join(f"{count} steps, {tokens:,} tokens" for count, tokens in sorted(steps))
    return "\n".join([
        "# Which boundary", "",
        "Written by `python -m benchmarks.boundaries`; raw numbers in `benchmarks/results/boundaries.json`. One seed",
        f"and one run a line ({lengths}), model and data of `{CONFIG}`,",
        f"{about['hardware']}, torch {about['torch']}. A comparison at small scale, not a law.", "",
        "`paper` is Eq. 5-6 to the letter, `centred` reads features minus their causal running mean, `biased` shifts",
        "the log-odds of p by a controlled bias, `both` does both. Columns three and four are tokens per concept in",
        "training, over the last third of the steps, of drawn boundaries and of those by the calibrated threshold,",
        "with their distance from the target; sd of F is over the same steps. All other columns are of the validation",
        "after the last step; domains show R drawn / calibrated; bits per byte are of texts cut by the calibrated",
        "threshold, at one half, and drawn as in training.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
        *[row(result, domains) for result in results], "",
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    arguments = parser.parse_args()
    cases = [(form, ratio) for ratio in RATIOS for form in FORMS]
    results = [measure(form, ratio, arguments.overrides) for form, ratio in tqdm(cases, desc="study", unit="run")]
    config = load_config(CONFIG, arguments.overrides)
    about = {
        "command": "python -m benchmarks.boundaries", "hardware": describe_hardware(config.train, choose_device()),
        "torch": torch.__version__, "lightning": version("lightning"), "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps({"about": about, "runs": results}, indent=1) + "\n")
    text = page(results, about)
    notes = PAGE.read_text().partition("\n## ")[1:] if PAGE.exists() else ()
    PAGE.write_text(text + "".join(notes))
    print(text)


if __name__ == "__main__":
    main()
