"""Micro-batches that were not read from anywhere, for measurements that need no text."""

from __future__ import annotations

import math

import torch

from dlcm_lightning.batch import Batch, StepCounts
from dlcm_lightning.config import Config
from dlcm_lightning.ops.segments import Segments

MIXES = ("sample", "skewed")
"""Beside whole numbers. sample: lengths like those of the sample corpus, 26 documents in a row of 8,192 tokens.
skewed: one document of three quarters of a row, the rest in pieces of a hundred tokens."""


def document_lengths(mix: str, tokens: int, generator: torch.Generator) -> list[int]:
    """Of one row. mix: a number of tokens, or one of MIXES."""
    if mix == "skewed":
        wanted = [tokens * 3 // 4, *[100] * tokens]
    elif mix == "sample":
        drawn = torch.empty(tokens).log_normal_(math.log(120), 1.4, generator=generator)
        wanted = drawn.clamp(2, tokens).int().tolist()
    else:
        wanted = [int(mix)] * tokens
    lengths: list[int] = []
    for length in wanted:
        lengths.append(min(length, tokens - sum(lengths)))
        if sum(lengths) == tokens:
            break
    return lengths


def synthetic_batch(config: Config, mix: str, seed: int) -> Batch:
    """Of `data.micro_batch_size` rows of random tokens, on the host."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = config.data.micro_batch_size, config.data.sequence_length
    dtype = torch.uint16 if config.model.vocab_size <= 2**16 else torch.uint32
    stream = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=generator).to(dtype)
    lengths = [one for _ in range(rows) for one in document_lengths(mix, length, generator)]
    documents = Segments.from_lengths(lengths)
    domains = torch.arange(rows) % max(1, len(config.data.domains))
    counts = StepCounts(targets=config.micro_batches * (rows * length - len(lengths)),
                        tokens=config.micro_batches * rows * length, documents=config.micro_batches * len(lengths))
    return Batch(stream, documents.cu_seqlens[1:].long() - 1, documents,
                 torch.randint(0, 2**62, (rows,), generator=generator), domains, torch.arange(rows) + seed * rows,
                 step=counts, following=counts)
