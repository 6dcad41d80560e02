"""The documents: links lead somewhere, commands exist, the page of fields is what the fields say."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from dlcm_lightning.cli.arguments import parser
from dlcm_lightning.evaluation.tasks.paper import FETCHED, TASKS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data" / "README.md"])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"^(?: {4}|\$ )+(?:\S*/)?dlcm (.+)$", re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def commands() -> list[str]:
    found = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        found |= {re.split(r"\s{2,}#", line)[0].strip() for line in COMMAND.findall(text)}
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_commands_are_known(command: str) -> None:
    """Options and sub-commands; what they do is run by .ci/run."""
    arguments, rest = parser().parse_known_args(shlex.split(command))
    assert arguments.run is not None
    assert all("=" in one and not one.startswith("-") for one in rest), rest


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_page_of_evaluation_names_the_files_of_every_task() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for task in TASKS:
        star = " *" if task.name in FETCHED else ""
        assert (f"| `{task.name}`{star} | {task.title} | {task.dlcm:.2f} | {task.baseline:.2f} | {task.files} | "
                f"{task.release} |") in text


def test_the_page_of_fields_is_what_the_fields_say() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "write_configuration.py"))
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == written["page"](), (
        "run python docs/write_configuration.py")
