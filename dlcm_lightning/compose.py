"""From YAML files and command-line overrides to one checked `Config`, in milliseconds and without torch.

A file holds only what differs. It may name others to start from, as paths below `configs/`, its own or the shipped:

    base: [model/dlcm_quickstart, data/sample, optim/wsd]
    name: quickstart
    data: {global_batch_size: 8}

Bases may have bases. Later wins: each base over the one before it, the file over its bases, an override from the
command line (`optim.total_tokens=1000`, `data.sources[0].weight=0.5`) over everything. Sections merge; lists are
replaced whole. `${model.d_token}` refers to another field.

Every value is checked against the dataclasses of `config` while its file is still known, so that a typo or a
wrong type is answered with the full field, the value, where it stands and what to do. What fields demand of each
other is checked by the dataclasses themselves, whose `ConfigError` passes through untouched.

Text fields take the text as it is typed: `name: 007` is "007" and `name=1e5` is "1e5", though YAML reads numbers there.
So every file is read twice, once for its values and once for the texts that stand for them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlcm_lightning.config import Config, ConfigError, DataConfig, SourceConfig
from dlcm_lightning.shipped import RUNS, find, names, root

COMMAND_LINE = "command line"
RENAMED = {
    "data.row_tokens": "data.sequence_length", "data.rows_per_step": "data.global_batch_size",
    "data.micro_batch_rows": "data.micro_batch_size", "train.runs": "train.output_dir",
    "optim.eta_token": "optim.lr_token", "optim.eta_concept": "optim.lr_concept",
    "optim.eta_other": "optim.lr_other", "optim.eta_boundary": "optim.lr_boundary",
    "optim.clip_norm": "optim.max_grad_norm", "job.lives_without_progress": "job.max_restarts_without_progress",
}
"""Fields by the names that they once had: refused where they are written, understood where a run has saved them."""
LARGEST_INT = 2**63 - 1
"""What arrays can hold. What makes sense of a field is bounded closer, by its own check."""


class Written:
    """Values as YAML reads them, and the same as they were typed; both as plain containers."""

    def __init__(self, values: Any, texts: Any) -> None:
        self.values, self.texts = values, texts

    def at(self, key: Any) -> Written:
        """An item of a mapping or a list."""
        try:
            text = self.texts[key] if isinstance(self.texts, dict | list) else None
        except (KeyError, IndexError):  # after an anchor, say
            text = None
        return Written(self.values[key], text)

    def under(self, key: Any) -> Written:
        return Written({key: self.values}, {key: self.texts})


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Composes the run file at `path`, applies `field=value` overrides in order, checks and freezes the result.

    path: of a file, or the name of one that is shipped, such as quickstart. ConfigError: the field, its value, where it
    was written, and the remedy.
    """
    return _composed(_layers(find(str(path), RUNS), ()), overrides)


def load_saved_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a run has saved, of this version or an earlier one; otherwise as `load_config`."""
    written = _read_yaml(Path(path))
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        for tree in (written.values, written.texts):
            if isinstance(fields := tree.get(section), dict) and old_key in fields:
                fields[new_key] = fields.pop(old_key)
    return _composed([(str(path), written)], overrides)


def config_from(plain: Mapping[str, Any], origin: str = "a checkpoint") -> Config:
    """A Config from its plain form, as `dataclasses.asdict` gives it; what is left out keeps its default."""
    return _composed([(origin, Written(plain, plain))], ())


def _composed(layers: Iterable[tuple[str, Written]], overrides: Sequence[str]) -> Config:
    """Of layers, each with where it stands, the last one being the run file."""
    tree, origin = _blank_config(), ""
    for origin, written in layers:
        _assign_section(tree, Config, written, "", origin)
    for override in overrides:
        _assign_section(tree, Config, _parse_override(override), "", COMMAND_LINE)
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere, or a value left at ???
        raise ConfigError(f"{error.full_key} (in {origin}): {_first_line(error)}; "
                          "give the field a value, or refer to a field that has one") from error
    assert isinstance(config, Config)
    return config


def save_config(config: Config, path: str | Path) -> None:
    """Writes every field of `config` as plain YAML without bases; `load_config` gives back an equal Config. Several
    processes may write one file at once: it is whole, and that of one of them."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        unfinished.write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def differences(a: Config, b: Config) -> list[str]:
    """Dotted names of the fields in which two runs differ; a list of another length is named as a whole."""
    return differences_of(asdict(a), asdict(b))


