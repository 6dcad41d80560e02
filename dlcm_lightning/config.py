"""Every knob of a run: typed, frozen, documented; standard library only.

A run is one `Config`. It is composed from YAML by `compose.py`, checked here, saved with the run, and read by
everything else. A field's unit and meaning stand under it; what can be derived is a property, never a second
field. Checks run on construction and raise `ConfigError`, which names the field, the value found and the remedy,
so that a mistake is answered on a login node in milliseconds and not after torch has loaded.

Section and equation numbers are those of *Dynamic Large Concept Models* (arXiv 2512.24617v2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

BoundaryForm = Literal["paper", "centred", "biased", "both", "rule", "fixed"]
AttentionBackend = Literal["auto", "flash", "varlen", "sdpa", "reference"]
Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
Recompute = Literal["none", "selective", "full"]


class ConfigError(ValueError):
    """A configuration that cannot run. The message names the field, the value and the remedy."""


def _require(condition: bool, field_name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{field_name} = {value!r}: {remedy}")


def _require_member(field_name: str, value: object, literal: object) -> None:
    allowed = get_args(literal)
    _require(value in allowed, field_name, value, f"choose one of {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class BoundaryConfig:
    """How a document is cut into concepts (sections 3.2-3.3) and how the cut is steered towards its target."""

    form: BoundaryForm = "both"
    """paper: Eq. 5-6 to the letter. centred: W_q, W_k read features minus their causal running mean.
    biased: the paper's p shifted by a controlled log-odds bias. both: centred and biased.
    rule: cosine of neighbouring states against `rule_threshold`, no parameters. fixed: every R-th token."""
    target_ratio: float = 4.0
    """R, tokens per concept the rate loss and the bias aim at (Eq. 10)."""
    rate_weight: float = 0.03
    """lambda of Eq. 15. The paper prints none; H-Net and ConceptMoE use 0.03."""
    rate_scope: Literal["global", "document"] = "global"
    """global: F and G are means over the whole global batch ("Global Parser"). document: the same formula per
    document, then averaged over documents ("Normal", the ablation of Table 4)."""
    previous_rate: bool = False
    """Take F of the previous optimizer step in the rate loss even where one micro-batch a step would allow the
    current one. Always so with several micro-batches a step: only then is the gradient independent of the split."""
    sharpening: float = 6.0
    """tau: training samples from p^(1/tau) above one half, mirrored below (ConceptMoE Eq. 5)."""
    centre_prior_tokens: float = 8.0
    """Weight, in tokens, of the prior in the causal running mean of a document (forms centred and both)."""
    bias_step: float = 0.2
    """Gain of the rate bias: delta += bias_step * log((1/R) / F) after every optimizer step (biased and both)."""
    rule_threshold: float = 0.5
    """Form `rule`: a token is a boundary where cos(h_{t-1}, h_t) falls below this value."""

    def __post_init__(self) -> None:
        _require_member("model.boundary.form", self.form, BoundaryForm)
        _require(self.target_ratio > 1, "model.boundary.target_ratio", self.target_ratio,
                 "tokens per concept must be above 1 (the rate loss divides by R - 1)")
        _require(self.rate_weight >= 0, "model.boundary.rate_weight", self.rate_weight, "use 0 or more")
        _require(self.sharpening >= 1, "model.boundary.sharpening", self.sharpening, "use 1 (none) or more")
        _require(self.centre_prior_tokens > 0, "model.boundary.centre_prior_tokens", self.centre_prior_tokens,
                 "use a positive number of tokens, 8 for example")
        _require(self.bias_step > 0, "model.boundary.bias_step", self.bias_step, "use a positive gain, 0.2 say")
        _require(-1 <= self.rule_threshold <= 1, "model.boundary.rule_threshold", self.rule_threshold,
                 "a cosine lies between -1 and 1")
        if self.form == "fixed":
            _require(self.target_ratio == int(self.target_ratio), "model.boundary.target_ratio", self.target_ratio,
                     "form `fixed` needs a whole number of tokens")

    @property
    def learned(self) -> bool:
        """Whether the segmentation has parameters of its own."""
        return self.form in ("paper", "centred", "biased", "both")

    @property
    def centred(self) -> bool:
        return self.form in ("centred", "both")

    @property
    def biased(self) -> bool:
        return self.form in ("biased", "both")


@dataclass(frozen=True)
class MupConfig:
    """Decoupled muP (section 6.1): widths at which the base rates and the base variance hold."""

    d_base: int = 256
    """Width at which s = 1 for the token and the concept stacks alike."""
    sigma: float = 1 / 16
    """Standard deviation of hidden matrices at the base width (variance 1/256)."""
    sigma_embedding: float = 0.02
    """Standard deviation of embedding and unembedding, at every width."""

    def __post_init__(self) -> None:
        _require(self.d_base > 0, "model.mup.d_base", self.d_base, "use a positive width")
        _require(self.sigma > 0, "model.mup.sigma", self.sigma, "use a positive standard deviation")
        _require(self.sigma_embedding > 0, "model.mup.sigma_embedding", self.sigma_embedding, "use a positive value")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of a four-stage DLCM, or of the dense LLaMA baseline built from the same blocks (Table 3)."""

    kind: Literal["dlcm", "dense"] = "dlcm"
    """dense uses `decoder_layers` and the token widths only."""
    vocab_size: int = 128_815
    """V, rows of the embedding and of the unembedding."""
    d_token: int = 1536
    """D, width of encoder and decoder."""
    d_concept: int = 3072
    """E, width of the backbone."""
    encoder_layers: int = 10
    backbone_layers: int = 16
    decoder_layers: int = 6
    heads_token: int = 24
    """H of encoder, decoder and cross-attention."""
    kv_heads_token: int = 12
    """K of encoder, decoder and cross-attention."""
    heads_concept: int = 48
    kv_heads_concept: int = 24
    head_dim: int = 64
    """Width of one head, everywhere."""
    ffn_token: int = 6144
    """I of encoder and decoder."""
    ffn_concept: int = 6144
    """I of the backbone."""
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    attention: AttentionBackend = "auto"
    """auto picks what the machine has: flash, then varlen, on a GPU; sdpa on a CPU."""
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    mup: MupConfig = field(default_factory=MupConfig)

    def __post_init__(self) -> None:
        _require_member("model.kind", self.kind, Literal["dlcm", "dense"])
        _require_member("model.attention", self.attention, AttentionBackend)
        for name in ("vocab_size", "d_token", "d_concept", "heads_token", "kv_heads_token", "heads_concept",
                     "kv_heads_concept", "ffn_token", "ffn_concept", "decoder_layers"):
            _require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        for name in ("encoder_layers", "backbone_layers"):
            least = 0 if self.kind == "dense" else 1
            _require(getattr(self, name) >= least, f"model.{name}", getattr(self, name), f"must be at least {least}")
        _require(self.head_dim > 0 and self.head_dim % 2 == 0, "model.head_dim", self.head_dim,
                 "rotary embeddings need an even head width")
        for stack in ("token", "concept"):
            heads, kv_heads = getattr(self, f"heads_{stack}"), getattr(self, f"kv_heads_{stack}")
            _require(heads % kv_heads == 0, f"model.kv_heads_{stack}", kv_heads,
                     f"must divide model.heads_{stack} = {heads}")
        _require(self.norm_epsilon > 0, "model.norm_epsilon", self.norm_epsilon, "use a positive value")

    @property
    def s_token(self) -> float:
        """Width multiplier of the token stacks, D / d_base."""
        return self.d_token / self.mup.d_base

    @property
    def s_concept(self) -> float:
        """Width multiplier of the backbone, E / d_base."""
        return self.d_concept / self.mup.d_base


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
        _require(bool(self.name) and "/" not in self.name, "data.sources[].name", self.name,
                 "give every source a name without slashes")
        _require(bool(self.domain), "data.sources[].domain", self.domain, f"name the domain of source {self.name!r}")
        _require(0 <= self.weight <= 1, f"data.sources[{self.name}].weight", self.weight, "a share lies in [0, 1]")
        _require(self.max_epochs >= 0, f"data.sources[{self.name}].max_epochs", self.max_epochs, "use 0 or more")


