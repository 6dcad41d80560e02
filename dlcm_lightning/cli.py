"""The `dlcm` command: a thin front of the package, one function a sub-command.

Arguments are parsed, and a configuration is composed and checked, before torch is loaded; whatever the user can mend
is answered with one line and exit code 2, not with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dlcm_lightning import __version__
from dlcm_lightning.compose import load_config
from dlcm_lightning.config import ConfigError

QUICKSTART = "configs/run/quickstart.yaml"
MENDABLE = ("ConfigError", "DataError", "CheckpointError", "RunError")
"""Errors whose message is written for the user."""


def _load(module: str, name: str) -> Any:
    """A function of a module that is loaded only when its sub-command runs."""
    return getattr(importlib.import_module(f"dlcm_lightning.{module}"), name)


def pretrain(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    _load("training.run", "pretrain")(config)


def tokenize(arguments: argparse.Namespace) -> None:
    given = {"name": arguments.source, "domain": arguments.domain, "glob": arguments.glob,
             "text_field": arguments.text_field}
    given = {key: value for key, value in given.items() if value is not None}
    recipe_type = _load("data.recipe", "Recipe")
    if arguments.recipe:
        recipe = replace(_load("data.recipe", "load_recipe")(arguments.recipe), **given)
    elif "name" in given and "domain" in given:
        recipe = recipe_type(**given)
    else:
        raise ConfigError("--source and --domain name what is built; give both, or --recipe with a file that does")
    megabyte = 1024**2
    built = _load("data.build", "tokenize")(
        arguments.inputs, arguments.out, recipe, tokenizer_folder=arguments.tokenizer, workers=arguments.workers,
        array=arguments.array, validation_share=arguments.validation_share,
        shard_bytes=max(1, int(arguments.shard_megabytes * megabyte)),
        task_bytes=max(1, int(arguments.task_megabytes * megabyte)),
    )
    if built is not None:
        _say_built(built)


def merge(arguments: argparse.Namespace) -> None:
    _say_built(_load("data.merge", "merge")(arguments.out, arguments.source))


def _say_built(built: Any) -> None:
    train, validation = built.train, built.validation
    print(f"data: {built.folder} holds {train.documents + validation.documents:,d} documents, {train.tokens:,d} "
          f"training and {validation.tokens:,d} validation tokens; {built.duplicates:,d} copies are left out")


def prepare(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    _load("data.prepare", "prepare_sample_corpus")(config.data, config.model.vocab_size)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dlcm", description="Pretrain Dynamic Large Concept Models.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def configured(name: str, run: Any, text: str) -> None:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", nargs="?", default=QUICKSTART, help=f"run file (default {QUICKSTART})")
        command.add_argument("overrides", nargs="*", metavar="field=value", help="such as optim.total_tokens=1000000")
        command.set_defaults(run=run)

    configured("pretrain", pretrain, "train, or continue an unfinished run")
    configured("prepare", prepare, "fetch and tokenise the sample corpus without training")
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
    return top


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
    """Returns the exit code: 0 done, 2 something the user can mend, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, ConfigError) and type(error).__name__ not in MENDABLE:
            raise
        print(f"dlcm: {error}", file=sys.stderr)
        return 2
    return 0
