"""The `dlcm` command: a thin front of the package, one function a sub-command.

Arguments are parsed, and a configuration is composed and checked, before torch is loaded; whatever the user can mend
is answered with one line and exit code 2, not with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from dlcm_lightning import __version__
from dlcm_lightning.cluster.lives import recorded, this_life
from dlcm_lightning.cluster.placement import placed
from dlcm_lightning.cluster.processes import first_process, leave
from dlcm_lightning.cluster.signals import print_stacks_when_asked
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import ConfigError
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.looking.table import harmless

QUICKSTART, SMOKE = "configs/run/quickstart.yaml", "configs/run/smoke.yaml"
MENDABLE = ("ConfigError", "DataError", "CheckpointError", "RunError")
"""Errors whose message is written for the user."""
STOPPED = "Stopped"


def _load(module: str, name: str) -> Any:
    """A function of a module that is loaded only when its sub-command runs."""
    return getattr(importlib.import_module(f"dlcm_lightning.{module}"), name)


def pretrain(arguments: argparse.Namespace) -> None:
    with recorded(first_process()):
        print_stacks_when_asked()
        config = placed(load_config(arguments.config, arguments.overrides))  # refused before torch is loaded
        _load("training.run", "pretrain")(config)


def job(arguments: argparse.Namespace) -> None:
    raise SystemExit(_load("cluster.job", "run_job")(arguments.config, arguments.overrides))


def submit(arguments: argparse.Namespace) -> None:
    number = _load("cluster.snapshot", "submit")(arguments.script, arguments.config, arguments.overrides,
                                                 arguments.sbatch)
    print(f"Submitted batch job {number}")


def doctor(arguments: argparse.Namespace) -> None:
    if arguments.in_job:
        _say_all(_load("training.doctor", "answer_in_job")(arguments.config).lines())
    elif not _load("training.doctor", "examine")(placed(load_config(arguments.config, arguments.overrides)), _say):
        raise SystemExit(1)


def estimate(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    hardware = _load("scaling.estimate", "Hardware")(
        arguments.nodes, arguments.gpus_per_node, arguments.gpu_gigabytes * 1e9, arguments.peak_tflops * 1e12,
        arguments.mfu)
    lines = _load("scaling.estimate", "estimate")(
        config, hardware, arguments.document_tokens or config.data.row_tokens, arguments.config, arguments.overrides)
    _say_all(lines)
    if arguments.dry_run:
        _say_all(_load("rehearsal", "dry_run")(config))


def verify_resume(arguments: argparse.Namespace) -> None:
    given = arguments.overrides
    if arguments.config == SMOKE:
        given = ["train.devices=2", "data.micro_batch_rows=2", "train.precision=fp32", *given]
    if arguments.strategy:
        given = [*given, f"train.strategy={arguments.strategy}"]
    config = load_config(arguments.config, given)
    folder = Path(config.train.runs) / f"verify-resume-{config.train.strategy}"
    verdict = _load("training.verify_resume", "verify_resume")(config, folder, arguments.kills, arguments.seed)
    print(verdict.table())
    if not verdict.good:
        raise SystemExit(1)


def evaluate(arguments: argparse.Namespace) -> None:
    _load("training.evaluate", "evaluate")(Path(arguments.run_folder), arguments.step, arguments.overrides, _say)


def export(arguments: argparse.Namespace) -> None:
    megabyte = 1000**2
    out = _load("export.portable", "export")(
        arguments.run_folder, arguments.out, step=arguments.step, dtype=arguments.dtype,
        split_bytes=max(1, int(arguments.split_megabytes * megabyte)))
    print(f"{out} holds the model; dlcm_lightning.export.portable.load_model reads it")


def tokenize(arguments: argparse.Namespace) -> None:
    given = {"name": arguments.source, "domain": arguments.domain, "glob": arguments.glob,
             "text_field": arguments.text_field}
    given = {key: value for key, value in given.items() if value is not None}
    recipe_type = _load("data.building.recipe", "Recipe")
    if arguments.recipe:
        recipe = replace(_load("data.building.recipe", "load_recipe")(arguments.recipe), **given)
    elif "name" in given and "domain" in given:
        recipe = recipe_type(**given)
    else:
        raise ConfigError("--source and --domain name what is built; give both, or --recipe with a file that does")
    megabyte = 1024**2
    built = _load("data.building.build", "tokenize")(
        arguments.inputs, arguments.out, recipe, tokenizer_folder=arguments.tokenizer, workers=arguments.workers,
        array=arguments.array, validation_share=arguments.validation_share,
        shard_bytes=max(1, int(arguments.shard_megabytes * megabyte)),
        task_bytes=max(1, int(arguments.task_megabytes * megabyte)),
    )
    if built is not None:
        _say_built(built)


def merge(arguments: argparse.Namespace) -> None:
    _say_built(_load("data.building.merge", "merge")(arguments.out, arguments.source))


def _say_built(built: Any) -> None:
    train, validation = built.train, built.validation
    print(f"data: {built.folder} holds {train.documents + validation.documents:,d} documents, {train.tokens:,d} "
          f"training and {validation.tokens:,d} validation tokens; {built.duplicates:,d} copies are left out")


def verify(arguments: argparse.Namespace) -> None:
    place, workers = arguments.config, arguments.workers or min(8, os.cpu_count() or 1)
    if "://" in place or Path(place).is_dir():
        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]}: overrides go with a run file, and {place} is a folder")
        found = _load("data.looking.inventory", "verify_folder")(place, workers, _say)
    else:
        found = _load("data.looking.inventory", "verify_run")(load_config(place, arguments.overrides), workers, _say)
    what = f"{found.shards:,d} shards of {found.sources:,d} sources, {found.bytes:,d} bytes"
    if found.damaged:
        damages = f"{found.damaged:,d} damage{'s' * (found.damaged != 1)}"
        raise DataError(f"{damages} in {what}; each is named above with its remedy")
    _say(f"all whole: {what}")


def inspect(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    reader = _load("data.looking.overview", "open_run")(config, _say)
    _say_all(_load("data.looking.overview", "overview")(config, reader))
    _say_all(_load("data.looking.overview", "documents")(reader, arguments.documents, arguments.characters))
    reader.check_lasts(config.total_steps * config.data.rows_per_step)


def audit(arguments: argparse.Namespace) -> None:
    open_audit = _load("data.looking.audit", "open_audit")
    opened = open_audit(arguments.run_folder, arguments.overrides, arguments.at_step, _say)
    identity, places = None, []
    if arguments.document:
        content = sys.stdin.buffer.read() if arguments.document == "-" else _content(arguments.document)
        identity, places = _load("data.looking.account", "find_text")(opened, content)
    elif arguments.md5:
        identity = _load("data.looking.account", "parse_md5")(arguments.md5)
        places = _load("data.looking.account", "find_md5")(opened, identity)
    elif arguments.number:
        places = [_load("data.looking.account", "find_number")(opened, arguments.number)]
    else:
        _say_all(_load("data.looking.account", "account")(opened))
        return
    _say_all(_load("data.looking.account", "story")(opened, identity, places))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"--document {file}: cannot be read ({error})") from error


def _say_all(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


def _say(line: str) -> None:
    """A line to standard output, whatever its encoding lacks spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # what the lines are piped to, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def prepare(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    _load("data.building.prepare", "prepare_sample_corpus")(config.data, config.model.vocab_size)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dlcm", description="Pretrain Dynamic Large Concept Models.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def configured(name: str, run: Any, text: str) -> None:
        command = commands.add_parser(name, help=text, description=text)
        _add_run_file(command)
        command.set_defaults(run=run)

    configured("pretrain", pretrain, "train, or continue an unfinished run")
    configured("job", job, "one life of a run inside a SLURM job; what slurm/*.sh call")
    command = commands.add_parser("submit", help="what slurm/*.sh call where they are started without sbatch",
                                  description="Check a configuration, copy the code into the run's directory, sbatch.")
    command.add_argument("script", help="such as slurm/dlcm_1t.sh")
    _add_run_file(command)
    command.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch; may be repeated")
    command.set_defaults(run=submit)
    _add_estimate(commands.add_parser(
        "estimate", help="memory, time and space of a run, without a GPU",
        description="Count parameters, FLOPs, memory by strategy and micro-batch, checkpoints, steps and time of a "
                    "configuration on hardware that need not be there."))
    command = commands.add_parser(
        "doctor", help="what would go wrong later, asked now",
        description="Check versions, disk, data, run directory and device of this machine for a run; in a job, of all "
                    "nodes.")
    _add_run_file(command)
    command.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(run=doctor)
    configured("prepare", prepare, "fetch and tokenise the sample corpus without training")
    _add_verify_resume(commands.add_parser(
        "verify-resume", help="prove that a disturbed run ends as one left alone",
        description="Run a configuration twice, once straight and once disturbed by kills and signals, and compare "
                    "everything that both leave, bit for bit."))
    command = commands.add_parser(
        "evaluate", help="the validation table of any checkpoint",
        description="Bits per byte and tokens per concept by domain, of a checkpoint of a run, on one process.")
    command.add_argument("run_folder", metavar="RUN", help="directory of a run, such as runs/quickstart")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as data.validation_rows=512")
    command.add_argument("--step", type=_count, help="of a checkpoint (the newest)")
    command.set_defaults(run=evaluate)
    command = commands.add_parser(
        "export", help="a checkpoint as a model that plain PyTorch loads",
        description="Write model.safetensors, config.yaml and tokenizer.json of a run's checkpoint, whatever strategy "
                    "and however many processes wrote it.")
    command.add_argument("run_folder", metavar="RUN", help="directory of a run, such as runs/quickstart")
    command.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    command.add_argument("--step", type=_count, help="of a checkpoint (the newest)")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrices (fp32)")
    command.add_argument("--split-megabytes", type=float, default=5000, help="largest file (5000)")
    command.set_defaults(run=export)
    _add_tokenize(commands.add_parser(
        "tokenize", help="documents -> shards with a manifest",
        description="Tokenise jsonl, parquet and text files, compressed or not, into WebDataset shards. The same "
                    "command continues what was interrupted."))
    data = commands.add_parser("data", help="sources of shards", description="What can be done with sources of shards.")
    actions = data.add_subparsers(dest="action", required=True)
    command = actions.add_parser(
        "merge", help="finish a source that `tokenize --array` built",
        description="Leave out exact duplicates, write the manifests and give the source its name.")
    command.add_argument("out", help="the --out of `dlcm tokenize`")
    command.add_argument("--source", required=True, help="name of the source")
    command.set_defaults(run=merge)
    _add_looking(actions)
    return top