@dataclass(frozen=True)
class WeightChange:
    """Other weights from a point of the run on."""

    at_tokens: int = 0
    """Consumed tokens at which they begin to hold, rounded up to the next block of `block_rows` rows."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of every source by its name; they sum to one, and a source that is not named gets none."""

    def __post_init__(self) -> None:
        _require(self.at_tokens > 0, "data.weight_changes[].at_tokens", self.at_tokens, "must be positive")
        total = math.fsum(self.weights.values())
        _require(abs(total - 1) < 1e-6 and min(self.weights.values(), default=0) >= 0,
                 "data.weight_changes[].weights", dict(self.weights), "give shares that sum to 1")


@dataclass(frozen=True)
class DataConfig:
    """The token stream: which shards, in what shares, cut into rows of what length."""

    corpus: Literal["sample", "shards"] = "shards"
    """sample: fetched and tokenised into data.root on first use. shards: data.root must hold them already."""
    root: str = "data/built/sample"
    """Folder with tokenizer.json and one folder of shards per source and split."""
    tokenizer: Literal["bpe", "deepseek"] = "deepseek"
    """What the sample corpus is tokenised with: a byte-level BPE of model.vocab_size trained on the corpus itself,
    or DeepSeek-V3's 128,815 ids. Shards made by `dlcm tokenize` carry their own tokenizer."""
    sources: list[SourceConfig] = field(default_factory=list)
    row_tokens: int = 8192
    """Tokens a row feeds to the model. The row is the sample; documents are cut at its ends."""
    rows_per_step: int = 512
    """Rows of one optimizer step over all ranks."""
    micro_batch_rows: int = 1
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
        _require_member("data.corpus", self.corpus, Literal["sample", "shards"])
        _require_member("data.tokenizer", self.tokenizer, Literal["bpe", "deepseek"])
        _require_member("data.unreadable", self.unreadable, Literal["stop", "mask"])
        for name in ("row_tokens", "rows_per_step", "micro_batch_rows", "block_rows", "validation_rows",
                     "shuffle_shards", "cache_megabytes"):
            _require(getattr(self, name) > 0, f"data.{name}", getattr(self, name), "must be positive")
        for name in ("workers", "read_ahead_steps"):
            _require(getattr(self, name) >= 0, f"data.{name}", getattr(self, name), "use 0 or more")
        _require(0 <= self.max_unreadable <= 1, "data.max_unreadable", self.max_unreadable, "a share lies in [0, 1]")
        _require(self.micro_batch_rows <= self.rows_per_step, "data.micro_batch_rows", self.micro_batch_rows,
                 f"must not exceed data.rows_per_step = {self.rows_per_step}")
        _require(bool(self.sources), "data.sources", self.sources, "name at least one source")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), "data.sources", names, "give every source its own name")
        total = math.fsum(source.weight for source in self.sources)
        _require(abs(total - 1) < 1e-6, "data.sources[].weight", [source.weight for source in self.sources],
                 f"the weights sum to {total:g}; make them sum to 1")
        points = [change.at_tokens for change in self.weight_changes]
        _require(points == sorted(set(points)), "data.weight_changes[].at_tokens", points,
                 "put them in ascending order")
        for change in self.weight_changes:
            unknown = [name for name in change.weights if name not in names]
            _require(not unknown, "data.weight_changes[].weights", unknown, f"data.sources has {', '.join(names)}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.rows_per_step * self.row_tokens

    @property
    def domains(self) -> list[str]:
        """Domains in the order of their first source; a batch's domain numbers index this list."""
        return list(dict.fromkeys(source.domain for source in self.sources))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. Rates are base rates at width d_base; muP turns them into each group's own."""

    total_tokens: int = 1_000_000_000_000
    """Length of the run. The last step may pass it by less than one step."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """wsd: warm-up, stable, linear decay. cosine: warm-up, then half a cosine."""
    warmup_tokens: int = 8_388_608_000
    """Tokens of linear warm-up from zero."""
    decay_fraction: float = 0.2
    """wsd: the share of total_tokens over which the rate falls linearly at the end."""
    final_fraction: float = 0.1
    """Where the schedule ends, as a share of the peak."""
    eta_token: float = 1.8e-3
    """Base rate of encoder and decoder matrices and of bridges that read token width (3e-4 at D = 1536)."""
    eta_concept: float = 1.8e-3
    """Base rate of backbone matrices and of bridges that read concept width."""
    eta_other: float = 3e-4
    """Rate of embedding, unembedding and norms."""
    eta_boundary: float = 1.8e-3
    """Base rate of the boundary's W_q, W_k. The knob of the segmentation: AdamW divides lambda out."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require_member("optim.schedule", self.schedule, Literal["wsd", "cosine"])
        _require(self.total_tokens > 0, "optim.total_tokens", self.total_tokens, "must be positive")
        _require(0 <= self.warmup_tokens <= self.total_tokens, "optim.warmup_tokens", self.warmup_tokens,
                 f"must lie between 0 and optim.total_tokens = {self.total_tokens}")
        for name in ("decay_fraction", "final_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "a share lies in [0, 1]")
        if self.schedule == "wsd":
            decay = self.decay_fraction * self.total_tokens
            _require(self.warmup_tokens + decay <= self.total_tokens, "optim.decay_fraction", self.decay_fraction,
                     f"warm-up ({self.warmup_tokens} tokens) and decay ({decay:.0f}) are longer than "
                     f"optim.total_tokens = {self.total_tokens}")
        for name in ("eta_token", "eta_concept", "eta_other", "eta_boundary", "epsilon"):
            _require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "must be positive")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "use 0 or more")


