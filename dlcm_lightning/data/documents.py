"""Text documents out of files, and documents into shards: what `dlcm tokenize` and the sample corpus share.

A document goes to the validation split where its md5 falls into the lowest 2 % of all md5 values: the split depends
on the text alone, so it stays the same when files are renamed, reordered or added. A text met before is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.manifest import Manifest
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.data.writer import BLOCK_TOKENS, SHARD_BYTES, ShardWriter

VALIDATION_SHARE = 0.02
BATCH_CHARACTERS = 2_000_000
"""Text handed to the tokenizer at once: enough to keep its threads busy, little enough to see progress."""
JSON_LINES = (".jsonl", ".jsonl.gz")
IN_PROGRESS = ".unfinished"


def clean(text: str) -> str:
    """The text as valid UTF-8: lone surrogates, which JSON can spell, become U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def digest(text: str) -> bytes:
    """md5 of the text: its identity for duplicates, order and split."""
    return hashlib.md5(text.encode(), usedforsecurity=False).digest()


def split_of(identity: bytes, share: float = VALIDATION_SHARE) -> str:
    """The split of a document by its md5."""
    return "validation" if int.from_bytes(identity[:4], "big") < share * 2**32 else "train"


@dataclass(frozen=True)
class Built:
    """What came out of one source."""

    train: Manifest
    validation: Manifest
    duplicates: int
    """Documents dropped because their text had been seen."""


def tokenize_documents(
    texts: Iterable[str], tokenizer: Tokenizer, folder: str | Path, *, source: str, domain: str,
    seen: set[bytes] | None = None, validation_share: float = VALIDATION_SHARE, total_bytes: int | None = None,
    shard_bytes: int = SHARD_BYTES, block_tokens: int = BLOCK_TOKENS,
) -> Built:
    """Writes texts to folder/train and folder/validation; the folder appears when both are whole.

    seen: md5s of texts to drop, extended by those written; kept in memory (about 100 bytes a document).
    total_bytes: length of the progress bar in UTF-8 bytes. DataError: the folder exists; no document at all.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; remove it to build the source again")
    working = folder.with_name(f".{folder.name}{IN_PROGRESS}")
    shutil.rmtree(working, ignore_errors=True)
    seen = set() if seen is None else seen
    duplicates = 0
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total_bytes, desc=f"tokenise {source}", unit="B", unit_scale=True,
                                       delay=5, leave=False))
        writers = {split: ShardWriter(
            working / split, source=source, domain=domain, split=split, tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size, shard_bytes=shard_bytes, block_tokens=block_tokens)
            for split in ("train", "validation")}
        for writer in writers.values():
            stack.push(writer.__exit__)
        for batch in _batches(texts):
            fresh: list[tuple[str, str]] = []
            for text in batch:
                identity = digest(text)
                if identity in seen:
                    duplicates += 1
                    continue
                seen.add(identity)
                fresh.append((text, split_of(identity, validation_share)))
            for (text, split), ids in zip(fresh, tokenizer.encode_documents([text for text, _ in fresh]), strict=True):
                size = len(text.encode())
                writers[split].write(ids, size)
                bar.update(size)
        if not any(writer.documents for writer in writers.values()):
            raise DataError(f"source {source!r}: no document with text in it; check the inputs and their text field")
        manifests = {split: writer.close() for split, writer in writers.items()}
        stack.pop_all()
        bar.close()
    working.replace(folder)
    return Built(manifests["train"], manifests["validation"], duplicates)


def tokenize(
    inputs: list[str | Path], out: str | Path, *, source: str, domain: str, tokenizer_folder: str | Path | None = None,
    text_field: str = "text", validation_share: float = VALIDATION_SHARE,
) -> Built:
    """`dlcm tokenize`: files or folders of .jsonl, .jsonl.gz or plain text into out/source/{train,validation}.

    out becomes a `data.root`: it also receives the tokenizer, and refuses a second one. A plain-text file is one
    document, a line of JSON lines too (its text under text_field). DataError: nothing to read, a file that cannot be
    read (named with its line), another tokenizer than out holds, the source built already.
    """
    out = Path(out)
    held = out / "tokenizer.json"
    if tokenizer_folder is None and not held.is_file():
        raise DataError(f"{held}: missing; name the folder of a tokenizer for the first source of {out}")
    tokenizer = Tokenizer.load(out if tokenizer_folder is None else tokenizer_folder)
    if held.is_file() and Tokenizer.load(out).fingerprint != tokenizer.fingerprint:
        raise DataError(f"{held}: another tokenizer than {tokenizer_folder}; all sources of a corpus share one, "
                        "write elsewhere or use that one")
    files = list_files(inputs)
    if not held.is_file():
        tokenizer.save(out)
    texts = (text for path in files for text in read_file(path, text_field))
    try:
        return tokenize_documents(texts, tokenizer, out / source, source=source, domain=domain,
                                  validation_share=validation_share)
    except OSError as error:
        raise DataError(f"{out / source}: not built ({error}); what is there is kept under a hidden name and cleared "
                        "by the next attempt") from error


def list_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Every file named or below a folder named, in order of path; hidden ones left out. DataError: none found."""
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            files += sorted(path for path in item.rglob("*") if path.is_file() and not any(
                part.startswith(".") for part in path.relative_to(item).parts))
        elif item.is_file():
            files.append(item)
        else:
            raise DataError(f"{item}: no such file or folder")
    if not files:
        raise DataError(f"{', '.join(map(str, inputs))}: no files to read")
    return files


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one file."""
    if not path.name.endswith(JSON_LINES):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error}); convert it or leave it out") from error
        return
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                if line.strip():
                    text = json.loads(line)[text_field]
                    if not isinstance(text, str):
                        raise TypeError(f"field {text_field!r} is no text")
                    yield text
    except (ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise DataError(f"{path}, line {max(number, 1)}: no JSON object with a text field {text_field!r} "
                        f"({type(error).__name__}: {error}); correct the file or name the field") from error


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Cleaned texts, blank ones left out, in lists of about BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for text in map(clean, texts):
        if not text.strip():
            continue
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
