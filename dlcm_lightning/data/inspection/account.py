"""An audit as text: the account of what was consumed, and the story of a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

from dlcm_lightning.data.inspection.audit import Audit, Consumed
from dlcm_lightning.data.inspection.lookup import Place, at_number, streams_of, with_md5
from dlcm_lightning.data.inspection.table import escape_control_characters, percent, table
from dlcm_lightning.data.preprocessing.documents import SPLITS, clean, digest
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import progress_bar

MOST_LINES = 40


def account(audit: Audit) -> Iterator[str]:
    """Tokens and shares by domain and source, against what the weights promise."""
    consumed, mixture = audit.consumed(), audit.reader.mixture
    yield _headline(audit)
    yield ""
    rows: list[tuple[str, ...]] = [
        ("", "planned", "consumed", "tokens", "rows", "off by", "epochs", "begun", "unreadable")]
    for domain in audit.reader.domains:
        mine = [one for one in consumed if one.domain == domain]
        if mine:
            rows.append(_line(domain, mine, audit))
            rows += [_line(f"  {one.name}", [one], audit, one) for one in mine]
    rows.append(_line("all", consumed, audit))
    yield from table(rows, "<>>>>>>>>")
    yield ""
    rest = audit.samples % mixture.block_rows
    yield (f"off by: rows above or below what the weights promise, exactly. Every block of {mixture.block_rows:,d} "
           "rows gives each source its weight to less than a row; "
           + (f"this position is {rest:,d} rows into one." if rest else "this position is the end of one."))
    if audit.unreadable:
        yield (f"unreadable: {len(audit.unreadable):,d} of the rows consumed predicted nothing; unreadable-*.jsonl in "
               f"{audit.run} names them. dlcm data verify finds damaged shards.")


def _line(name: str, parts: Sequence[Consumed], audit: Audit, own: Consumed | None = None) -> tuple[str, ...]:
    rows, exact = sum(part.rows for part in parts), sum((part.exact for part in parts), Fraction(0))
    samples, off = max(1, audit.samples), round(float(rows - exact), 2) + 0.0  # which is never -0.0
    unreadable = sum(part.unreadable for part in parts)
    return (escape_control_characters(name), percent(float(exact / samples)), percent(rows / samples),
            f"{rows * audit.config.data.sequence_length:,d}", f"{rows:,d}", f"{off:+.2f}",
            f"{float(own.epochs):.3f}" if own else "", f"{own.begun:,d}" if own else "",
            f"{unreadable:,d}" if unreadable else "")


def _headline(audit: Audit) -> str:
    data = audit.config.data
    place = (f"newest checkpoint {audit.checkpoint.name}" if audit.step == audit.checkpoint_step
             else f"its newest checkpoint is {audit.checkpoint.name}")
    return (f"{audit.run} at step {audit.step:,d} of {audit.config.total_steps:,d} ({place}): "
            f"{audit.samples * data.sequence_length:,d} of {audit.planned_samples * data.sequence_length:,d} tokens, "
            f"{audit.samples:,d} rows of {data.sequence_length:,d}")


def find_text(audit: Audit, content: bytes) -> tuple[bytes, list[Place]]:
    """md5 and places of a text as it is, or else of the text without the line ends that an editor has added."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"--document: not UTF-8 text ({error})") from error
    identities = [digest(clean(one)) for one in dict.fromkeys([text, text.removesuffix("\n"), text.rstrip("\r\n")])]
    for identity in identities:
        if found := find_md5(audit, identity):
            return identity, found
    return identities[0], []


def find_md5(audit: Audit, identity: bytes) -> list[Place]:
    """Every copy in both splits of every source of the run."""
    streams = [stream for split in SPLITS for stream in streams_of(audit.reader, split)]
    documents = sum(stream.manifest.shards.total(name) for stream in streams
                    for name in ("documents", "skipped_documents"))
    with progress_bar(total=16 * documents, desc="search", unit="B", unit_scale=True) as bar:
        return [place for stream in streams for place in with_md5(stream, identity, bar.update)]


def parse_md5(text: str) -> bytes:
    try:
        identity = bytes.fromhex(text)
    except ValueError:
        identity = b""
    if len(identity) != 16:
        raise DataError(f"--md5 {text}: write 32 hexadecimal digits, as md5sum prints them")
    return identity


