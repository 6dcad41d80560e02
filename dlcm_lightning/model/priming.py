"""Runs every compiled kernel of a model once, on zeros of the shapes that the model gives it (`ops/fused.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dlcm_lightning.config import ModelConfig
from dlcm_lightning.model.layers import StackShape
from dlcm_lightning.ops.cross_entropy import chunk_tokens, padded_vocabulary
from dlcm_lightning.ops.flex import FLEX
from dlcm_lightning.ops.fused import Kernels


class Priming:
    """For one dtype, device and set of kernels."""

    def __init__(self, kernels: Kernels, backend: str, dtype: torch.dtype, device: torch.device) -> None:
        """backend: of attention."""
        self.kernels, self.backend, self.dtype, self.device = kernels, backend, dtype, device

    def model(self, config: ModelConfig, stacks: list[tuple[StackShape, int]], tokens: int, scale: float) -> None:
        """stacks: shapes of blocks, and over how many positions they run. scale: of the logits."""
        # The compiler's caches on disk do not ask for which lengths of a dynamic axis a kernel was made.
        lengths = sorted({tokens, *(positions for _, positions in stacks)})
        with torch.compiler.config.patch(cache_key_tag=f"dlcm {lengths}"):  # type: ignore[attr-defined]
            self._model(config, stacks, tokens, scale)

    def _model(self, config: ModelConfig, stacks: list[tuple[StackShape, int]], tokens: int, scale: float) -> None:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for shape, positions in stacks:
                    self.stack(shape, positions)
                if config.kind == "dlcm":
                    concepts = stacks[-1][1]
                    for positions, heads in ((tokens, config.heads_token), (concepts, config.kv_heads_token)):
                        self.norm(config.norm_epsilon, positions, heads, config.head_dim)
                if self.backend == "flex":
                    FLEX.prime(tokens, config.heads_token, config.kv_heads_token, config.head_dim, self.dtype,
                               self.device)
        self.head(tokens, config.vocab_size, scale)

    def stack(self, shape: StackShape, positions: int) -> None:
        """A block's kernels."""
        self.norm(shape.norm_epsilon, positions, shape.width)
        self.run(self.kernels.add_norm, self.zeros(positions, shape.width), self.zeros(positions, shape.width),
                 self.gain(shape.width), shape.norm_epsilon)
        self.run(self.kernels.swiglu, self.zeros(positions, 2 * shape.ffn))
        qkv = self.zeros(positions, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        wide = torch.promote_types(self.dtype, torch.float32)
        angles = [torch.zeros(positions, 1, shape.head_dim // 2, dtype=wide, device=self.device) for _ in range(2)]
        self.run(self.kernels.rotate_split, qkv, *angles, shape.heads, shape.kv_heads)

    def norm(self, epsilon: float, *shape: int) -> None:
        """Of an array of that shape."""
        self.run(self.kernels.rms_norm, self.zeros(*shape), self.gain(shape[-1]), epsilon)

    def gain(self, width: int) -> Tensor:
        """Stored in fp32, or in fp64 where that is computed in."""
        wide = torch.promote_types(self.dtype, torch.float32)
        return nn.Parameter(torch.ones(width, dtype=wide, device=self.device))

    def head(self, tokens: int, vocabulary: int, scale: float) -> None:
        """The softmax of a chunk of logits."""
        rows = min(tokens, chunk_tokens(vocabulary, self.device))
        targets = torch.zeros(rows, dtype=torch.long, device=self.device)
        with torch.no_grad():
            for differentiate in (True, False):
                logits = self.zeros(rows, padded_vocabulary(vocabulary, self.device))
                self.kernels.softmax_gradient(logits[:, :vocabulary], targets, scale, differentiate)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device, requires_grad=torch.is_grad_enabled())

    @staticmethod
    def run(kernel: Any, *arguments: Any) -> None:
        """Forward, and backward where gradients are on."""
        out = kernel(*arguments)
        if torch.is_grad_enabled():
            outputs = out if isinstance(out, tuple) else (out,)
            inputs = [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.zeros_like(one) for one in outputs])
