"""Where one concept ends: boundary probabilities and decisions (sections 3.2-3.3, Eq. 5-6).

    q_t = W_q f_t,  k_t = W_k f_t,  p_t = (1 - cos(q_{t-1}, k_t)) / 2,  p = 1 at the first token of every document

Training draws b_t from the sharpened p_t with noise that is part of the batch; inference takes b_t = [p_t >= theta].

Taken to the letter (f = h, form `paper`) the segmentation is loosely held: neighbouring hidden states share a
direction, p crowds together, and the rate loss moves all tokens at once, so that F swings most from step to step
(docs/boundaries.md). Two additions steady it, each an option beside the literal form, both on in form `both`:

*Centred features.* f_t = h_t - mean_t, where mean_t is the causal running mean of the document, begun with a prior of
`centre_prior_tokens` tokens. The prior's value is a buffer, a running average over the optimizer steps before this
one; so nothing of the current batch's future enters, and the first tokens of a document are centred too. No gradient
flows through the mean.

*Rate bias.* p' = sigmoid(logit p + delta) replaces p everywhere. After each optimizer step delta moves by
bias_step * log((1/R) / F), F the rate of the whole global batch. It keeps the rate on target where the loss alone
cannot: at cos = +-1 p has no gradient, and centred features alone miss R = 8 by a third.

*Calibrated threshold.* The rate loss steers the drawn boundaries. Where p crowds below one half, b_t = [p_t >= 1/2]
(`threshold: half`, the paper's) finds far fewer, and the model that is deployed has longer concepts than the one that
was trained. So theta is a buffer: after each optimizer step its log-odds move by threshold_step * log(R S), S the share
of p of the global batch that lie above theta; the logarithm counts up to 1, and the step is at most half a standard
deviation of the log-odds of p, or theta would jump from one side of a narrow p to the other. Training draws, and does
not depend on it.

Only the rate loss trains W_q and W_k: decisions are discrete, and no straight-through path is laid. AdamW divides
lambda out of the only gradient they see, so that their learning rate is the knob, not lambda.

All arithmetic here is fp32 or wider, autocast off, in training and inference alike: bf16 flips decisions.
Axes: T tokens, N documents, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm_lightning.config import BoundaryConfig, Threshold
from dlcm_lightning.model.cache import BoundaryState
from dlcm_lightning.model.mup import MupLinear, Role
from dlcm_lightning.ops.incremental import Extension
from dlcm_lightning.ops.scan import linear_scan
from dlcm_lightning.ops.segments import Segments

Boundaries = Literal["thresholded", "calibrated", "half", "sampled"]
"""How a model that is used cuts its texts: by the threshold of its configuration, by one that is named, or drawn as in
training."""
COSINE_EPSILON = 1e-8
"""Least norm of a feature, so that a zero vector has a cosine of 0."""
LOG_ODDS_LIMIT = 20.0
"""Bound of the rate bias and of the threshold; their exponentials stay far from overflow."""
PRIOR_MOMENTUM = 0.9
"""What the prior mean keeps of itself at each optimizer step."""


@dataclass(frozen=True)
class Segmentation:
    """What a boundary module says of T tokens."""

    probabilities: Tensor
    """(T,) at least fp32: p, after the rate bias where there is one; 1 at the start of a document."""
    boundaries: Tensor
    """(T,) bool: b, true at the start of a document."""
    threshold: Tensor
    """() the calibrated threshold; one half where nothing is learned."""
    features: Tensor | None
    """(T, D) the hidden states that the prior mean is made of, detached; None where none is kept."""


def document_starts(documents: Segments, tokens: int) -> Tensor:
    """(T,) bool: whether a token is the first of its document."""
    first = torch.zeros(tokens, dtype=torch.bool, device=documents.cu_seqlens.device)
    return first.index_fill_(0, documents.cu_seqlens[:-1].long(), True)  # `first[...] = True` waits for the device


def previous(x: Tensor) -> Tensor:
    """x (T, D) -> (T, D): the row before each; the first row, which has none, repeats itself."""
    return torch.cat([x[:1], x[:-1]])


def handed_on(x: Tensor, new: Extension, state: Tensor) -> Tensor:
    """`previous` of new positions (N, D): the row before each, for the first of a sequence the one that state (S, D)
    holds. The state is given the last ones."""
    before = previous(x)
    before[new.firsts] = state[new.slot_index]
    state[new.slot_index] = x[new.lasts]
    return before


def sharpen(p: Tensor, tau: float) -> Tensor:
    """p^(1/tau) from one half up, 1 - (1 - p)^(1/tau) below: decisions near p = 0 and 1 become nearly sure."""
    return torch.where(p >= 0.5, p ** (1 / tau), 1 - (1 - p) ** (1 / tau))


def draw(p: Tensor, noise: Tensor, tau: float) -> Tensor:
    """(T,) bool: sampled boundaries. noise (T,) in [0, 1)."""
    return noise < sharpen(p.detach(), tau)


class Boundary(nn.Module, ABC):
    """Cuts documents into concepts."""

    @abstractmethod
    def forward(self, hidden: Tensor, documents: Segments, noise: Tensor | None) -> Segmentation:
        """hidden (T, D), documents over T, noise (T,) or None for thresholded decisions."""

    @abstractmethod
    def extend(self, hidden: Tensor, new: Extension, noise: Tensor | None, state: BoundaryState) -> Segmentation:
        """The same of new tokens (N, D), whose predecessors the state knows."""

    def decide_by(self, threshold: Threshold) -> None:  # most forms compare nothing
        """What p is compared with where boundaries are not drawn, in place of what the configuration says."""

    def after_step(self, rate: Tensor, above: Tensor, spread: Tensor, feature_mean: Tensor) -> None:
        """Called once after each optimizer step, with numbers of its global batch: F (), the share of tokens whose p is
        not below the threshold (), the standard deviation of p where no document begins (), and the mean hidden state
        (D,). Most forms keep no state."""


class LearnedBoundary(Boundary):
    """Eq. 5-6 with the two additions as options."""

    rate_bias: Tensor
    threshold: Tensor
    """() log-odds."""
    prior_mean: Tensor

    def __init__(self, width: int, config: BoundaryConfig) -> None:
        super().__init__()
        self.config = config
        self.compared_with = config.threshold
        self.query = MupLinear(Role.BOUNDARY, width, width)
        self.key = MupLinear(Role.BOUNDARY, width, width)
        self.register_buffer("rate_bias", torch.zeros(()), persistent=config.biased)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("prior_mean", torch.zeros(width), persistent=config.centred)

    def forward(self, hidden: Tensor, documents: Segments, noise: Tensor | None) -> Segmentation:
        with torch.autocast(hidden.device.type, enabled=False):
            features = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            first = document_starts(documents, hidden.shape[0])
            states = features.detach() if self.config.centred else None
            if states is not None:
                sums = self.running_sums(states, first)
                features = features - self.running_mean(sums, documents.positions(hidden.shape[0]))
            query = self.query(features)
            return self.segmentation(previous(query), self.key(features), first, noise, states)

    def extend(self, hidden: Tensor, new: Extension, noise: Tensor | None, state: BoundaryState) -> Segmentation:
        with torch.autocast(hidden.device.type, enabled=False):
            features = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            if self.config.centred:
                sums = features if new.single else self.running_sums(
                    features, document_starts(new.segments, hidden.shape[0]))
                sums = sums + state.sums[new.slot_index[new.owner]]
                state.sums[new.slot_index] = sums[new.lasts]
                features = features - self.running_mean(sums, new.positions)
            query = handed_on(self.query(features), new, state.previous)
            return self.segmentation(query, self.key(features), new.positions == 0, noise, None)

    def segmentation(self, previous_query: Tensor, key: Tensor, first: Tensor, noise: Tensor | None,
                     states: Tensor | None) -> Segmentation:
        """Eq. 6. previous_query and key (T, D), first (T,) bool: whether a token begins its document."""
        query, key = (F.normalize(one, dim=-1, eps=COSINE_EPSILON) for one in (previous_query, key))
        p = ((1 - (query * key).sum(-1)) / 2).clamp(0, 1)
        if self.config.biased:
            odds = self.rate_bias.to(p.dtype).exp()
            p = p * odds / (1 - p + p * odds)
        p = torch.where(first, 1.0, p)
        calibrated = self.threshold.to(p.dtype).sigmoid()
        if noise is not None:
            boundaries = draw(p, noise, self.config.sharpening)
        else:
            boundaries = p.detach() >= (calibrated if self.compared_with == "calibrated" else 0.5)
        return Segmentation(p, boundaries | first, calibrated, states)

    def decide_by(self, threshold: Threshold) -> None:
        self.compared_with = threshold

    @property
    def threshold_p(self) -> float:
        """What p is compared with. Waits for the device."""
        return self.threshold.sigmoid().item() if self.compared_with == "calibrated" else 0.5

    @staticmethod
    def running_sums(features: Tensor, first: Tensor) -> Tensor:
        """(T, D): of each document's tokens up to and including each. first (T,) bool: where documents begin."""
        return linear_scan((~first).to(features.dtype), features)  # a coefficient of exactly 0 where one begins

    def running_mean(self, sums: Tensor, positions: Tensor) -> Tensor:
        """sums (T, D) and positions (T,) of tokens in their documents -> (T, D) means, the prior being the first
        tokens."""
        weight = self.config.centre_prior_tokens
        counts = positions.to(sums.dtype) + 1
        return (sums + weight * self.prior_mean.to(sums.dtype)) / (counts + weight)[:, None]

    @torch.no_grad()
    def after_step(self, rate: Tensor, above: Tensor, spread: Tensor, feature_mean: Tensor) -> None:
        target = 1 / self.config.target_ratio
        theta = self.threshold.sigmoid().double()
        step = (0.5 * spread / (theta * (1 - theta))).clamp(max=self.config.threshold_step)
        self.threshold += (step * (above / target).log().clamp(-1, 1)).to(self.threshold.dtype)
        self.threshold.clamp_(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)
        if self.config.biased:
            self.rate_bias += self.config.bias_step * (target / rate).log().to(self.rate_bias.dtype)
            self.rate_bias.clamp_(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT)
        if self.config.centred:
            self.prior_mean.lerp_(feature_mean.to(self.prior_mean.dtype), 1 - PRIOR_MOMENTUM)