def differences_of(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The same of two that are plain containers."""
    return list(_differences(a, b, ""))


def _differences(a: Any, b: Any, name: str) -> Iterator[str]:
    if isinstance(a, dict) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], _join(name, key))
    elif isinstance(a, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, f"{name}[{index}]")
    elif a != b:
        yield name


# Files


def _configs_folder(file: Path) -> Path:
    """Where the bases of a file are looked up: the nearest folder named configs above it, else its own folder."""
    return next((folder for folder in file.resolve().parents if folder.name == "configs"), file.resolve().parent)


def _layers(file: Path, above: tuple[Path, ...]) -> Iterator[tuple[str, Written]]:
    """(where it stands, what is written) of all bases of a file and of the file itself, in the order of application."""
    if file.resolve() in above:
        chain = " -> ".join(path.name for path in (*above, file))
        raise ConfigError(f"base (in {above[-1]}): the bases form a circle, {chain}; remove one of them")
    written = _read_yaml(file)
    bases = written.values.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base = {bases!r} (in {file}): write a list of paths below configs/, "
                          "such as [model/dlcm_2b, data/paper]")
    for base in bases:
        name = base if base.endswith(".yaml") else f"{base}.yaml"
        folders = (_configs_folder(file), root() / "configs")
        base_file = next((one / name for one in folders if (one / name).is_file()), folders[0] / name)
        if not base_file.is_file():
            known = sorted({str(path.relative_to(one).with_suffix(""))
                            for one in folders for path in one.rglob("*.yaml")})
            raise ConfigError(f"base = {base!r} (in {file}): there is no file {base_file}; "
                              f"{_suggestion(base, known)}")
        yield from _layers(base_file, (*above, file.resolve()))
    yield str(file), written


def _read_yaml(file: Path) -> Written:
    if not file.is_file():
        known = sorted(str(path) for path in file.parent.glob("*.yaml")) or names(RUNS)
        raise ConfigError(f"config file {str(file)!r}: there is no such file; {_suggestion(str(file), known)}")
    try:
        text = file.read_text(encoding="utf-8")
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        texts = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ConfigError(f"config file {str(file)!r}: not readable as YAML, {error}; correct the file") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {str(file)!r}: holds a list; write `section: {{field: value}}`")
    return Written(values, texts)


def _parse_override(override: str) -> Written:
    """`a.b[0].c=v` as {"a": {"b": {0: {"c": v}}}}."""
    name, equals, text = override.partition("=")
    parts: list[Any] = [int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", name)]
    if not equals or not parts:
        raise ConfigError(f"{override!r} ({COMMAND_LINE}): an override is written field=value, such as "
                          "optim.total_tokens=1000000")
    nested = Written(text, text) if _takes_text(parts) and not _is_quoted(text) else _parse_value(name, text)
    for part in reversed(parts):
        nested = nested.under(part)
    return nested


def _is_quoted(text: str) -> bool:
    """As YAML quotes a text."""
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _parse_value(name: str, text: str) -> Written:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        texts = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{name} = {text!r} ({COMMAND_LINE}): not a YAML value; "
                          "quote it for the shell and for YAML") from error
    assert isinstance(parsed, dict)
    return Written(parsed["value"], texts)


def _takes_text(parts: Sequence[Any]) -> bool:
    """Whether the field that the parts of a name lead to holds text."""
    expected: Any = Config
    for part in parts:
        if get_origin(expected) is list:
            expected = get_args(expected)[0]
        elif is_dataclass(expected) and isinstance(expected, type):
            expected = get_type_hints(expected).get(str(part))
        else:
            return False
    return _is_text(expected)


# Values


def _blank_config() -> DictConfig:
    """The typed tree of a Config with every default in place, the name and the sources still empty.

    A Config without them cannot be constructed, hence the detour over one that has both.
    """
    stand_in = DataConfig(sources=[SourceConfig(name="none", domain="none", weight=1.0)])
    tree: DictConfig = OmegaConf.structured(Config(name="none", data=stand_in))
    for node in (tree, tree.data):
        OmegaConf.set_readonly(node, None)
    OmegaConf.update(tree, "name", "")
    OmegaConf.update(tree, "data.sources", [])
    return tree


def _assign_section(node: DictConfig, section: type, written: Written, name: str, origin: str) -> None:
    """Puts what is written into the typed `node` of dataclass `section`, whose full name is `name`."""
    if not isinstance(written.values, Mapping):
        raise ConfigError(f"{name} = {written.values!r} ({_where(origin)}): this is a section; write fields below it, "
                          f"such as {_join(name, next(iter(get_type_hints(section))))}")
    OmegaConf.set_readonly(node, None)  # frozen dataclasses make read-only nodes
    types = get_type_hints(section)
    for key, value in written.values.items():
        field_name = _join(name, str(key))
        if key not in types and field_name in RENAMED:
            raise ConfigError(f"{field_name} = {value!r} ({_where(origin)}): the field is called {RENAMED[field_name]} "
                              "now; write that")
        if key not in types:
            raise ConfigError(f"{field_name} = {value!r} ({_where(origin)}): there is no such field; "
                              f"{_suggest_field(field_name, name, types)}")
        if is_dataclass(types[key]):
            _assign_section(node[key], types[key], written.at(key), field_name, origin)
        elif get_origin(types[key]) is list:
            _assign_list(node, key, get_args(types[key])[0], written.at(key), field_name, origin)
        else:
            _assign_scalar(node, key, types[key], written.at(key), field_name, origin)


def _assign_list(node: DictConfig, key: str, section: type, written: Written, name: str, origin: str) -> None:
    """A list replaces the one before; a mapping from index to fields, as overrides make it, changes single items."""
    value = written.values
    if isinstance(value, list):
        OmegaConf.update(node, key, [])
        OmegaConf.set_readonly(node[key], None)
        for _ in value:
            node[key].append(OmegaConf.structured(section))
        indices = list(range(len(value)))
    elif isinstance(value, dict) and all(isinstance(index, int) for index in value):
        indices = list(value)
    else:
        raise ConfigError(f"{name} = {value!r} ({_where(origin)}): expected a list; "
                          f"write {name}: [{{...}}, {{...}}]")
    for index in indices:
        if not 0 <= index < len(node[key]):
            raise ConfigError(f"{name}[{index}] = {value[index]!r} ({_where(origin)}): the list has {len(node[key])} "
                              "items; count from 0")
        _assign_section(node[key][index], section, written.at(index), f"{name}[{index}]", origin)


def _assign_scalar(node: DictConfig, key: str, expected: Any, written: Written, name: str, origin: str) -> None:
    value = written.values
    if _is_text(expected) and isinstance(written.texts, str) and value is not None:
        value = written.texts
    # OmegaConf would turn a number into a string and 2 into a bool, takes infinity and nan for numbers, and lets whole
    # numbers through that no array can hold.
    unwanted = (
        (_is_text(expected) and not isinstance(value, str))
        or (expected is bool and not isinstance(value, bool) and not _refers(value))
        or (isinstance(value, float) and not math.isfinite(value))
        or (isinstance(value, int) and abs(value) > LARGEST_INT)
    )
    try:
        if not unwanted:
            OmegaConf.update(node, key, value)
            return
        cause = None
    except OmegaConfBaseException as error:
        cause = error
    raise ConfigError(f"{name} = {value!r} ({_where(origin)}): {_expectation(expected, value)}") from cause


def _is_text(expected: Any) -> bool:
    """Whether a field of this type holds text."""
    return expected is str or (get_origin(expected) is Literal and isinstance(get_args(expected)[0], str))


def _refers(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


# Words


def _expectation(expected: Any, value: Any) -> str:
    if get_origin(expected) is Literal:
        choices = [str(choice) for choice in get_args(expected)]
        close = difflib.get_close_matches(str(value), choices, n=1)
        return f"choose one of {', '.join(choices)}" + (f" (did you mean {close[0]}?)" if close else "")
    if expected is int:
        try:
            whole = float(value)
        except (TypeError, ValueError, OverflowError):
            whole = math.nan
        if abs(whole) > LARGEST_INT:
            return f"expected a whole number of at most {LARGEST_INT:,}"
        if not isinstance(value, bool) and math.isfinite(whole) and whole == int(whole):
            return f"expected a whole number; write it out, {int(whole)}"
        return "expected a whole number"
    if expected is float:
        return "expected a finite number"
    if expected is bool:
        return "expected true or false"
    return "expected text; put it in quotes"


def _suggest_field(name: str, section: str, siblings: Mapping[str, Any]) -> str:
    known = list(_field_names(Config, ""))
    last = name.rpartition(".")[2]
    elsewhere = [field for field in known if field.rpartition(".")[2] == last]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    beside = difflib.get_close_matches(last, list(siblings), n=1)
    if beside:
        return f"did you mean {_join(section, beside[0])}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if close:
        return f"did you mean {close[0]}?"
    return f"{section or 'a run'} has {', '.join(siblings)}"


def _field_names(section: type, name: str) -> Iterator[str]:
    for key, expected in get_type_hints(section).items():
        yield _join(name, key)
        if is_dataclass(expected) and isinstance(expected, type):
            yield from _field_names(expected, _join(name, key))


def _suggestion(wanted: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"there are {', '.join(known)}" if known else "check the path"


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _where(origin: str) -> str:
    return origin if origin == COMMAND_LINE else f"in {origin}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