@dataclass(frozen=True)
class TrainConfig:
    """Where and how the run executes: precision, devices, what is written how often."""

    runs: str = "runs"
    """Folder that holds one directory per run, named by `name`."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Arithmetic of the matrix products; parameters and their gradients stay fp32. auto: bf16 where the device
    multiplies it fast (GPUs since Ampere, CPUs with avx512_bf16 or amx_bf16), else fp32. fp64 is for proofs."""
    devices: int = 1
    """Processes per node, one per GPU."""
    nodes: int = 1
    strategy: Strategy = "ddp"
    """How the model is spread over them. ddp: whole on every one. fsdp2: parameters, gradients and moments cut into
    rows. zero1, zero2, zero3: DeepSpeed; moments, gradients too, parameters too in pieces. All compute the same."""
    offload: bool = False
    """zero3: parameters, gradients and moments live in the host's memory."""
    recompute: Recompute = "none"
    """Activation checkpointing, per block of every stack. full: a block keeps its input alone and runs again in the
    backward. selective: it keeps its attention and runs its feed-forward, which keeps most, again."""
    log_every_steps: int = 10
    """Optimizer steps between two lines of metrics."""
    validate_every_steps: int = 1000
    """Optimizer steps between validations; the run's end always validates."""
    checkpoint_every_steps: int = 1000
    """Optimizer steps between checkpoints; the run's end always writes one."""
    keep_last: int = 2
    """Newest complete checkpoints that are kept. At least two: the newest may turn out damaged."""
    keep_every_tokens: int = 0
    """Beside them, for good, the first checkpoint in every so many consumed tokens; 0 keeps none."""

    def __post_init__(self) -> None:
        _require_member("train.precision", self.precision, Literal["auto", "bf16", "fp32", "fp64"])
        for name in ("devices", "nodes", "log_every_steps", "validate_every_steps", "checkpoint_every_steps"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be positive")
        _require_member("train.strategy", self.strategy, Strategy)
        _require_member("train.recompute", self.recompute, Recompute)
        _require(not self.offload or self.strategy == "zero3", "train.offload", self.offload,
                 f"goes with train.strategy = 'zero3', not {self.strategy!r}")
        _require(self.precision != "fp64" or not self.strategy.startswith("zero"), "train.precision", self.precision,
                 f"train.strategy = {self.strategy!r} keeps fp32; use ddp or fsdp2")
        _require(self.keep_every_tokens >= 0, "train.keep_every_tokens", self.keep_every_tokens, "use 0 or more")
        _require(self.keep_last >= 2, "train.keep_last", self.keep_last,
                 "keep at least 2, so that a damaged newest checkpoint has one before it")

    @property
    def ranks(self) -> int:
        """Processes of the whole run."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Config:
    """One run."""

    name: str = ""
    """Name of the run; its directory is <train.runs>/<name>."""
    seed: int = 0
    """Seeds initialisation, sample order and boundary noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", self.name, "give the run a name without slashes")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "use a non-negative 63-bit number")
        if self.data.corpus == "sample" and self.data.tokenizer == "deepseek":
            _require(self.model.vocab_size >= 128_815, "model.vocab_size", self.model.vocab_size,
                     "data.tokenizer = 'deepseek' has 128815 ids; raise it or choose data.tokenizer = 'bpe'")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.optim.total_tokens // self.data.tokens_per_step)

    @property
    def uses_previous_rate(self) -> bool:
        """Whether the rate loss takes F of the step before: asked for, or because a step has several micro-batches."""
        return self.model.boundary.previous_rate or self.micro_batches > 1

    @property
    def micro_batches(self) -> int:
        """Forward passes of every rank in one optimizer step; filler rows complete the last where rows are short."""
        rows = -(-self.data.rows_per_step // self.train.ranks)
        return -(-rows // self.data.micro_batch_rows)
