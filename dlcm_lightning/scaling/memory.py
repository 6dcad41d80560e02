"""Memory of a rank, counted from shapes: what the optimizer keeps, what a strategy gathers, what a backward needs.

The backward needs what the forward saves. A block of width W, with H heads and K key-value heads of width d and a
feed-forward of I, computing in bf16, saves for each of its positions, in bytes:

    two norms         2 (4 W + 4)     their input in fp32 (2 W where they are compiled), and the root mean square
    what they give    2 (2 W)         read by the products after them
    attention         2 (2 H + 2 K) d   turned queries and keys, values, the result
    feed-forward      2 (3 I)         gate and up, their product

and once, whatever the positions, the matrices in bf16. With `selective` the feed-forward and its norm save
their input only, with `full` a block its input only; one block at a time is then saved in full while it runs backward.
The numbers are those of the fused attention kernels (flash, varlen), which keep no map of queries by keys; a test
counts what autograd really holds. What an allocator wastes, and what libraries take for themselves, is not counted.

Concepts are not as many as hoped at the beginning: before the boundary has learnt its rate, R is near 2, and nothing
keeps every token from being one. So memory is counted at the target and at M = T.
"""

from __future__ import annotations

from dataclasses import dataclass

from dlcm_lightning.config import Config, ModelConfig, Strategy, TrainConfig
from dlcm_lightning.flops import matrix_parameters, norm_parameters

BF16, FP32 = 2, 4
STATE_BYTES = 12
"""Of a parameter in a checkpoint: weight and two moments in fp32."""
HEAD_CHUNK = 2**28
"""Logits that a GPU holds at a time: ops/cross_entropy.py."""
LOGITS_BYTES = 10
"""Of one of them at the worst moment: twice in fp32, once in bf16. Compiled, only that."""
BUCKET_BYTES = FP32 * 2**27
"""Of a bucket of DeepSpeed: training/strategies/zero.py. Two are in use."""


def parameters(model: ModelConfig) -> int:
    """All of them."""
    return matrix_parameters(model).total + norm_parameters(model)


def checkpoint_bytes(config: Config) -> int:
    """Of one checkpoint, but for kilobytes."""
    return STATE_BYTES * parameters(config.model)


def kept_bytes(config: Config) -> int:
    """Of all checkpoints that there are at once at most: the last ones, the one being written, those kept for good."""
    train = config.train
    for_good = config.optim.total_tokens // train.keep_every_tokens if train.keep_every_tokens else 0
    return checkpoint_bytes(config) * (train.keep_last + 1 + for_good)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward saves for its backward."""

    per_token: float
    per_concept: float
    copies: float
    """Of the weights in bf16, one for each use that the backward needs."""
    head: float
    """Gradient of the head's matrix, which its forward computes."""

    def total(self, tokens: int, concepts: float) -> float:
        return self.per_token * tokens + self.per_concept * concepts + self.copies + self.head


@dataclass(frozen=True)
class _Shape:
    width: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int

    @property
    def attention_parameters(self) -> int:
        """Of the matrices of a block."""
        return 2 * self.width * (self.heads + self.kv_heads) * self.head_dim

    @property
    def parameters(self) -> int:
        return self.attention_parameters + 3 * self.width * self.ffn

    def kept_parameters(self, recompute: str) -> int:
        """Those whose copies in bf16 wait for the backward."""
        return {"none": self.parameters, "selective": self.attention_parameters, "full": 0}[recompute]


def _shapes(model: ModelConfig) -> tuple[_Shape, _Shape]:
    return (_Shape(model.d_token, model.heads_token, model.kv_heads_token, model.ffn_token, model.head_dim),
            _Shape(model.d_concept, model.heads_concept, model.kv_heads_concept, model.ffn_concept, model.head_dim))


def _norm(width: int, kept: int) -> float:
    return kept * width + FP32


def _attention(shape: _Shape) -> float:
    """Turned queries and keys, values, the result, and a logarithm a head."""
    numbers = (shape.heads + 2 * shape.kv_heads) + shape.heads
    return BF16 * numbers * shape.head_dim + FP32 * shape.heads


def _feed_forward(shape: _Shape, kept: int) -> float:
    return _norm(shape.width, kept) + BF16 * shape.width + BF16 * 3 * shape.ffn


def _block(shape: _Shape, kept: int, recompute: str) -> float:
    """Bytes per position."""
    if recompute == "full":
        return BF16 * shape.width
    first = _norm(shape.width, kept) + BF16 * shape.width + _attention(shape)
    return first + (BF16 * shape.width if recompute == "selective" else _feed_forward(shape, kept))


