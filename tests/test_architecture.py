"""The floors of the package: imports point down, and what else CONTRIBUTING.md promises about its files.

Nothing is imported here: the source is parsed. A *unit* is a folder of the package, or a file beside them.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dlcm_lightning"
FLOORS = (
    {"errors", "paths"},
    {"config", "shipped"},
    {"compose", "flops", "atomic_io", "run_directory", "progress"},
    {"ops", "scaling"},
    {"batch"},
    {"model", "data"},
    {"checkpoint", "cluster"},
    {"export", "training"},
    {"inference", "upcycling"},
    {"evaluation", "dry_run"},
    {"cli", "benchmarks"},
    {"__main__"},
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
WITHOUT_TORCH = {"errors", "paths", "config", "shipped", "compose", "flops", "atomic_io", "run_directory", "progress",
                 "scaling"}
USING_A_MODEL = {"export", "inference", "upcycling", "evaluation"}
TRAINING_ONLY = {"lightning", "pytorch_lightning", "lightning_utilities", "torchmetrics", "deepspeed"}
MAY_IMPORT_INSIDE_FUNCTIONS = {"cli"}  # refuses a wrong configuration before anything heavy loads
MEANINGLESS_NAMES = {"util", "utils", "common", "base", "helper", "helpers", "misc"}
MOST_LINES = 400

SOURCES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    """The imported module or name, absolute: from a.b import c is a.b.c."""
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str | None:
    """The unit a module belongs to; None for the package itself and for foreign modules."""
    parts = module.split(".")
    if parts[0] == "benchmarks":
        return "benchmarks"
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name, id(node) in inside)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    found = [one for file in SOURCES for one in imports_of(file)]
    assert len(found) > 10
    return found


def listed(violations: list[Import]) -> str:
    return "\n".join(map(str, violations))


def between_units(imports: list[Import]) -> Iterator[tuple[Import, str, str]]:
    for one in imports:
        source, target = unit(module_name(one.file)), unit(one.module)
        if source is not None and target is not None and source != target and target in FLOOR:
            yield one, source, target


def test_every_unit_has_a_floor() -> None:
    units = {found for file in SOURCES if (found := unit(module_name(file))) is not None}
    assert units <= set(FLOOR), f"give {sorted(units - set(FLOOR))} a floor here and in CONTRIBUTING.md"


def test_imports_point_down_and_neighbours_do_not_know_each_other(imports: list[Import]) -> None:
    wrong = [one for one, source, target in between_units(imports) if FLOOR[target] >= FLOOR[source]]
    assert not wrong, listed(wrong)


def test_package_itself_imports_nothing_of_its_own(imports: list[Import]) -> None:
    wrong = [one for one in imports if module_name(one.file) == PACKAGE and one.module.startswith(PACKAGE)]
    assert not wrong, listed(wrong)


def test_what_uses_a_model_does_not_know_what_trains_it(imports: list[Import]) -> None:
    pairs = list(between_units(imports))
    wrong = [one for one, source, target in pairs if source in USING_A_MODEL and target == "training"]
    wrong += [one for one, source, target in pairs if source == "training" and target in USING_A_MODEL]
    assert not wrong, listed(wrong)


def test_files_do_not_import_in_circles(imports: list[Import]) -> None:
    modules = {module_name(file) for file in SOURCES}
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for one in imports:
        target = one.module if one.module in modules else one.module.rpartition(".")[0]
        if target in modules and target != module_name(one.file):
            arrows[module_name(one.file)].add(target)
    while arrows:  # take away what imports nothing that is left; a circle never goes
        free = {module for module, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in free}


def test_in_the_package_lightning_and_deepspeed_are_imported_in_training_only(imports: list[Import]) -> None:
    wrong = [one for one in imports
             if one.module.split(".")[0] in TRAINING_ONLY
             and unit(module_name(one.file)) not in ("training", "benchmarks")]  # which time them
    assert not wrong, listed(wrong)


def test_ground_floor_takes_no_torch(imports: list[Import]) -> None:
    wrong = [one for one in imports
             if one.module.split(".")[0] == "torch" and unit(module_name(one.file)) in WITHOUT_TORCH]
    assert not wrong, listed(wrong)


def test_config_and_cluster_need_the_standard_library_only(imports: list[Import]) -> None:
    known = sys.stdlib_module_names | {PACKAGE}
    wrong = [one for one in imports
             if unit(module_name(one.file)) in {"config", "cluster"} and one.module.split(".")[0] not in known]
    assert not wrong, listed(wrong)


def test_no_function_imports_from_the_package(imports: list[Import]) -> None:
    wrong = [one for one in imports
             if one.inside_function and one.module.split(".")[0] == PACKAGE
             and unit(module_name(one.file)) not in MAY_IMPORT_INSIDE_FUNCTIONS]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_file_is_named_by_a_noun_is_short_and_opens_with_its_idea(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert file.stem not in MEANINGLESS_NAMES
    assert len(text.splitlines()) <= MOST_LINES, f"split it: at most {MOST_LINES} lines"
    assert ast.get_docstring(ast.parse(text)), "open with a docstring"
