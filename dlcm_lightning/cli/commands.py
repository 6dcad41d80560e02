"""What each sub-command does: one function each, which loads what it needs when it runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlcm_lightning.cluster.attempts import recorded
from dlcm_lightning.cluster.signals import print_stacks_when_asked
from dlcm_lightning.cluster.world import configure_world
from dlcm_lightning.config import Config, ConfigError
from dlcm_lightning.errors import DataError

SMOKE = "smoke"
TASK_OPTIONS = ("model", "trust_remote_code", "data_dir", "fewshot", "limit", "precision", "context", "batch_tokens",
                "out", "samples")
"""Of `dlcm evaluate`, that only mean something with --tasks."""


def load(module: str, name: str) -> Any:
    """A function of a module that is loaded only when its sub-command runs."""
    return getattr(importlib.import_module(f"dlcm_lightning.{module}"), name)


def need(package: str, what: str, extra: str) -> None:
    """ConfigError: a package of an extra is not here."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what}: needs {package}; pip install 'dlcm-lightning[{extra}]'")


def load_config(run_file: str, overrides: list[str]) -> Config:
    config: Config = load("compose", "load_config")(run_file, overrides)
    return config


def pretrain(arguments: argparse.Namespace) -> None:
    print_stacks_when_asked()
    with recorded():
        config, _ = configure_world(load_config(arguments.config, arguments.overrides))  # before torch is loaded
        load("training.user_classes", "check_installed")(config)
        load("training.run", "pretrain")(config)


def job(arguments: argparse.Namespace) -> None:
    raise SystemExit(load("cluster.supervisor", "run_job")(arguments.config, arguments.overrides))


def submit(arguments: argparse.Namespace) -> None:
    number = load("cluster.submit", "submit")(arguments.script, arguments.config, arguments.overrides,
                                                 arguments.sbatch)
    print(f"Submitted batch job {number}")


def doctor(arguments: argparse.Namespace) -> None:
    if arguments.in_job:
        log_all(load("training.preflight", "answer_in_job")(arguments.config).lines())
    else:
        config, _ = configure_world(load_config(arguments.config, arguments.overrides))
        if not load("training.preflight", "examine")(config, log):
            raise SystemExit(1)


def configs(arguments: argparse.Namespace) -> None:
    if arguments.name is None:
        log_all(load("shipped", "run_files")())
        return
    to = Path(arguments.out or f"{arguments.name}.yaml")
    load("shipped", "copy_run_file")(arguments.name, to)
    print(f"{to} is yours; dlcm pretrain {to}")


def slurm_init(arguments: argparse.Namespace) -> None:
    written = load("shipped", "write_slurm_templates")(Path(arguments.out))
    log_all(str(one) for one in written)
    print("Say in site.sh what your cluster wants; then from that folder: bash slurm/dlcm_1t.sh RUN_FILE")


def estimate(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    hardware = load("scaling.estimate", "Hardware")(
        arguments.nodes, arguments.gpus_per_node, arguments.gpu_gigabytes * 1e9, arguments.peak_tflops * 1e12,
        arguments.mfu)
    lines = load("scaling.estimate", "estimate")(
        config, hardware, arguments.document_tokens or config.data.sequence_length, arguments.config,
                                                 arguments.overrides)
    log_all(lines)
    if arguments.dry_run:
        log_all(load("dry_run", "dry_run")(config))


def verify_resume(arguments: argparse.Namespace) -> None:
    given = arguments.overrides
    if arguments.config == SMOKE:
        given = ["train.devices=2", "data.micro_batch_size=2", "train.precision=fp32", *given]
    if arguments.strategy:
        given = [*given, f"train.strategy={arguments.strategy}"]
    config = load_config(arguments.config, given)
    folder = Path(config.train.output_dir) / f"verify-resume-{config.train.strategy}"
    verdict = load("training.verify_resume", "verify_resume")(
        config, folder, arguments.kills, arguments.seed, checkpoint_every=arguments.checkpoint_every)
    print(verdict.table())
    if not verdict.good:
        raise SystemExit(1)


def evaluate(arguments: argparse.Namespace) -> None:
    if arguments.tasks is None:
        values = {name: getattr(arguments, name) for name in TASK_OPTIONS}
        if wrong := next((name for name, value in values.items() if value is not None and value is not False), None):
            raise ConfigError(f"--{wrong.replace('_', '-')}: a validation table has none; give --tasks too, or a field "
                              "such as train.precision=bf16")
        if arguments.run_folder is None:
            raise ConfigError("dlcm evaluate RUN: name the directory of a run, such as runs/quickstart")
        load("training.evaluate", "evaluate")(Path(arguments.run_folder), arguments.step, arguments.overrides, log,
                                              arguments.boundaries)
        return
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]}: --tasks takes no fields; its options are in dlcm evaluate --help")
    if (arguments.run_folder is None) == (arguments.model is None):
        raise ConfigError("dlcm evaluate --tasks: name a run or an export, or --model hf:PATH, one of the two")
    if arguments.model is not None and not arguments.model.startswith("hf:"):
        raise ConfigError(f"--model {arguments.model}: write hf: and a folder or a name of the hub; a run or an export "
                          "is named without --model")
    names = load("evaluation.tasks.paper", "chosen")(arguments.tasks)
    need("lm_eval", "--tasks", "eval")
    given = {name: value for name in ("precision", "fewshot", "limit", "context", "trust_remote_code", "batch_tokens")
             if (value := getattr(arguments, name)) is not None}
    question = load("evaluation.tasks.models", "Question")(tuple(names), arguments.boundaries, **given)
    load("evaluation.tasks.evaluate", "evaluate")(
        arguments.model or arguments.run_folder, question, step=arguments.step,
        data_dir=Path(arguments.data_dir) if arguments.data_dir else None,
        out=Path(arguments.out) if arguments.out else None, samples=arguments.samples, log=log)


