"""Knobs of the token stream: which shards, in what shares, cut into rows of what length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dlcm_lightning.config.checks import (
    LARGEST_COUNT,
    local_path,
    path_or_address,
    require,
    require_member,
    require_name,
    require_range,
)

TOKENIZERS = ("bpe", "deepseek")
"""Of the sample corpus, beside those in folders."""
BOUNDS = (
    ("sequence_length", 1, 2**24), ("global_batch_size", 1, 2**24), ("micro_batch_size", 1, 2**20),
          ("block_rows", 1, 2**26),
    ("validation_rows", 1, 2**24), ("shuffle_shards", 1, 2**20), ("cache_megabytes", 1, 2**24), ("workers", 0, 1024),
    ("read_ahead_steps", 0, 4096),
)
"""Fields of DataConfig, the least and the most that make sense of them."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of the mixture: a folder of shards with a manifest."""

    name: str = ""
    """Unique; also the name of its folder below data.root."""
    domain: str = ""
    """What metrics are grouped by: web-en, web-zh, math, code."""
    weight: float = 0.0
    """Share of the training tokens. The weights of all sources sum to one; 0 leaves a source out."""
    max_epochs: float = 0.0
    """Times the source may be read; 0 for no limit. Where it is reached, its weight goes to the others."""

    def __post_init__(self) -> None:
        require_name("data.sources[].name", self.name)
        require_name(f"data.sources[{self.name}].domain", self.domain)
        require(0 <= self.weight <= 1, f"data.sources[{self.name}].weight", self.weight, "a share lies in [0, 1]")
        require_range(f"data.sources[{self.name}].max_epochs", self.max_epochs, 0, 10**6)


@dataclass(frozen=True)
class WeightChange:
    """Other weights from a point of the run on."""

    at_tokens: int = 0
    """Consumed tokens at which they begin to hold, rounded up to the next block of `block_rows` rows."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of every source by its name; they sum to one, and a source that is not named gets none."""

    def __post_init__(self) -> None:
        require_range("data.weight_changes[].at_tokens", self.at_tokens, 1, LARGEST_COUNT)
        total = math.fsum(self.weights.values())
        require(abs(total - 1) < 1e-6 and min(self.weights.values(), default=0) >= 0,
                "data.weight_changes[].weights", dict(self.weights), "give shares that sum to 1")


@dataclass(frozen=True)
class DataConfig:
    """The token stream: which shards, in what shares, cut into rows of what length."""

    corpus: Literal["sample", "shards"] = "shards"
    """sample: fetched and tokenised into data.root on first use. shards: data.root must hold them already."""
    root: str = "data/built/sample"
    """Folder, or address that fsspec knows, with tokenizer.json and one folder of shards per source and split. A
    leading ~ and variables ($HOME) are replaced."""
    tokenizer: str = "deepseek"
    """What the sample corpus is tokenised with. bpe: a byte-level BPE of model.vocab_size trained on the corpus itself.
    deepseek: DeepSeek-V3's 128,815 ids. Otherwise a folder with tokenizer.json, such as an export. Shards made by
    `dlcm tokenize` carry their own tokenizer."""
    sources: list[SourceConfig] = field(default_factory=list)
    sequence_length: int = 8192
    """Tokens a row feeds to the model. The row is the sample; documents are cut at its ends."""
    global_batch_size: int = 512
    """Rows of one optimizer step over all ranks."""
    micro_batch_size: int = 1
    """Rows in one forward pass of one rank."""
    block_rows: int = 4096
    """Rows over which every source gets its exact share; also the range of the shuffle between sources."""
    shuffle_shards: int = 16
    """Shards of a source whose rows are shuffled together. Shards come in random order, in groups of so many; a
    source of fewer is shuffled whole."""
    weight_changes: list[WeightChange] = field(default_factory=list)
    """In ascending order of at_tokens. One that still lies ahead may be added or changed when a run continues."""
    validation_rows: int = 64
    """At most so many rows per source are read for one validation."""
    workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    cache_megabytes: int = 1024
    """Of a remote data.root (s3://...): memory for fetched pieces of shards, per process that reads."""
    read_ahead_steps: int = 4
    """Of a remote data.root: optimizer steps whose rows are fetched in advance."""
    unreadable: Literal["stop", "mask"] = "stop"
    """What a row that cannot be read does. stop: ends the run with an error that names shard and sample. mask: the
    row predicts nothing, is counted and logged, and every other row stays where it is."""
    max_unreadable: float = 0.001
    """mask: the largest share of such rows among those consumed, or in the first block; above it the run ends."""

    def __post_init__(self) -> None:
        require_member("data.corpus", self.corpus, Literal["sample", "shards"])
        object.__setattr__(self, "tokenizer", _tokenizer(self.tokenizer))
        require_member("data.unreadable", self.unreadable, Literal["stop", "mask"])
        object.__setattr__(self, "root", path_or_address("data.root", self.root))
        for name, least, most in BOUNDS:
            require_range(f"data.{name}", getattr(self, name), least, most)
        require(0 <= self.max_unreadable <= 1, "data.max_unreadable", self.max_unreadable, "a share lies in [0, 1]")
        require(self.micro_batch_size <= self.global_batch_size, "data.micro_batch_size", self.micro_batch_size,
                f"must not exceed data.global_batch_size = {self.global_batch_size}")
        require(bool(self.sources), "data.sources", self.sources, "name at least one source")
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "data.sources", names, "give every source its own name")
        total = math.fsum(source.weight for source in self.sources)
        require(abs(total - 1) < 1e-6, "data.sources[].weight", [source.weight for source in self.sources],
                f"the weights sum to {total:g}; make them sum to 1")
        points = [change.at_tokens for change in self.weight_changes]
        require(points == sorted(set(points)), "data.weight_changes[].at_tokens", points,
                "put them in ascending order")
        for change in self.weight_changes:
            unknown = [name for name in change.weights if name not in names]
            require(not unknown, "data.weight_changes[].weights", unknown, f"data.sources has {', '.join(names)}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.global_batch_size * self.sequence_length

    @property
    def domains(self) -> list[str]:
        """Domains in the order of their first source; a batch's domain numbers index this list."""
        return list(dict.fromkeys(source.domain for source in self.sources))


def _tokenizer(value: str) -> str:
    """The value, a path in it expanded. Whether the folder holds one is asked by who reads it."""
    if value in TOKENIZERS:
        return value
    is_path = "/" in value or value.startswith(("~", "$", ".")) or Path(value).is_dir()
    require(is_path, "data.tokenizer", value, f"choose one of {', '.join(TOKENIZERS)}, or name a folder with "
                                              "tokenizer.json; there is none of this name")
    return local_path("data.tokenizer", value)