def _add_run_file(command: argparse.ArgumentParser, text: str = "run file") -> None:
    command.add_argument("config", nargs="?", default=QUICKSTART, help=f"{text} (default {QUICKSTART})")
    command.add_argument("--config", dest="run_file", metavar="FILE", help="the same, as an option")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as optim.total_tokens=1000000")


def _add_looking(actions: Any) -> None:
    """The sub-commands of `dlcm data` that change nothing."""
    command = actions.add_parser(
        "verify", help="compare every byte of shards with their manifests",
        description="Read all shards of both splits of every source; name each that is damaged, and its remedy.")
    _add_run_file(command, "run file, or a folder or address of sources")
    command.add_argument("--workers", type=int, help="threads (one a core, at most 8)")
    command.set_defaults(run=verify)
    command = actions.add_parser(
        "inspect", help="what a run would read: the mixture, epochs, documents",
        description="Show the mixture of a run, how often each source is read in its budget, and some documents.")
    _add_run_file(command)
    command.add_argument("--documents", type=_count, default=2, help="shown of every source (2)")
    command.add_argument("--characters", type=_count, default=400, help="shown of every document (400)")
    command.set_defaults(run=inspect)
    command = actions.add_parser(
        "audit", help="what a run has consumed; when it met a document",
        description="What a run has consumed up to its newest checkpoint, by source; or where a document lies and at "
                    "which samples and steps it was, or will be, read.")
    command.add_argument("run_folder", metavar="RUN", help="directory of a run, such as runs/quickstart")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as data.root=... if it has moved")
    command.add_argument("--at-step", type=int, metavar="N", help="look at another position than the newest checkpoint")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--document", metavar="FILE", help="find this text; - reads it from standard input")
    which.add_argument("--md5", metavar="HEX", help="find the document with this md5")
    which.add_argument("--number", metavar="SOURCE:N", help="find document N of a source, from 0; validation: "
                                                            "SOURCE/validation:N")
    command.set_defaults(run=audit)