def find_number(audit: Audit, text: str) -> Place:
    """The document that SOURCE:N or SOURCE/SPLIT:N names."""
    name, _, number = text.rpartition(":")
    source, _, split = name.partition("/")
    names = [one.name for one in audit.reader.sources]
    if source not in names or (split or "train") not in SPLITS or not number.isdecimal():
        raise DataError(f"--number {text}: write SOURCE:N or SOURCE/validation:N, N from 0, with a source among "
                        f"{', '.join(names)}")
    return at_number(streams_of(audit.reader, split or "train")[names.index(source)], int(number))


def story(audit: Audit, identity: bytes | None, places: Sequence[Place]) -> Iterator[str]:
    """Where a document lies and when the planned budget reads it. identity: its md5, if it was asked for by it."""
    yield _headline(audit)
    yield ""
    if identity is not None:
        known = f"document with md5 {identity.hex()}: "
        if not places:
            yield (known + "in no source of this run, neither to train nor to validate on: never seen. Only the same "
                   "text, byte for byte, would have been found.")
            return
        yield known + f"{len(places):,d} cop{'y' if len(places) == 1 else 'ies'} in the shards of this run"
    tokenizer = Tokenizer.load(audit.reader.store)
    shown = [place for place in places if not place.skipped]
    for place in shown:
        yield from _where(audit, place)
        found = digest(tokenizer.decode(place.ids()))
        if identity is None:
            yield f"  md5 {found.hex()}"
        elif found != identity:
            yield ("  caution: its tokens decode to a text of another md5; the tokenizer changes texts, or the shard "
                   "is damaged (dlcm data verify)")
        yield from _when(audit, place)
    skipped = [place for place in places if place.skipped]
    for place in skipped[:MOST_LINES]:
        yield f"{_named(audit, place)}: left out, as a copy of an earlier document of the source"
    if len(skipped) > MOST_LINES:
        yield f"and {len(skipped) - MOST_LINES:,d} more copies that are left out"


def _named(audit: Audit, place: Place) -> str:
    name = place.source.manifest.shards.texts("name")[place.shard]
    return escape_control_characters(f"{place.source.place}/{name}, block {place.block}, document {place.place} in it")


def _where(audit: Audit, place: Place) -> Iterator[str]:
    rows = audit.rows_of(place)
    yield _named(audit, place)
    yield (f"  {place.tokens:,d} tokens, document {place.number:,d} of its stream, tokens {place.first:,d} to "
           f"{place.first + place.tokens - 1:,d}")
    shown = ", ".join(f"{row:,d} ({tokens:,d})" for row, tokens in rows[:MOST_LINES // 4])
    more = f" and {len(rows) - MOST_LINES // 4:,d} more" if len(rows) > MOST_LINES // 4 else ""
    yield f"  in rows (tokens of it) {shown}{more}" if rows else "  in no row: it lies in the tail that fills none"


def _when(audit: Audit, place: Place) -> Iterator[str]:
    validation = {id(stream): count for domain in audit.reader.domains
                  for stream, count in audit.reader.validation_stream(domain)}
    if id(place.source) in validation:
        read = [row for row, _ in audit.rows_of(place) if row < validation[id(place.source)]]
        yield ("  validation split: never trained on; " + (
            f"{len(read):,d} of its rows are read by every validation" if read else "in no row that is validated on"))
        return
    found = audit.appearances(place)
    done = sum(one.sample < audit.samples for one in found)
    yield f"  training split: {done:,d} rows with some of it read so far, {len(found) - done:,d} to come in the budget"
    data = audit.config.data
    rows = [("", "after tokens", "step", "sample", "row", "tokens of it", "epoch", "")]
    for one in found[:MOST_LINES]:
        state = "to come" if one.sample >= audit.samples else "unreadable" if one.sample in audit.unreadable else "seen"
        rows.append(("   ", f"{one.sample * data.sequence_length:,d}", f"{one.sample // data.global_batch_size + 1:,d}",
                     f"{one.sample:,d}", f"{one.row:,d}", f"{one.tokens:,d}", f"{one.epoch + 1:,d}", state))
    if found:
        yield from table(rows, "<>>>>>><")
    if len(found) > MOST_LINES:
        yield f"    and {len(found) - MOST_LINES:,d} more"
