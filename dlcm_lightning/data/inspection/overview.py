"""What a run will read, before it does: the mixture as a tree, how often every source comes, and some documents.

Everything but the documents follows from manifests and configuration, exactly, and takes as long as opening them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dlcm_lightning.config import Config
from dlcm_lightning.data.inspection.lookup import at_number, streams_of
from dlcm_lightning.data.inspection.position import planned
from dlcm_lightning.data.inspection.table import escape_control_characters, folded, percent, table
from dlcm_lightning.data.inspection.weights import held
from dlcm_lightning.data.reader import Reader, corpus_folder
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log

LINES, COLUMNS = 12, 116
"""Of a document, at most."""


@dataclass(frozen=True)
class Planned:
    """What the planned budget takes from a source."""

    name: str
    domain: str
    weight: Fraction
    """At the beginning of the run."""
    rows: int
    epochs: Fraction
    """Rows over rows of the source."""
    max_epochs: float
    """0 for no limit."""


def open_run(config: Config, log: Log = print) -> Reader:
    """A run's data, nothing verified. DataError: as Reader; the sample corpus has not been built."""
    folder = corpus_folder(config.data, config.model.vocab_size)
    if config.data.corpus == "sample" and not folder.is_dir():
        raise DataError(f"{folder}: the sample corpus is not there yet; `dlcm prepare` with the same arguments fetches "
                        "and builds it")
    return Reader(config.data, config.seed, config.model.vocab_size, verify_all=False, log=log)


def plan(config: Config, reader: Reader) -> list[Planned]:
    """In the order of `reader.sources`; of a budget that outlasts the data, what there is."""
    mixture = reader.mixture
    given = mixture.given(planned(mixture, config.total_steps * config.data.global_batch_size))
    weights = [Fraction(repr(float(part.weight))) for part in mixture.parts]
    return [Planned(source.name, source.domain, weights[number] / sum(weights), given[number],
                    Fraction(given[number], mixture.parts[number].order.rows), source.max_epochs)
            for number, source in enumerate(reader.sources)]


def overview(config: Config, reader: Reader) -> Iterator[str]:
    """The mixture and what the budget makes of it."""
    length, rows = config.data.sequence_length, config.total_steps * config.data.global_batch_size
    plans, train = plan(config, reader), streams_of(reader, "train")
    total = sum(one.rows for one in plans)
    yield (f"{escape_control_characters(config.name)}: {sum(stream.tokens for stream in train):,d} training tokens in "
           f"{reader.store.where()}; the budget is {rows * length:,d}, {rows:,d} rows of {length:,d}")
    yield ""
    lines: list[tuple[str, ...]] = [
        ("", "weight", "of budget", "tokens", "documents", "tokens/doc", "bytes/token", "shards", "copies out",
         "epochs", "at most", "licence")]
    for domain in reader.domains:
        mine = [number for number, one in enumerate(plans) if one.domain == domain]
        if not mine:
            continue
        lines.append(_line(domain, [plans[number] for number in mine], [train[number] for number in mine], total))
        lines += [_line(f"  {plans[number].name}", [plans[number]], [train[number]], total, True) for number in mine]
    lines.append(_line("all", plans, train, total))
    yield from table(lines, "<>>>>>>>>>><")
    yield ""
    yield from _changes(config, reader)
    yield "; ".join(_validation(reader, domain) for domain in reader.domains
                    if reader.validation_stream(domain))
    if (there := planned(reader.mixture, rows)) < rows:
        yield ""
        yield (f"The data end before the budget: every source has been read max_epochs times after {there * length:,d} "
               f"tokens, {there // config.data.global_batch_size:,d} whole steps. Raise data.sources[].max_epochs, or "
               f"set "
               f"optim.total_tokens to {there // config.data.global_batch_size * config.data.tokens_per_step} or less.")


def _line(name: str, plans: Sequence[Planned], streams: Sequence[Source], total: int, own: bool = False
          ) -> tuple[str, ...]:
    manifests = [stream.manifest for stream in streams]
    tokens, documents = sum(one.tokens for one in manifests), sum(one.documents for one in manifests)
    copies = sum(one.shards.total("skipped_documents") for one in manifests)
    return (escape_control_characters(name), percent(float(sum(one.weight for one in plans))),
            percent(sum(one.rows for one in plans) / max(1, total)), f"{tokens:,d}", f"{documents:,d}",
            f"{tokens / max(1, documents):,.0f}", f"{sum(one.text_bytes for one in manifests) / max(1, tokens):.2f}",
            f"{sum(len(one.shards) for one in manifests):,d}", f"{copies:,d}" if copies else "",
            f"{float(plans[0].epochs):.3f}" if own else "",
            f"{plans[0].max_epochs:g}" if own and plans[0].max_epochs else "",
            next(folded(escape_control_characters(str(manifests[0].about.get("licence", ""))), 40)) if own else "")


def _changes(config: Config, reader: Reader) -> Iterator[str]:
    """Every point of the budget from which other weights hold, and why."""
    mixture, data = reader.mixture, config.data
    total = planned(mixture, config.total_steps * data.global_batch_size)
    for one in held(mixture, data):
        first = one.first_block * mixture.block_rows
        if not 0 < first < total or not (one.changed or one.used_up):
            continue
        reasons = ["data.weight_changes"] * one.changed
        reasons += [f"{escape_control_characters(name)} has been read max_epochs times" for name in one.used_up]
        shown = ", ".join(f"{escape_control_characters(name)} {percent(float(weight))}"
                          for name, weight in zip(mixture.names, one.weights, strict=True) if weight)
        yield (f"from {first * data.sequence_length:,d} tokens, step {first // data.global_batch_size + 1:,d} "
               f"({', '.join(reasons)}): {shown}")


def _validation(reader: Reader, domain: str) -> str:
    streams = reader.validation_stream(domain)
    return (f"validation {escape_control_characters(domain)}: {sum(rows for _, rows in streams):,d} rows of "
            f"{sum(stream.tokens for stream, _ in streams):,d} tokens")


def documents(reader: Reader, count: int, characters: int) -> Iterator[str]:
    """The beginnings of `count` documents of every training stream, spread evenly over it."""
    tokenizer = Tokenizer.load(reader.store)
    for source, stream in zip(reader.sources, streams_of(reader, "train"), strict=True):
        held = stream.manifest.documents
        for number in sorted({place * held // count for place in range(count)}):
            place = at_number(stream, number)
            ids = stream.read(place.first, min(place.tokens, 4 * characters + 2))[0]
            text = tokenizer.decode(ids)
            yield ""
            name = escape_control_characters(source.name)
            yield f"{name}, document {number:,d} of {held:,d}, {place.tokens:,d} tokens"
            yield from _quoted(text[:characters], len(ids) < place.tokens or len(text) > characters)


def _quoted(text: str, more: bool) -> Iterator[str]:
    """Lines behind a bar, so that no document can pass for anything else."""
    lines = [part for line in text.split("\n") for part in folded(escape_control_characters(line.expandtabs(4)),
                                                                  COLUMNS)]
    for line in lines[:LINES]:
        yield f"  | {line}".rstrip()
    if more or len(lines) > LINES:
        yield "  | …"