def _add_estimate(command: argparse.ArgumentParser) -> None:
    _add_run_file(command)
    command.add_argument("--nodes", type=_count, default=1, help="(1)")
    command.add_argument("--gpus-per-node", type=_count, default=8, help="(8)")
    command.add_argument("--gpu-gigabytes", type=float, default=80, help="memory of a GPU (80)")
    command.add_argument("--peak-tflops", type=float, default=989, help="dense bf16 peak of a GPU (989, an H100)")
    command.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (0.4)")
    command.add_argument("--document-tokens", type=float, help="mean length of documents by tokens (a whole row)")
    command.add_argument("--dry-run", action="store_true",
                         help="also run one step, validation, save, load and export at debug width")
    command.set_defaults(run=estimate)


def _add_verify_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strategy", choices=("ddp", "fsdp2", "zero1", "zero2", "zero3"),
                         help="how the model is spread (as the run file says)")
    command.add_argument("--config", default=SMOKE, help=f"run file (default {SMOKE} on two processes)")
    command.add_argument("--kills", type=_count, default=6, help="disturbances (6)")
    command.add_argument("--seed", type=_count, default=0, help="of the moments and kinds of disturbances (0)")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as train.devices=4")
    command.set_defaults(run=verify_resume)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write a number from 0")
    return int(text)