def ladder_fit(arguments: argparse.Namespace) -> None:
    for package in ("scipy", "pandas", "matplotlib"):
        need(package, "dlcm ladder fit", "scaling")
    load("scaling.law.fit_table", "fit_table")(
        Path(arguments.table), Path(arguments.out), seed=arguments.seed, starts=arguments.starts,
        bootstraps=arguments.bootstraps, late=arguments.late, skip=arguments.skip, offsets=arguments.offsets,
        off_target=arguments.off_target, extrapolation=arguments.extrapolation, log=log)


def fetch_tasks(arguments: argparse.Namespace) -> None:
    load("evaluation.tasks.fetch", "fetch_tasks")(Path(arguments.out), log)


def analyze(arguments: argparse.Namespace) -> None:
    load("evaluation.analysis.report", "analyze")(
        arguments.place, step=arguments.step, against=arguments.against, out=arguments.out, rows=arguments.rows,
        documents=arguments.documents, overrides=arguments.overrides, log=log)


def export(arguments: argparse.Namespace) -> None:
    megabyte = 1000**2
    writer = ("export.huggingface.folder", "export_huggingface") if arguments.hf else ("export.portable", "export")
    out = load(*writer)(arguments.run_folder, arguments.out, step=arguments.step, dtype=arguments.dtype,
                        split_bytes=max(1, int(arguments.split_megabytes * megabyte)))
    print(f"{out} holds the model; " + (
        "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) reads it" if arguments.hf else
        "dlcm_lightning.load_model reads it"))


def upcycle(arguments: argparse.Namespace) -> None:
    if arguments.show and (arguments.out or arguments.for_run):
        raise ConfigError("--show prints a model section and writes nothing; give SOURCE alone")
    if not arguments.show and not (arguments.out and arguments.for_run):
        raise ConfigError("dlcm upcycle SOURCE OUT --config RUN_FILE writes a model; dlcm upcycle SOURCE --show prints "
                          "the model section of such a run file")
    config = None if arguments.show else load_config(arguments.for_run, arguments.overrides)
    source = load("upcycling.open_source", "open_source")(arguments.source)
    if config is None:
        log_all(load("upcycling.matching", "matching_section")(source))
        return
    folder = arguments.tokenizer
    spelling = load("upcycling.spelling", "spelling_of")(Path(folder)) if folder else None
    done = load("upcycling.upcycle", "upcycle")(source, config, arguments.out, spelling=spelling,
                                                skip_layers=arguments.skip_layers, seed=arguments.seed)
    log_all(done.report)
    log(f"loss on the probe texts: {done.source_loss:.6f} nats a token of {source.origin}, {done.loss:.6f} of "
         f"{arguments.out}")
    log(shlex.join(["dlcm", "pretrain", arguments.for_run, *arguments.overrides, f"train.init_from={arguments.out}"]))


