"""The package's own sources as the files that stand beside an exported model.

transformers loads remote code from one folder without sub-folders: `modeling_dlcm.py`, and what it imports relatively.
So the files that it needs, found by following its imports, are copied with their import lines rewritten, and nothing
else: there is one implementation.

    dlcm_lightning/ops/attention.py                       ->  ops_attention.py
    from dlcm_lightning.ops.attention import attention    ->  from .ops_attention import attention
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

PACKAGE = "dlcm_lightning"
ENTRIES = (f"{PACKAGE}.export.huggingface.configuration_dlcm", f"{PACKAGE}.export.huggingface.modeling_dlcm")


def modelling_files(version: str) -> dict[str, str]:
    """Content by name of every file. version: of this package, for their first line."""
    found: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    waiting = list(ENTRIES)
    while waiting:
        module = waiting.pop()
        if module not in needs:
            content, needs[module] = _rewritten(module)
            waiting += needs[module]
            first = f"# {module} of {PACKAGE} {version}, written by `dlcm export --hf`; Apache-2.0.\n"
            found[f"{flat(module)}.py"] = first + content
    for entry in ENTRIES:
        found[f"{flat(entry)}.py"] += _named(entry, needs)
    return found


def _named(entry: str, needs: dict[str, list[str]]) -> str:
    """Imports of every file that an entry needs, which are never run."""
    reached: set[str] = set()
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += needs[module]
    files = sorted(flat(module) for module in reached - {entry})
    return "\n".join(["", "", "# transformers 4 copies the files that this one names, but not those that they name.",
                      "if False:", *(f"    from .{file} import __doc__" for file in files), ""])


def flat(module: str) -> str:
    """The name of a module in a folder without sub-folders."""
    return module.rpartition(".")[2] if module in ENTRIES else module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)


def _rewritten(module: str) -> tuple[str, list[str]]:
    """A module's text with its imports of this package made relative, and the modules that they name."""
    file = _source(module)
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    needed: list[str] = []
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE]
    for node in sorted(nodes, key=lambda node: node.lineno, reverse=True):
        assert node.col_offset == 0 and node.end_lineno is not None, f"{file}:{node.lineno}: import at the top"
        written = []
        for origin, names in _origins(node).items():
            needed.append(origin)
            written.append(f"from .{flat(origin)} import {', '.join(names)}")
        lines[node.lineno - 1:node.end_lineno] = written
    return "\n".join(lines) + "\n", needed


def _origins(node: ast.ImportFrom) -> dict[str, list[str]]:
    """By the module that defines them: the names that an import asks for."""
    assert node.module is not None
    known = _handed_on(node.module)
    found: dict[str, list[str]] = {}
    for alias in node.names:
        name = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
        found.setdefault(known.get(alias.name, node.module), []).append(name)
    return found


def _handed_on(module: str) -> dict[str, str]:
    """Names that a package takes from its own modules: where they are defined."""
    file = _source(module)
    if file.name != "__init__.py":
        return {}
    return {alias.name: node.module for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}.")
            for alias in node.names}