def certain(boundaries: Tensor, dtype: torch.dtype) -> Segmentation:
    """Of decisions (T,) that nothing is drawn for: p is 0 or 1."""
    return Segmentation(boundaries.to(dtype), boundaries, torch.full((), 0.5, device=boundaries.device), None)


class RuleBoundary(Boundary):
    """A boundary where neighbouring states disagree, cos(h_{t-1}, h_t) < threshold; no parameters, no gradient.

    The printed formula compares with h_{t+1}, which the decoder must not know yet: this is its causal form.
    """

    def __init__(self, config: BoundaryConfig) -> None:
        super().__init__()
        self.threshold = config.rule_threshold

    def forward(self, hidden: Tensor, documents: Segments, noise: Tensor | None) -> Segmentation:
        with torch.autocast(hidden.device.type, enabled=False):
            features = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
            return self.segmentation(previous(features), features, document_starts(documents, hidden.shape[0]))

    def extend(self, hidden: Tensor, new: Extension, noise: Tensor | None, state: BoundaryState) -> Segmentation:
        with torch.autocast(hidden.device.type, enabled=False):
            features = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return self.segmentation(handed_on(features, new, state.previous), features, new.positions == 0)

    def segmentation(self, before: Tensor, features: Tensor, first: Tensor) -> Segmentation:
        """before (T, D): the state in front of each of the features (T, D)."""
        cosine = F.cosine_similarity(before, features, dim=-1, eps=COSINE_EPSILON)
        boundaries = (cosine < self.threshold) | first
        return certain(boundaries, features.dtype)


class FixedBoundary(Boundary):
    """Every R-th token of a document, from its first."""

    def __init__(self, config: BoundaryConfig) -> None:
        super().__init__()
        self.ratio = int(config.target_ratio)

    def forward(self, hidden: Tensor, documents: Segments, noise: Tensor | None) -> Segmentation:
        return self.segmentation(hidden, documents.positions(hidden.shape[0]))

    def extend(self, hidden: Tensor, new: Extension, noise: Tensor | None, state: BoundaryState) -> Segmentation:
        return self.segmentation(hidden, new.positions)

    def segmentation(self, hidden: Tensor, positions: Tensor) -> Segmentation:
        """positions (T,) of the tokens in their documents."""
        boundaries = positions % self.ratio == 0
        return certain(boundaries, torch.promote_types(hidden.dtype, torch.float32))


def build_boundary(width: int, config: BoundaryConfig) -> Boundary:
    """The boundary module that `config.form` names."""
    if config.form == "rule":
        return RuleBoundary(config)
    if config.form == "fixed":
        return FixedBoundary(config)
    return LearnedBoundary(width, config)
