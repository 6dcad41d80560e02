"""From logits to a token: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

The filters, and their order, are those of Hugging Face's `generate`. Each sequence draws from numbers of its own, a
function of (seed, prompt, sample, position): its text does not depend on what else is in the batch.

Axes: n sequences, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dlcm_lightning.errors import ConfigError

MOST_TOKENS = 2**24


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when a text ends."""

    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 takes all."""
    top_p: float = 0.95
    """Only the likeliest tokens whose probabilities add up to this."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Scores of tokens that the text holds already, prompt included, are divided by it (multiplied where negative)."""
    seed: int = 0
    max_tokens: int = 128
    """New tokens of a text at most."""
    stop: Sequence[str] = ()
    """A text ends before any of these."""
    boundaries: Literal["thresholded", "sampled"] = "thresholded"
    """Where concepts end: as at inference, or drawn as in training."""

    def __post_init__(self) -> None:
        _between("temperature", self.temperature, 0, 1000)
        _whole("top_k", self.top_k, 0, 2**31)
        _between("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ConfigError("top_p = 0: nothing would be left; write a share above 0, or temperature 0 for the "
                              "likeliest token")
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 0.001, 1000)
        _whole("seed", self.seed, 0, 2**63 - 1)
        _whole("max_tokens", self.max_tokens, 1, MOST_TOKENS)
        if self.boundaries not in ("thresholded", "sampled"):
            raise ConfigError(f"boundaries = {self.boundaries!r}: choose thresholded or sampled")
        if isinstance(self.stop, str):
            raise ConfigError(f"stop = {self.stop!r}: give several strings, as ({self.stop!r},)")
        for one in self.stop:
            if not isinstance(one, str) or not one:
                raise ConfigError(f"stop = {one!r}: every text begins with it; give a string that is not empty")
            utf8(one, "stop")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def utf8(text: str, name: str) -> bytes:
    """ConfigError: it cannot be written in UTF-8, as what a shell passes on of other bytes."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} = {text!r}: not a text in UTF-8; no model writes it") from None


def _between(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not least <= value <= most:
        raise ConfigError(f"{name} = {value!r}: write a number from {least:g} to {most:g}")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} = {value!r}: write a whole number from {least:,} to {most:,}")


def key_of(seed: int, ids: Sequence[int], sample: int, purpose: str) -> int:
    """What a sequence's own numbers are keyed by, an int64. purpose: what they decide."""
    content = f"{purpose} {seed} {sample} {' '.join(map(str, ids))}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def choose(logits: Tensor, sampling: Sampling, drawn: Tensor, seen: Tensor | None) -> Tensor:
    """(n,) int64: the next tokens. logits (n, V), drawn (n,) in [0, 1), seen (n, V) bool: the tokens of each text."""
    scores = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if sampling.greedy:
        return scores.argmax(-1)
    scores = filtered((scores - scores.amax(-1, keepdim=True)) / sampling.temperature, sampling)
    # On the host, in fp64: an edge hardly moves with the batch, and a GPU adds up floats in an order of its own.
    weights = scores.cpu().double().softmax(-1).cumsum(-1)
    chosen = torch.searchsorted(weights, drawn.cpu().double()[:, None] * weights[:, -1:], right=True).squeeze(-1)
    return chosen.minimum(weights.argmax(-1)).to(scores.device)


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """(n, V), -inf where a filter leaves a token out; the likeliest token always stays."""
    out = float("-inf")
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], out)
    if sampling.top_p < 1:
        ordered, order = scores.sort(descending=True, stable=True)
        shares = ordered.softmax(-1).cpu()
        beyond = shares.cumsum(-1) - shares >= sampling.top_p  # what lies in front is enough
        scores = scores.masked_fill(beyond.to(scores.device).gather(1, order.argsort(-1)), out)
    if sampling.min_p > 0:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), out)
    return scores
