"""Knobs of training: the optimizer and its schedule; where and how a run executes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dlcm_lightning.config.checks import (
    LARGEST_COUNT,
    local_path,
    require,
    require_member,
    require_positive,
    require_range,
)

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
Recompute = Literal["none", "selective", "full"]


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
    lr_token: float = 1.8e-3
    """Base rate of encoder and decoder matrices and of bridges that read token width (3e-4 at D = 1536)."""
    lr_concept: float = 1.8e-3
    """Base rate of backbone matrices and of bridges that read concept width."""
    lr_other: float = 3e-4
    """Rate of embedding, unembedding and norms."""
    lr_boundary: float = 1.8e-3
    """Base rate of the boundary's W_q, W_k. The knob of the segmentation: AdamW divides lambda out."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require_member("optim.schedule", self.schedule, Literal["wsd", "cosine"])
        require_range("optim.total_tokens", self.total_tokens, 1, LARGEST_COUNT)
        require(0 <= self.warmup_tokens <= self.total_tokens, "optim.warmup_tokens", self.warmup_tokens,
                f"must lie between 0 and optim.total_tokens = {self.total_tokens}")
        for name in ("decay_fraction", "final_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optim.{name}", getattr(self, name), "a share lies in [0, 1]")
        if self.schedule == "wsd":
            decay = self.decay_fraction * self.total_tokens
            require(self.warmup_tokens + decay <= self.total_tokens, "optim.decay_fraction", self.decay_fraction,
                    f"warm-up ({self.warmup_tokens} tokens) and decay ({decay:.0f}) are longer than "
                    f"optim.total_tokens = {self.total_tokens}")
        for name in ("lr_token", "lr_concept", "lr_other", "lr_boundary", "epsilon"):
            require_positive(f"optim.{name}", getattr(self, name), 10**3)
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("weight_decay", "max_grad_norm"):
            require_range(f"optim.{name}", getattr(self, name), 0, 10**6)

    @property
    def stable_tokens(self) -> int:
        """wsd: where the rate begins to decay; the end where it does not."""
        return self.total_tokens - round(self.decay_fraction * self.total_tokens)


@dataclass(frozen=True)
class ClassConfig:
    """An object of a class of the user's: what it is called, and what it is made with."""

    class_path: str = ""
    """Module and class, such as lightning.pytorch.callbacks.EarlyStopping."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Arguments by name: plain values."""

    def __post_init__(self) -> None:
        module, _, name = self.class_path.rpartition(".")
        require(all(part.isidentifier() for part in (*module.split("."), name)), "class_path", self.class_path,
                "name a class with its module, such as lightning.pytorch.callbacks.EarlyStopping")


@dataclass(frozen=True)
class TrainConfig:
    """Where and how the run executes: precision, devices, what is written how often."""

    output_dir: str = "runs"
    """Folder that holds one directory per run, named by `name`. A leading ~ and variables ($HOME) are replaced."""
    init_from: str = ""
    """Folder that `dlcm upcycle` or `dlcm export` wrote: the run begins with its weights and the boundary's buffers in
    place of drawn ones. Empty: they are drawn. Read at the first start only; a run that continues has its own."""
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Arithmetic of the matrix products; parameters and their gradients stay fp32. auto: bf16 where the device
    multiplies it fast (GPUs since Ampere, CPUs with avx512_bf16 or amx_bf16), else fp32. fp64 is for proofs."""
    devices: int = 0
    """Processes per node, one per GPU. 0: as many as were started there, by srun or torchrun; alone, one."""
    nodes: int = 0
    """0: as many as processes were started on; alone, one."""
    strategy: Strategy = "ddp"
    """How the model is spread over them. ddp: whole on every one. fsdp2: parameters, gradients and moments cut into
    rows. zero1, zero2, zero3: DeepSpeed; moments, gradients too, parameters too in pieces. All compute the same."""
    shard_ranks: int = 0
    """fsdp2: over how many ranks the model is cut, such as the GPUs of a node; repeated on the others. 0: all."""
    offload: bool = False
    """zero3: parameters, gradients and moments live in the host's memory."""
    recompute: Recompute = "none"
    """Activation checkpointing, per block of every stack. full: a block keeps its input alone and runs again in the
    backward. selective: it keeps its attention and runs its feed-forward, which keeps most, again."""
    compile: bool = False
    """What stands between the matrix products (norms, rotary angles, SwiGLU, the head's softmax) goes through
    torch.compile: by count a third of the memory traffic of a step (docs/benchmarks.md). Compiles at every start, and
    rounds otherwise, so a run keeps what it has begun with."""
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
    callbacks: list[ClassConfig] = field(default_factory=list)
    """Callbacks of Lightning's, or one's own, beside those of the run."""
    loggers: list[ClassConfig] = field(default_factory=list)
    """Loggers beside metrics.jsonl and TensorBoard."""

    def __post_init__(self) -> None:
        require_member("train.precision", self.precision, Literal["auto", "bf16", "fp32", "fp64"])
        object.__setattr__(self, "output_dir", local_path("train.output_dir", self.output_dir))
        if self.init_from:
            object.__setattr__(self, "init_from", local_path("train.init_from", self.init_from))
        for name in ("log_every_steps", "validate_every_steps", "checkpoint_every_steps"):
            require_range(f"train.{name}", getattr(self, name), 1, LARGEST_COUNT)
        for name in ("devices", "nodes"):
            require_range(f"train.{name}", getattr(self, name), 0, 2**17)
        require_member("train.strategy", self.strategy, Strategy)
        require_member("train.recompute", self.recompute, Recompute)
        require_range("train.shard_ranks", self.shard_ranks, 0, 2**17)
        require(not self.shard_ranks or self.strategy == "fsdp2", "train.shard_ranks", self.shard_ranks,
                f"goes with train.strategy = 'fsdp2', not {self.strategy!r}")
        require(not self.offload or self.strategy == "zero3", "train.offload", self.offload,
                f"goes with train.strategy = 'zero3', not {self.strategy!r}")
        require(self.precision != "fp64" or not self.strategy.startswith("zero"), "train.precision", self.precision,
                f"train.strategy = {self.strategy!r} keeps fp32; use ddp or fsdp2")
        require_range("train.keep_every_tokens", self.keep_every_tokens, 0, LARGEST_COUNT)
        require_range("train.keep_last", self.keep_last, 0, 10**9)
        require(self.keep_last >= 2, "train.keep_last", self.keep_last,
                "keep at least 2, so that a damaged newest checkpoint has one before it")

    @property
    def ranks(self) -> int:
        """Processes of the whole run; until `cluster.world` has asked who started them, those that are named."""
        return max(1, self.devices) * max(1, self.nodes)
