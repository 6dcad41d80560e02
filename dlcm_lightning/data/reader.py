"""The corpus as a model sees it: global samples, their split over ranks and micro-batches, validation.

Global step s consumes the samples [s * B, (s + 1) * B), B = rows_per_step, whatever the number of ranks. Rank r of W
takes the contiguous part [r * B // W, (r + 1) * B // W) of them and cuts it into micro-batches of m rows; where that
does not come out even, filler rows complete the last ones, so that every rank runs the same number of forward passes.
The state of the reader is therefore one integer, the number of micro-batches consumed.

    reader = Reader(config.data, config.seed, config.model.vocab_size)
    batches = TrainingBatches(reader, rank, world, first=consumed, last=total)    # a map-style torch Dataset

Both datasets are map-style: item i is a `Batch`, the same in whichever loader process it is read. Use them in a
DataLoader with batch_size=None and no shuffling.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlcm_lightning.batch import Batch
from dlcm_lightning.config import DataConfig, SourceConfig
from dlcm_lightning.data.errors import DataError
from dlcm_lightning.data.manifest import MANIFEST
from dlcm_lightning.data.mixture import Mixture, key
from dlcm_lightning.data.packing import Row, cut_row, filler_row, pack
from dlcm_lightning.data.source import Source
from dlcm_lightning.data.tokenizer import Tokenizer

VERIFY_BELOW_BYTES = 1024**3
"""Corpora smaller than this are read in full and compared with their sha256 when opened (about 1 s per GiB)."""
CACHED_STEPS = 2
VALIDATION = "validation"


def corpus_folder(config: DataConfig, vocab_size: int) -> Path:
    """Where tokenizer.json and the sources lie: data.root, or for the sample corpus a folder per tokenizer in it."""
    if config.corpus == "shards":
        return Path(config.root)
    return Path(config.root) / (f"bpe-{vocab_size}" if config.tokenizer == "bpe" else "deepseek")


def micro_batches_per_step(rows_per_step: int, micro_batch_rows: int, world: int) -> int:
    """Forward passes of every rank in a step, fillers included."""
    rows = math.ceil(rows_per_step / world)
    return math.ceil(rows / micro_batch_rows)


class Reader:
    """All sources of a run, opened and checked. Can be pickled to loader processes."""

    def __init__(self, config: DataConfig, seed: int, vocab_size: int, *, verify: bool | None = None,
                 report: Callable[[str], None] = print) -> None:
        """vocab_size: of the model. verify: compare every shard's sha256 now; None: where the corpus is small.

        DataError: corpus or source missing, made with another tokenizer, damaged, too small, empty domain, ids
        beyond the vocabulary. A missing source of the *sample* corpus is reported and its weight shared out.
        """
        self.config, self.seed = config, seed
        self.folder = corpus_folder(config, vocab_size)
        if not self.folder.is_dir():
            raise DataError(f"data.root = {config.root!r}: there is no folder {self.folder}; write shards into it with "
                            "`dlcm tokenize`, or correct data.root")
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.vocab_size > vocab_size:
            raise DataError(f"{self.folder / 'tokenizer.json'}: {tokenizer.vocab_size} ids, but model.vocab_size = "
                            f"{vocab_size}; raise it to at least {tokenizer.vocab_size}")
        self.bos_id = tokenizer.bos_id
        self.token_bytes = tokenizer.token_bytes()
        self.sources = self._present(report)
        self._train = [Source(self.folder / source.name / "train", tokenizer) for source in self.sources]
        self._validation = [Source(self.folder / source.name / VALIDATION, tokenizer) for source in self.sources]
        everything = [*self._train, *self._validation]
        size = sum(shard.size for source in everything for shard in source.manifest.shards)
        if verify or (verify is None and size < VERIFY_BELOW_BYTES):
            for source in everything:
                source.verify()
        self._check_sizes()
        self.domain_of_source = [config.domains.index(source.domain) for source in self.sources]
        self.mixture = Mixture(
            seed, [source.name for source in self.sources],
            [source.rows(config.row_tokens) for source in self._train],
            [source.weight for source in self.sources], config.block_rows)
        self._cache: OrderedDict[tuple[int, ...], list[Row]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    @property
    def fingerprint(self) -> str:
        """sha256 of everything the order of samples and their content depend on. Save it with a checkpoint and
        compare on resuming: another value means that sample i is not what it was."""
        parts: list[int | str] = [self.seed, self.config.row_tokens, self.config.block_rows]
        for source, stream, share in zip(self.sources, self._train, self.mixture.shares, strict=True):
            parts += [source.name, source.domain, int(share), *(shard.sha256 for shard in stream.manifest.shards)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def domains(self) -> list[str]:
        """Domains as numbered in `Batch.domains`."""
        return self.config.domains

    def training_stream(self, domain: str) -> list[Source]:
        """The training splits of a domain's sources."""
        return [stream for source, stream in zip(self.sources, self._train, strict=True) if source.domain == domain]

    def validation_stream(self, domain: str) -> list[tuple[Source, int]]:
        """The validation splits of a domain's sources, each with the number of rows that are validated on."""
        return [(stream, self._validation_rows(stream))
                for source, stream in zip(self.sources, self._validation, strict=True) if source.domain == domain]

    def training_rows(self, samples: list[int]) -> list[Row]:
        """The rows of global samples; -1 stands for a filler."""
        wanted = np.array(samples, dtype=np.int64)
        real = wanted[wanted >= 0]
        drawn = self.mixture.draw(real)
        cut = iter([
            cut_row(self._train[source], row, self.config.row_tokens, domain=self.domain_of_source[source],
                    sample=sample, seed=self.seed)
            for sample, source, row in zip(real.tolist(), drawn.sources.tolist(), drawn.rows.tolist(), strict=True)])
        return [next(cut) if sample >= 0 else self.filler() for sample in samples]

    def filler(self) -> Row:
        return filler_row(self.config.row_tokens, self.bos_id)

    def step_samples(self, step: int, rank: int, world: int) -> list[int]:
        """Samples of one rank in a step, completed with -1 to micro_batches_per_step full micro-batches."""
        rows = self.config.rows_per_step
        return [step * rows + place if place >= 0 else -1 for place in self.places(rows, rank, world)]

    def places(self, rows: int, rank: int, world: int) -> list[int]:
        """The part of `rows` consecutive rows that a rank reads, completed with -1."""
        mine = list(range(rank * rows // world, (rank + 1) * rows // world))
        size = self.config.micro_batch_rows
        return mine + [-1] * (micro_batches_per_step(rows, size, world) * size - len(mine))

    def step_batch(self, step: int, number: int, rank: int = 0, world: int = 1) -> Batch:
        """Micro-batch `number` of one rank in a step."""
        samples = self.step_samples(step, rank, world)
        rows = self._cached_rows(tuple(samples))
        size = self.config.micro_batch_rows
        return pack(rows[number * size:(number + 1) * size], self.token_bytes, rows)

    @cached_property
    def validation_rows(self) -> list[tuple[int, int]]:
        """(source, row) of every validation row: consecutive rows, source after source, in the sources' order."""
        return [(number, row) for number, stream in enumerate(self._validation)
                for row in range(self._validation_rows(stream))]

    def cut_validation_row(self, sample: int) -> Row:
        """Validation row `sample`, an index into validation_rows; -1 gives a filler."""
        if sample < 0:
            return self.filler()
        source, row = self.validation_rows[sample]
        return cut_row(self._validation[source], row, self.config.row_tokens, sample=sample,
                       domain=self.domain_of_source[source], seed=key(self.seed, VALIDATION))

    def fixed_documents(self, domain: str, count: int = 2, characters: int = 600) -> list[str]:
        """The first validation documents of a domain, spread over its sources, cut at `characters`."""
        streams = [stream for stream, rows in self.validation_stream(domain) if rows]
        tokenizer = Tokenizer.load(self.folder)
        texts = []
        for place in range(count):
            found = streams[place % len(streams)].documents(place // len(streams) + 1)
            if place // len(streams) < len(found):
                texts.append(tokenizer.decode(found[-1])[:characters])
        return texts

    def _validation_rows(self, stream: Source) -> int:
        return min(stream.rows(self.config.row_tokens), self.config.validation_rows)

    def _cached_rows(self, samples: tuple[int, ...]) -> list[Row]:
        """Rows of a whole step: every micro-batch of it needs the step's count of targets."""
        if samples not in self._cache:
            self._cache[samples] = self.training_rows(list(samples))
            while len(self._cache) > CACHED_STEPS:
                self._cache.popitem(last=False)
        return self._cache[samples]

    def _present(self, report: Callable[[str], None]) -> list[SourceConfig]:
        """The configured sources with a weight; those that a sample corpus lacks are left out and reported."""
        wanted = [source for source in self.config.sources if source.weight > 0]
        if self.config.corpus == "shards":
            return wanted
        present = [source for source in wanted if (self.folder / source.name / "train" / MANIFEST).is_file()]
        missing = [source.name for source in wanted if source not in present]
        if not present:
            raise DataError(f"{self.folder}: holds none of {', '.join(missing)}; remove the folder and run again "
                            "with a network, or correct data.sources")
        if missing:
            report(f"data: the sample corpus lacks {', '.join(missing)}; their weight goes to the other sources "
                   f"in proportion. Remove {self.folder} and run again to fetch them.")
        return present

    def _check_sizes(self) -> None:
        length = self.config.row_tokens
        for source, stream in zip(self.sources, self._train, strict=True):
            if not stream.rows(length):
                raise DataError(f"source {source.name!r} (domain {source.domain!r}): {stream.tokens} training tokens "
                                f"in {stream.folder} fill no row of {length} + 1; lower data.row_tokens, add "
                                "documents, or leave the source out")
        for domain in dict.fromkeys(source.domain for source in self.sources):
            if not sum(rows for _, rows in self.validation_stream(domain)):
                tokens = sum(stream.tokens for stream, _ in self.validation_stream(domain))
                raise DataError(f"domain {domain!r}: {tokens} validation tokens fill no row of {length} + 1; lower "
                                "data.row_tokens or add documents to its validation split")


class TrainingBatches(torch.utils.data.Dataset[Batch]):
    """The micro-batches [first, last) of one rank, counted from the start of the run."""

    def __init__(self, reader: Reader, rank: int, world: int, first: int, last: int) -> None:
        self.reader, self.rank, self.world, self.first, self.last = reader, rank, world, first, last
        self.per_step = micro_batches_per_step(reader.config.rows_per_step, reader.config.micro_batch_rows, world)

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        step, number = divmod(self.first + index, self.per_step)
        return self.reader.step_batch(step, number, self.rank, self.world)


class ValidationBatches(torch.utils.data.Dataset[Batch]):
    """One rank's part of the validation rows; every rank has the same number of batches.

    `Batch.samples` index `Reader.validation_rows`; the step's counts are those of the batch itself.
    """

    def __init__(self, reader: Reader, rank: int = 0, world: int = 1) -> None:
        self.reader = reader
        self.samples = reader.places(len(reader.validation_rows), rank, world)

    def __len__(self) -> int:
        return len(self.samples) // self.reader.config.micro_batch_rows

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        size = self.reader.config.micro_batch_rows
        samples = self.samples[index * size:(index + 1) * size]
        rows = [self.reader.cut_validation_row(sample) for sample in samples]
        return pack(rows, self.reader.token_bytes, rows)
