"""The `dlcm` command: a thin front of the package, one function a sub-command.

Arguments are parsed, and a configuration is composed and checked, before torch is loaded; whatever the user can mend
is answered with one line and exit code 2, not with a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
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
    _load("data.documents", "tokenize")(
        arguments.inputs, arguments.out, source=arguments.source, domain=arguments.domain,
        tokenizer_folder=arguments.tokenizer, text_field=arguments.text_field,
    )


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
    command = commands.add_parser("tokenize", help="documents -> shards with a manifest",
                                  description="Tokenise jsonl, jsonl.gz and text files into WebDataset shards.")
    command.add_argument("inputs", nargs="+", help="files or folders, read in the order of their names")
    command.add_argument("--out", required=True, help="a data.root: the source appears in it as a folder")
    command.add_argument("--tokenizer", help="folder with tokenizer.json; not needed once --out holds one")
    command.add_argument("--source", required=True, help="name of the source")
    command.add_argument("--domain", required=True, help="domain, such as web-en or code")
    command.add_argument("--text-field", default="text", help="field of a json line that holds the text")
    command.set_defaults(run=tokenize)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 something the user can mend, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, ConfigError) and type(error).__name__ not in MENDABLE:
            raise
        print(f"dlcm: {error}", file=sys.stderr)
        return 2
    return 0
