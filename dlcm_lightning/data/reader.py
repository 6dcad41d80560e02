"""The corpus as a model sees it: global samples, their split over ranks and micro-batches, validation.

Global step s consumes the samples [s * B, (s + 1) * B), B = global_batch_size, whatever the number of ranks. Rank r of
W takes the contiguous part [r * B // W, (r + 1) * B // W) of them and cuts it into micro-batches of m rows; where that
does not come out even, padding rows complete the last ones, so that every rank runs the same number of forward passes.
The state of the reader is therefore one integer, the number of samples consumed, the same on every rank and for every
number of ranks.

    reader = Reader(config.data, config.seed, config.model.vocab_size)
    for batch in TrainingBatches(reader, rank, world, first_step=100, last_step=200): ...  # loader.py

A row that cannot be read is an error that names shard and sample, or, by configuration, a padding row in the same
place.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from dlcm_lightning.batch import Batch, Unreadable
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.config.data import TOKENIZERS
from dlcm_lightning.data.manifest import MANIFEST
from dlcm_lightning.data.mixture import Mixture, Part
from dlcm_lightning.data.order import NOISE, Order, key, keys_of
from dlcm_lightning.data.packing import Rows, batches
from dlcm_lightning.data.source import NO_STARTS, Source
from dlcm_lightning.data.store import Chunks, store_at
from dlcm_lightning.data.tokenizer import Tokenizer
from dlcm_lightning.data.verify import verify_shard
from dlcm_lightning.errors import DataError
from dlcm_lightning.progress import Log

VERIFY_BELOW_BYTES = 1024**3
"""Local corpora smaller than this are read in full and compared with their sha256 when opened (about 1 s per GiB)."""
CHECK_BELOW_SHARDS = 1000
"""Local corpora of fewer shards have the size of each looked up when opened; larger ones when a shard is touched."""
VALIDATION = "validation"


def corpus_folder(config: DataConfig, vocab_size: int) -> Path:
    """Where tokenizer.json and the sources lie: data.root, or for the sample corpus a folder per tokenizer in it.
    DataError: `data.tokenizer` names a folder that holds none."""
    if config.corpus == "shards":
        return Path(config.root)
    if config.tokenizer in TOKENIZERS:
        return Path(config.root) / (f"bpe-{vocab_size}" if config.tokenizer == "bpe" else config.tokenizer)
    tokenizer = given_tokenizer(config, vocab_size)
    frame = json.dumps([tokenizer.fingerprint, tokenizer.begin, tokenizer.end])
    return Path(config.root) / f"tokenizer-{hashlib.sha256(frame.encode()).hexdigest()[:16]}"


def given_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    """Of the folder that `data.tokenizer` names. DataError: it holds none, or one of more ids than the model has."""
    try:
        tokenizer = Tokenizer.load(config.tokenizer)
    except DataError as error:
        raise DataError(f"data.tokenizer = {config.tokenizer!r}: {error}") from error
    if tokenizer.vocab_size > vocab_size:
        raise DataError(f"data.tokenizer = {config.tokenizer!r}: {tokenizer.vocab_size} ids, but model.vocab_size = "
                        f"{vocab_size}; raise it to at least {tokenizer.vocab_size}")
    return tokenizer


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world: int) -> int:
    """Forward passes of every rank in a step, padding rows included."""
    rows = math.ceil(global_batch_size / world)
    return math.ceil(rows / micro_batch_size)


class Reader:
    """All sources of a run, opened and checked. Can be pickled to loader processes."""

    def __init__(self, config: DataConfig, seed: int, vocab_size: int, *, verify_all: bool | None = None,
                 log: Log = print) -> None:
        """vocab_size: of the model. verify_all: compare every shard's sha256 now; None: where the corpus is small.

        DataError: corpus or source missing, made with another tokenizer, damaged, too small, empty domain, ids
        beyond the vocabulary. A missing source of the *sample* corpus is reported and its weight shared out.
        """
        self.config, self.seed = config, seed
        self._noise_key = key(NOISE, seed)
        self.chunks = Chunks(config.cache_megabytes * 10**6)
        place = config.root if config.corpus == "shards" else corpus_folder(config, vocab_size)
        self.store = store_at(place, self.chunks)
        if not self.store.remote and not self.store.exists():
            raise DataError(f"data.root = {config.root!r}: there is no folder {self.store.where()}; write shards into "
                            "it with `dlcm tokenize`, or correct data.root")
        tokenizer = Tokenizer.load(self.store)
        if tokenizer.vocab_size > vocab_size:
            raise DataError(f"{self.store.where('tokenizer.json')}: {tokenizer.vocab_size} ids, but "
                            f"model.vocab_size = {vocab_size}; raise it to at least {tokenizer.vocab_size}")
        self.bos_id = tokenizer.bos_id
        self.token_bytes = tokenizer.token_bytes()
        self.sources = self._present(log)
        self._train, self._validation = (
            [Source(self.store.below(source.name).below(split), tokenizer) for source in self.sources]
            for split in ("train", VALIDATION))
        self._check_manifests()
        self._check_shards(verify_all, log)
        self._check_sizes()
        self._domains = np.array([config.domains.index(source.domain) for source in self.sources])
        length = config.sequence_length
        orders = [Order(seed, source.name, stream.first_rows(length), config.shuffle_shards)
                  for source, stream in zip(self.sources, self._train, strict=True)]
        self.mixture = Mixture(
            seed, [Part(source.name, source.weight, order, source.max_epochs)
                   for source, order in zip(self.sources, orders, strict=True)], config.block_rows,
            [(math.ceil(change.at_tokens / length), change.weights) for change in config.weight_changes])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the text that the order of samples is drawn from, and of what the order depends on besides the
        configured weights. Another value on resuming means that sample i is not what it was."""
        digest = hashlib.sha256(repr([self.seed, self.config.sequence_length, self.config.block_rows,
                                      self.config.shuffle_shards]).encode())
        if any(part.max_epochs for part in self.mixture.parts):
            digest.update(b"sources end at a row")  # and not at a block, as once
        for source, stream in zip(self.sources, self._train, strict=True):
            shards = stream.manifest.shards
            digest.update(repr([source.name, source.domain, *shards.texts("sha256"), *shards.texts("skip_sha256")]
                               ).encode())
        return digest.hexdigest()

    @cached_property
    def validation_fingerprint(self) -> str:
        """sha256 of the text that is validated on, and of how it is cut and drawn for."""
        digest = hashlib.sha256(repr([self.seed, self.config.sequence_length]).encode())
        for source, stream in zip(self.sources, self._validation, strict=True):
            shards = stream.manifest.shards
            digest.update(repr([source.name, source.domain, self._validation_rows(stream), *shards.texts("sha256"),
                                *shards.texts("skip_sha256")]).encode())
        return digest.hexdigest()

    @property
    def domains(self) -> list[str]:
        """Domains as numbered in `Batch.domains`."""
        return self.config.domains

    def check_lasts(self, rows: int) -> None:
        """DataError: the sources' max_epochs end before so many rows."""
        self.mixture.check_lasts(rows)

    def training_stream(self, domain: str) -> list[Source]:
        """The training splits of a domain's sources."""
        return [stream for source, stream in zip(self.sources, self._train, strict=True) if source.domain == domain]

    def validation_stream(self, domain: str) -> list[tuple[Source, int]]:
        """The validation splits of a domain's sources, each with the number of rows that are validated on."""
        return [(stream, self._validation_rows(stream))
                for source, stream in zip(self.sources, self._validation, strict=True) if source.domain == domain]

    def places(self, rows: int, rank: int, world: int) -> list[int]:
        """The part of `rows` consecutive rows that a rank reads, completed with -1."""
        mine = list(range(rank * rows // world, (rank + 1) * rows // world))
        size = self.config.micro_batch_size
        return mine + [-1] * (micro_batches_per_step(rows, size, world) * size - len(mine))

    def read_steps(self, first: int, last: int, rank: int = 0, world: int = 1) -> Rows:
        """What one rank reads for the steps [first, last), as many rows for each."""
        places = np.array(self.places(self.config.global_batch_size, rank, world))
        steps = np.arange(first, last)[:, None]
        samples = np.where(places >= 0, steps * self.config.global_batch_size + places, -1).reshape(-1)
        sources, rows = np.full((2, len(samples)), -1, dtype=np.int64)
        real = samples >= 0
        drawn = self.mixture.draw(samples[real])
        sources[real], rows[real] = drawn.sources, drawn.rows
        return self._read(self._train, samples, sources, rows, self._noise_key)

    def validation_batch(self, samples: list[int]) -> Batch:
        """Validation rows, indices into validation_rows; -1 gives a padding row."""
        wanted = np.array([self.validation_rows[sample] if sample >= 0 else (-1, -1) for sample in samples])
        rows = self._read(self._validation, np.array(samples), wanted[:, 0], wanted[:, 1],
                          key(NOISE, key(self.seed, VALIDATION)))
        return next(batches(rows, 1, len(samples)))

    def step_batches(self, step: int, rank: int = 0, world: int = 1) -> list[Batch]:
        """The micro-batches of one rank in a step."""
        return list(batches(self.read_steps(step, step + 1, rank, world), 1, self.config.micro_batch_size))

    def prefetch(self, step: int, rank: int, world: int) -> None:
        """Says that a step will be read soon. Returns at once; does nothing for local corpora."""
        if not self.store.remote:
            return
        places = [place for place in self.places(self.config.global_batch_size, rank, world) if place >= 0]
        samples = step * self.config.global_batch_size + np.array(places, dtype=np.int64)
        drawn = self.mixture.draw(samples)
        length = self.config.sequence_length
        for source, row in zip(drawn.sources.tolist(), drawn.rows.tolist(), strict=True):
            self.chunks.submit(partial(self._train[source].prefetch, row * length, length + 1))

    @cached_property
    def validation_rows(self) -> list[tuple[int, int]]:
        """(source, row) of every validation row: consecutive rows, source after source, in the sources' order."""
        return [(number, row) for number, stream in enumerate(self._validation)
                for row in range(self._validation_rows(stream))]

    def fixed_documents(self, domain: str, count: int = 2, characters: int = 600) -> list[str]:
        """The first validation documents of a domain, spread over its sources, cut at `characters`."""
        streams = [stream for stream, rows in self.validation_stream(domain) if rows]
        tokenizer = Tokenizer.load(self.store)
        texts = []
        for place in range(count):
            found = next(streams[place % len(streams)].documents(place // len(streams)), None)
            if found is not None:
                texts.append(tokenizer.decode(found)[:characters])
        return texts

    def _read(self, streams: list[Source], samples: np.ndarray, sources: np.ndarray, rows: np.ndarray, noise_key: int
              ) -> Rows:
        """samples, sources, rows: (B,) int64, -1 for padding rows."""
        length = self.config.sequence_length
        stream = np.empty((len(samples), length + 1), dtype=streams[0].dtype)
        found: list[np.ndarray] = []
        missed: dict[int, DataError] = {}
        asked = list(zip(sources.tolist(), rows.tolist(), strict=True))
        for place, (source, row) in enumerate(asked):
            try:
                found.append(streams[source].read_into(stream[place], row * length) if source >= 0 else NO_STARTS)
            except DataError as error:
                missed[place] = error
                found.append(NO_STARTS)
        padding = samples < 0
        padding[list(missed)] = True
        stream[padding] = self.bos_id
        if stream.max() >= len(self.token_bytes):
            self._find_wrong_ids(streams, asked, stream, missed)
            padding[list(missed)] = True
            stream[padding] = self.bos_id
        unreadable = tuple((place, self._unreadable(int(samples[place]), *asked[place], error))
                           for place, error in sorted(missed.items()))
        places, inside = np.repeat(np.arange(len(found)), [len(one) for one in found]), np.concatenate(found)
        kept = (inside > 0) & ~padding[places]
        places, inside = places[kept], inside[kept]
        begins = np.searchsorted(places, np.arange(len(found) + 1))
        noise_keys = keys_of(noise_key, samples).view(np.int64)
        return Rows(stream, inside + places * length, begins, np.where(padding, -1, samples),
                    np.where(padding, 0, self._domains[sources]), noise_keys, unreadable)

    def _find_wrong_ids(self, streams: list[Source], asked: list[tuple[int, int]], stream: np.ndarray,
                        missed: dict[int, DataError]) -> None:
        """Notes the rows that hold ids beyond the vocabulary."""
        for place, (source, row) in enumerate(asked):
            try:
                if source >= 0 and place not in missed:
                    streams[source].check_ids(stream[place], row * self.config.sequence_length)
            except DataError as error:
                missed[place] = error

    def _unreadable(self, sample: int, source: int, row: int, error: DataError) -> Unreadable:
        name = self.sources[source].name
        if self.config.unreadable == "stop":
            raise DataError(f"sample {sample} (row {row} of source {name!r}): {error}. data.unreadable=mask would "
                            "train on without such rows") from error
        return Unreadable(sample, name, str(error))

    def _validation_rows(self, stream: Source) -> int:
        return min(stream.rows(self.config.sequence_length), self.config.validation_rows)

    def _present(self, log: Log) -> list[SourceConfig]:
        """The configured sources with a weight; those that a sample corpus lacks are left out and reported."""
        later = {name for change in self.config.weight_changes for name, weight in change.weights.items() if weight}
        wanted = [source for source in self.config.sources if source.weight > 0 or source.name in later]
        if self.config.corpus == "shards":
            return wanted
        present = [source for source in wanted if self.store.below(source.name).below("train").exists(MANIFEST)]
        missing = [source.name for source in wanted if source not in present]
        if not present:
            raise DataError(f"{self.store.where()}: holds none of {', '.join(missing)}; remove the folder and run "
                            "again with a network, or correct data.sources")
        if missing:
            log(f"data: the sample corpus lacks {', '.join(missing)}; their weight goes to the other sources "
                   f"in proportion. Remove {self.store.where()} and run again to fetch them.")
        return present

    def _check_manifests(self) -> None:
        """DataError: a source was built for another domain, or sources were parted into splits in different ways."""
        known: dict[float, str] = {}
        for source, *streams in zip(self.sources, self._train, self._validation, strict=True):
            for manifest in (stream.manifest for stream in streams):
                if manifest.domain != source.domain:
                    raise DataError(f"data.sources[{source.name}].domain = {source.domain!r}: the source was built for "
                                    f"domain {manifest.domain!r}; write that, or build it again")
                if manifest.validation_share is not None:
                    known.setdefault(manifest.validation_share, source.name)
        if len(known) > 1:
            shown = ", ".join(f"{name!r} has {share:g}" for share, name in known.items())
            raise DataError(f"{self.store.where()}: sources were built with different validation shares ({shown}), so "
                            "a text that two of them hold may be trained on in one and validated on in the other; "
                            "build them again with one --validation-share")

    def _check_shards(self, verify_all: bool | None, log: Log) -> None:
        """DataError, or a report where rows may be masked: a shard is not as its manifest states."""
        everything = [*self._train, *self._validation]
        size = sum(stream.manifest.shards.total("size") for stream in everything)
        shards = sum(len(stream.manifest.shards) for stream in everything)
        if verify_all or (verify_all is None and size < VERIFY_BELOW_BYTES and not self.store.remote):
            check: Callable[[Source, int], None] = verify_shard
        elif shards < CHECK_BELOW_SHARDS and not self.store.remote:
            check = Source.check_size
        else:
            return
        for stream in everything:
            for number in range(len(stream.manifest.shards)):
                try:
                    check(stream, number)
                except DataError as error:
                    if self.config.unreadable == "stop":
                        raise
                    log(f"data: {error}; rows that need it will be masked")

    def _check_sizes(self) -> None:
        length = self.config.sequence_length
        for source, stream in zip(self.sources, self._train, strict=True):
            if not stream.rows(length):
                raise DataError(f"source {source.name!r} (domain {source.domain!r}): {stream.tokens} training tokens "
                                f"in {stream.place} fill no row of {length} + 1; lower data.sequence_length, add "
                                "documents, or leave the source out")
        for domain in dict.fromkeys(source.domain for source in self.sources):
            if not sum(rows for _, rows in self.validation_stream(domain)):
                tokens = sum(stream.tokens for stream, _ in self.validation_stream(domain))
                raise DataError(f"domain {domain!r}: {tokens} validation tokens fill no row of {length} + 1; lower "
                                "data.sequence_length or add documents to its validation split")
