"""Writes docs/configuration.md from the comments in dlcm_lightning/config: `python docs/write_configuration.py`.

The page is the documentation of every field, as it stands beside the field. A test compares the two.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "dlcm_lightning" / "config"
PAGE = ROOT / "docs" / "configuration.md"
SECTIONS = (
    ("", "__init__.py", "Config"), ("model", "model.py", "ModelConfig"),
    ("model.boundary", "model.py", "BoundaryConfig"), ("model.mup", "model.py", "MupConfig"),
    ("data", "data.py", "DataConfig"), ("data.sources[]", "data.py", "SourceConfig"),
    ("data.weight_changes[]", "data.py", "WeightChange"), ("optim", "training.py", "OptimConfig"),
    ("train", "training.py", "TrainConfig"), ("train.callbacks[], train.loggers[]", "training.py", "ClassConfig"),
    ("job", "job.py", "JobConfig"),
)
INTRODUCTION = """# Configuration

    dlcm configs                               # the run files that come with the package
    dlcm configs quickstart mine.yaml          # a copy to change
    dlcm pretrain mine.yaml optim.total_tokens=20_000_000 data.sources[0].weight=0.5

A run file holds a list of bases and what differs from them:

```yaml
base: [model/dlcm_87m, data/paper, optim/wsd]
name: mine
data: {root: /data/built}
```

Bases are looked up below the nearest folder named `configs` above the file, then among those that come with the
package. Later ones win, then the file itself, then `field=value` on the command line. A typo, a wrong type or an
impossible combination is answered with the field, its value and the remedy before torch is loaded. `~` and variables
stand in paths for what they do in a shell. The resolved configuration is saved with the run.

The fields, from the package itself (written by `docs/write_configuration.py`):
"""


def fields(file: str, name: str) -> Iterator[tuple[str, str, str, str]]:
    """(field, type, default, what stands under it) of a dataclass; nested sections left out."""
    tree = ast.parse((CONFIG / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node, following in zip(found.body, [*found.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        kind = ast.unparse(node.annotation)
        if "Config" in kind and not kind.startswith("list"):
            continue
        said = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            said = " ".join(str(following.value.value).split())
        default = ast.unparse(node.value) if node.value is not None else ""
        if default.startswith("field("):
            default = {"list": "[]", "dict": "{}"}.get(default.split("=")[-1].rstrip(")"), "")
        yield ast.unparse(node.target), kind, default, said


def page() -> str:
    parts = [INTRODUCTION]
    for section, file, name in SECTIONS:
        parts.append(f"\n## {section or 'The run'}\n\n| field | default | |\n|---|---|---|\n")
        for field, _, default, said in fields(file, name):
            text = said.replace("|", "\\|").replace("<", "&lt;")
            parts.append(f"| `{field}` | {f'`{default}`' if default else ''} | {text} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