def saved(model: ModelConfig, recompute: str = "none", kept: int = FP32) -> Saved:
    """kept: bytes that a norm keeps of each number: FP32 on a GPU, BF16 where it is compiled, and twice FP32 on a CPU,
    where torch computes a norm in steps."""
    token, concept = _shapes(model)
    d, e = model.d_token, model.d_concept
    angles = FP32 * model.head_dim  # of a stack: a sine and a cosine of every pair of a head
    per_token = model.decoder_layers * _block(token, kept, recompute) + angles
    per_token += _norm(d, kept) + BF16 * d  # closing norm, gradient of the head's input
    head = FP32 * model.vocab_size * d
    copies = BF16 * model.decoder_layers * token.kept_parameters(recompute)
    if model.kind == "dense":
        return Saved(per_token, 0.0, copies, head)

    weights = matrix_parameters(model)
    heads, kv_width = model.heads_token * model.head_dim, model.kv_heads_token * model.head_dim
    per_token += model.encoder_layers * _block(token, kept, recompute) + angles
    if model.boundary.learned:
        per_token += FP32 * d * (6 if model.boundary.centred else 5) + 5 * FP32
    per_token += _norm(d, kept) + BF16 * d  # cross-attention: norm of tokens,
    per_token += kept * heads + FP32 * model.heads_token + BF16 * heads  # of queries by head, what it gives,
    per_token += BF16 * (heads + 2 * kv_width) + FP32 * model.heads_token  # the result, replicated keys and values
    per_concept = model.backbone_layers * _block(concept, kept, recompute) + angles + _norm(e, kept)
    per_concept += BF16 * d + FP32 * e + _norm(e, kept) + BF16 * e  # pooled, smoothed, normed
    per_concept += kept * kv_width + FP32 * model.kv_heads_token  # norm of keys by head
    copies += BF16 * model.encoder_layers * token.kept_parameters(recompute)
    copies += BF16 * model.backbone_layers * concept.kept_parameters(recompute)
    copies += BF16 * (weights.up_projection + weights.cross_attention)
    return Saved(per_token, per_concept, copies, head)


def _run_again(model: ModelConfig, recompute: str, tokens: int, concepts: float) -> float:
    """Bytes of the block that is run again in the backward, the largest of them."""
    if recompute == "none":
        return 0.0
    token, concept = _shapes(model)
    return max(_block(token, FP32, "none") * tokens, _block(concept, FP32, "none") * concepts)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at its fullest moment."""

    state: float
    """Weights, gradients, moments, and copies that the engine keeps."""
    gathered: float
    """Parameters and gradients that are whole for a moment; buckets."""
    activations: float
    head: float
    """A chunk of logits."""

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations + self.head


def state_bytes(strategy: Strategy, ranks: int, micro_batches: int) -> float:
    """Of a parameter on each rank. Under DDP the sums of a step's first micro-batches lie beside the buckets, until the
    last one puts all into these."""
    several = 4 if micro_batches > 1 else 0
    return {"ddp": 16.0 + (several if ranks > 1 else 0),
            "fsdp2": 16 / ranks + several,
            "zero1": 8 + 12 / ranks, "zero2": 4 + 16 / ranks, "zero3": 20 / ranks}[strategy]


def _gathered(model: ModelConfig, strategy: Strategy) -> float:
    """Under fsdp2 the few matrices outside of blocks, embedding and head are there for the whole forward, and beside
    them the head (or the embedding, which is as large) or two blocks, each with its gradient: 8 bytes a parameter in
    fp32, and as many where a block is gathered in bf16, whose gradient is then there in bf16 and, to be reduced, in
    fp32. zero3 gathers by block what it needs, within its own bound: what is outside of blocks, and two of them."""
    if strategy in ("zero1", "zero2"):
        return 2 * BUCKET_BYTES
    if strategy == "ddp":
        return 0.0
    weights = matrix_parameters(model)
    blocks = max(shape.parameters for shape in _shapes(model))
    outside = weights.total - weights.body
    if strategy == "zero3":
        return 2 * FP32 * (outside + 2 * blocks) + 2 * BUCKET_BYTES
    return 2 * FP32 * (outside - weights.embedding - weights.unembedding + max(weights.unembedding, 2 * blocks))


def rank_memory(config: Config, train: TrainConfig, rows: int, concepts_per_token: float, micro_batches: int
                ) -> RankMemory:
    """rows: of a micro-batch. concepts_per_token: 1/R, or 1 for the most there can be. train: without offloading."""
    model = config.model
    tokens = rows * config.data.sequence_length
    concepts = tokens * concepts_per_token if model.kind == "dlcm" else 0.0
    held = saved(model, train.recompute, BF16 if train.compile else FP32)
    activations = held.total(tokens, concepts)
    if train.strategy in ("ddp", "zero1", "zero2") and (micro_batches > 1 or train.recompute != "none"):
        # Weights stay where they are and are cast once a step: all copies are there all the time, and serve every use.
        weights = matrix_parameters(model)
        activations += BF16 * (weights.non_embedding - weights.boundary) - held.copies
    return RankMemory(
        state=parameters(model) * state_bytes(train.strategy, train.shard_ranks or train.ranks, micro_batches),
        gathered=_gathered(model, train.strategy),
        activations=activations + _run_again(model, train.recompute, tokens, concepts),
        head=(BF16 if train.compile else LOGITS_BYTES) * min(HEAD_CHUNK, model.vocab_size * max(tokens, 64)))