def _add_tokenize(command: argparse.ArgumentParser) -> None:
    command.add_argument("inputs", nargs="+", help="files or folders; folders are read in the order of paths")
    command.add_argument("--out", required=True, help="a data.root: the source appears in it as a folder")
    command.add_argument("--recipe", help="YAML of a corpus, such as data/sources/nemotron-cc.yaml")
    command.add_argument("--tokenizer", help="folder with tokenizer.json; not needed once --out holds one")
    command.add_argument("--source", help="name of the source (or of the recipe)")
    command.add_argument("--domain", help="domain, such as web-en or code (or of the recipe)")
    command.add_argument("--glob", help="which files below the folders, such as '**/*.py' (all that are not hidden)")
    command.add_argument("--text-field", help="field of a json line, or column, that holds the text (text)")
    command.add_argument("--workers", type=int, help="processes (one a core)")
    command.add_argument("--array", type=_part, metavar="i/n",
                         help="do every n-th task from i, as one of n jobs; then `dlcm data merge`")
    command.add_argument("--validation-share", type=float, default=0.02, help="of the documents, by md5 (0.02)")
    command.add_argument("--shard-megabytes", type=float, default=256, help="size of a shard (256)")
    command.add_argument("--task-megabytes", type=float, default=256,
                         help="smaller input files share a task up to this size (256)")
    command.set_defaults(run=tokenize)


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n with 0 <= i < n, such as 0/16")
    return int(number), int(of)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a proof that failed, 2 something the user can mend, 75 stopped when asked, 130
    interrupted."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and not ("overrides" in arguments and all("=" in one and not one.startswith("-") for one in rest)):
        parser().parse_args(argv)  # says which arguments nobody knows
    elif rest:
        arguments.overrides += rest  # field=value behind an option
    if "run_file" in arguments and arguments.run_file:
        if arguments.config != QUICKSTART:  # what stands in the place of a run file is an override then
            arguments.overrides.insert(0, arguments.config)
        arguments.config = arguments.run_file
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        stopped = type(error).__name__ == STOPPED
        if not stopped and not isinstance(error, ConfigError) and type(error).__name__ not in MENDABLE:
            raise
        if first_process():  # an error of one process is an error of all
            print(f"dlcm: {harmless(str(error))}", file=sys.stderr)
        if stopped and this_life() is not None:
            return 0  # a job reads how its run left; another code would end the ranks that are still leaving
        return _load("training.callbacks.checkpoint", "STOPPED_CODE") if stopped else 2
    return 0


def entry() -> NoReturn:
    """The command as a process."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)