def generate(arguments: argparse.Namespace) -> None:
    given = {name: value for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
                                      "max_tokens", "boundaries")
             if (value := getattr(arguments, name)) is not None}
    if arguments.greedy:
        if arguments.temperature:
            raise ConfigError(f"--temperature {arguments.temperature:g}: --greedy is temperature 0; choose one")
        given["temperature"] = 0.0
    sampling = load("inference.sampling", "Sampling")(**given, stop=tuple(arguments.stop))
    prompts = load("inference.terminal", "read_prompts")(arguments.prompt, arguments.prompts)
    generator = load("inference.generator", "Generator").load(
        arguments.place, step=arguments.step, precision=arguments.precision, context=arguments.context)
    load("inference.terminal", "run")(
        generator, prompts, sampling, samples=arguments.samples, batch_size=arguments.batch_size,
        concepts=arguments.concepts, colour={"auto": None, "always": True, "never": False}[arguments.color],
        as_lines=arguments.json, note=lambda line: print(line, file=sys.stderr))


def tokenize(arguments: argparse.Namespace) -> None:
    given = {"name": arguments.source, "domain": arguments.domain, "glob": arguments.glob,
             "text_field": arguments.text_field, "format": arguments.format}
    given = {key: value for key, value in given.items() if value is not None}
    recipe_type = load("data.preprocessing.recipe", "Recipe")
    if arguments.recipe:
        recipe = replace(load("data.preprocessing.recipe", "load_recipe")(arguments.recipe), **given)
    elif "name" in given and "domain" in given:
        recipe = recipe_type(**given)
    else:
        raise ConfigError("--source and --domain name what is built; give both, or --recipe with a file that does")
    megabyte, began = 1024**2, time.monotonic()
    built = load("data.preprocessing.build", "tokenize")(
        arguments.inputs, arguments.out, recipe, tokenizer_folder=arguments.tokenizer, workers=arguments.workers,
        array=arguments.array, validation_share=arguments.validation_share,
        shard_bytes=max(1, int(arguments.shard_megabytes * megabyte)),
        task_bytes=max(1, int(arguments.task_megabytes * megabyte)),
    )
    if built is not None:
        _say_built(built, time.monotonic() - began)


def merge(arguments: argparse.Namespace) -> None:
    _say_built(load("data.preprocessing.merge", "merge")(arguments.out, arguments.source))


def _say_built(built: Any, seconds: float | None = None) -> None:
    first, *others = load("data.preprocessing.account", "told")(built.account, seconds)
    log(f"data: {built.folder} holds {first}")
    log_all(f"data:   {line}" for line in others)


def verify(arguments: argparse.Namespace) -> None:
    place, workers = arguments.config, arguments.workers or min(8, os.cpu_count() or 1)
    if "://" in place or Path(place).is_dir():
        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]}: overrides go with a run file, and {place} is a folder")
        found = load("data.inspection.inventory", "verify_folder")(place, workers, log)
    else:
        found = load("data.inspection.inventory", "verify_run")(load_config(place, arguments.overrides), workers, log)
    what = f"{found.shards:,d} shards of {found.sources:,d} sources, {found.bytes:,d} bytes"
    if found.damaged:
        damages = f"{found.damaged:,d} damage{'s' * (found.damaged != 1)}"
        raise DataError(f"{damages} in {what}; each is named above with its remedy")
    log(f"all whole: {what}")


def inspect(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    reader = load("data.inspection.overview", "open_run")(config, log)
    log_all(load("data.inspection.overview", "overview")(config, reader))
    log_all(load("data.inspection.overview", "documents")(reader, arguments.documents, arguments.characters))
    reader.check_lasts(config.total_steps * config.data.global_batch_size)


def audit(arguments: argparse.Namespace) -> None:
    open_audit = load("data.inspection.audit", "open_audit")
    opened = open_audit(arguments.run_folder, arguments.overrides, arguments.at_step, log)
    identity, places = None, []
    if arguments.document:
        content = sys.stdin.buffer.read() if arguments.document == "-" else _content(arguments.document)
        identity, places = load("data.inspection.account", "find_text")(opened, content)
    elif arguments.md5:
        identity = load("data.inspection.account", "parse_md5")(arguments.md5)
        places = load("data.inspection.account", "find_md5")(opened, identity)
    elif arguments.number:
        places = [load("data.inspection.account", "find_number")(opened, arguments.number)]
    else:
        log_all(load("data.inspection.account", "account")(opened))
        return
    log_all(load("data.inspection.account", "story")(opened, identity, places))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--document {file}: cannot be read ({error})") from error


def log_all(lines: Iterable[str]) -> None:
    for line in lines:
        log(line)


def log(line: str) -> None:
    """A line to standard output, whatever its encoding lacks spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # what the lines are piped to, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def prepare(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    load("data.preprocessing.prepare", "prepare_sample_corpus")(config.data, config.model.vocab_size)
