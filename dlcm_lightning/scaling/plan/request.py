"""What was asked of `dlcm plan`: one budget or one size, and the hardware that would be there.

There are three ways to ask, and what is left open follows:

    FLOPs                      N and tokens by the law, or by tokens per parameter
    GPUs and days              the same, FLOPs = GPUs x seconds x peak x MFU; with N, tokens follow
    N                          tokens are stated, or follow from tokens per parameter

Whatever contradicts that is refused with what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.errors import ConfigError
from dlcm_lightning.scaling.estimate import Hardware

TOKENS_PER_PARAMETER = 20.0
"""Where nothing else is known. A convention, by reference to Hoffmann et al. (2022), who found about as much for dense
models; no DLCM says so."""
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Request:
    """Options of the command by their names. None: not given."""

    flops: float | None = None
    """Training FLOPs of the whole run."""
    gpus: int | None = None
    days: float | None = None
    params: float | None = None
    """N, non-embedding parameters."""
    tokens: float | None = None
    tokens_per_parameter: float | None = None
    ratio: float | None = None
    """R, tokens per concept."""
    backbone_share: float | None = None
    """P, the backbone's share of the stacks."""
    extrapolation: float | None = None
    """Factor outside of what the law has seen that is allowed, in place of the law's own."""
    document_tokens: float | None = None
    """Mean length of documents, weighted by tokens; None for whole rows."""
    gpus_per_node: int = 8
    gpu_bytes: float = 80e9
    peak_flops: float = 989e12
    """Of one GPU, dense bf16 products."""
    mfu: float = 0.4
    mfu_origin: str = "stated, not measured"

    def check(self, with_law: bool) -> None:
        """ConfigError: options that contradict one another, or say too little."""
        self._check_budget()
        self._check_tokens(with_law)
        if self.extrapolation is not None and not with_law:
            raise ConfigError(f"--extrapolation {self.extrapolation:g}: nothing is predicted without a law; add --law "
                              "law.json, which dlcm ladder fit writes")
        gpus = self.gpus
        if gpus is not None and gpus > self.gpus_per_node and gpus % self.gpus_per_node:
            raise ConfigError(f"--gpus {gpus}: not a whole number of nodes of {self.gpus_per_node}; take "
                              f"{gpus - gpus % self.gpus_per_node}, or say --gpus-per-node")

    def _check_budget(self) -> None:
        if self.days is not None and self.gpus is None:
            raise ConfigError(f"--days {self.days:g}: of how many GPUs? add --gpus 128")
        if self.flops is not None and self.days is not None:
            raise ConfigError(f"--flops {self.flops:g} and --days {self.days:g}: two budgets; give one of them (--gpus "
                              "alone says what there is to compute on)")
        if self.flops is not None and self.params is not None:
            raise ConfigError(f"--flops {self.flops:g} and --params {self.params:g}: give one of them; a size within a "
                              "budget is --params with --gpus and --days, or with --tokens")
        if self.flops is None and self.days is None and self.params is None:
            raise ConfigError("dlcm plan: for what budget? give --flops 1e21, or --gpus 128 --days 3, or a size, "
                              "--params 2e9")

    def _check_tokens(self, with_law: bool) -> None:
        given = self.tokens is not None, self.tokens_per_parameter is not None
        said = (f"--tokens {self.tokens:g}" if self.tokens is not None else
                f"--tokens-per-parameter {self.tokens_per_parameter}")
        if all(given):
            raise ConfigError(f"--tokens {self.tokens:g} and --tokens-per-parameter {self.tokens_per_parameter:g}: "
                              "give one of them")
        if self.tokens is not None and self.params is None:
            raise ConfigError(f"{said}: goes with a size; add --params 2e9, or leave it out and tokens follow from the "
                              "budget")
        if any(given) and self.params is not None and self.days is not None:
            raise ConfigError(f"{said}: with --params, --gpus and --days the tokens follow from the budget; leave it "
                              "out, or leave --days out")
        if any(given) and self.params is None and with_law:
            raise ConfigError(f"{said}: the law chooses size and tokens; leave it out, or leave --law out")

    @property
    def budget(self) -> float | None:
        """FLOPs that may be spent, where that is what was asked."""
        if self.days is not None and self.gpus is not None:
            return self.gpus * self.days * SECONDS_A_DAY * self.peak_flops * self.mfu
        return self.flops

    def hardware(self, rows: int) -> Hardware:
        """Of the run. Where no number of GPUs was given: one node, with no more of them than a step has rows."""
        gpus = min(self.gpus_per_node, rows) if self.gpus is None else self.gpus
        per_node = min(gpus, self.gpus_per_node)
        return Hardware(gpus // per_node, per_node, self.gpu_bytes, self.peak_flops, self.mfu, self.mfu_origin)
