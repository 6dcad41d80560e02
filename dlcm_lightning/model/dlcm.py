"""The assembly: four stages from tokens to the hidden states that predict the next token (section 3, Eq. 1-4).

    H = Encoder(x)                          (T, D)
    b, p = Boundary(H);  C = Pool(H, b)     (M, E)
    Z~ = Smooth(Backbone(C))                (M, E)
    y = Decoder(CrossAttend(H, Z~) + H)     (T, D), then the unembedding

The model is plain PyTorch and knows neither batches nor ranks. It returns hidden states and not logits: given targets
it runs the head in chunks (`ops/cross_entropy.py`), and whoever wants logits asks for them. Parameters stay in the
dtype they are stored in; activations run in `compute_dtype`.

The dense LLaMA baseline is the same assembly with one stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm_lightning.config import ConfigError, ModelConfig, Threshold
from dlcm_lightning.model.boundary import Boundaries, Segmentation, build_boundary
from dlcm_lightning.model.cache import FAR, BoundaryState, ConceptMemory, ConceptState, DecodingState, KeyValues
from dlcm_lightning.model.concepts import Pool, close_concepts, extend_smoothing, round_up, smooth
from dlcm_lightning.model.decoder import CrossAttention
from dlcm_lightning.model.layers import Stack, StackShape
from dlcm_lightning.model.mup import MupLinear, Role, RoleModule, branch_scale, initialise, logit_scale
from dlcm_lightning.model.priming import Priming
from dlcm_lightning.ops.cross_entropy import linear_cross_entropy
from dlcm_lightning.ops.fused import UsesKernels, compiled
from dlcm_lightning.ops.incremental import Extension
from dlcm_lightning.ops.linear import LowCopies
from dlcm_lightning.ops.segments import Concepts, Decisions, Segments, concepts_from_boundaries

CPU_CONCEPT_MULTIPLE = 128
"""What M is rounded up to on a CPU, where every new matrix shape costs milliseconds."""


@dataclass(frozen=True)
class Output:
    """What a forward pass gives for T tokens."""

    hidden: Tensor
    """(T, D) in the compute dtype; `LanguageModel.logits` makes logits of it."""
    nll_sum: Tensor
    """() at least fp32: negative log-likelihood in nats, summed over targets; 0 where none were given."""
    nll: Tensor
    """(T,) its terms, without gradient; (0,) where no targets were given."""
    segmentation: Segmentation | None
    """None for the dense model."""
    concepts: Concepts | None
    """None for the dense model."""


@dataclass(frozen=True)
class Extended:
    """What N new tokens give."""

    hidden: Tensor
    """(N, D) in the compute dtype."""
    segmentation: Segmentation | None
    """None for a dense model."""


class Embedding(RoleModule):
    """(T,) ids -> (T, D)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(Role.EMBEDDING, vocab_size, width)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, self.weight).to(dtype)


def token_stack(config: ModelConfig, layers: int, recompute: str) -> StackShape:
    return StackShape(
        layers=layers, width=config.d_token, heads=config.heads_token, kv_heads=config.kv_heads_token,
        head_dim=config.head_dim, ffn=config.ffn_token, norm_epsilon=config.norm_epsilon, rope_base=config.rope_base,
        role=Role.TOKEN, branch_scale=branch_scale(Role.TOKEN, config), recompute=recompute,
    )


def concept_stack(config: ModelConfig, recompute: str) -> StackShape:
    return StackShape(
        layers=config.backbone_layers, width=config.d_concept, heads=config.heads_concept,
        kv_heads=config.kv_heads_concept, head_dim=config.head_dim, ffn=config.ffn_concept,
        norm_epsilon=config.norm_epsilon, rope_base=config.rope_base, role=Role.CONCEPT,
        branch_scale=branch_scale(Role.CONCEPT, config), recompute=recompute,
    )


class Unembedding(UsesKernels, MupLinear):
    """The head. Called, it gives the loss and never holds the (T, V) logits of a whole batch."""

    def __init__(self, width: int, vocab_size: int, scale: float) -> None:
        super().__init__(Role.UNEMBEDDING, width, vocab_size)
        self.scale = scale

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """hidden (T, D), targets (T,) int64, negative where nothing is predicted: see `linear_cross_entropy`."""
        return linear_cross_entropy(hidden, self.weight, targets, self.scale, self.kernels)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, V)."""
        return super().forward(hidden) * self.scale


class LanguageModel(nn.Module, ABC):
    """What DLCM and the dense baseline share: embedding in front, unembedding after, hidden states between."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype, backend: str, recompute: str = "none"
                 ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.embedding = Embedding(config.vocab_size, config.d_token)
        self.decoder = Stack(token_stack(config, config.decoder_layers, recompute), final_norm=True)
        self.unembedding = Unembedding(config.d_token, config.vocab_size, logit_scale(config))

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, D) -> (T, V)."""
        return self.unembedding.logits(hidden)

    def prime(self, tokens: int, device: torch.device) -> None:
        """Compiles the kernels for micro-batches of so many tokens, and of as many concepts as the target says, with
        and without gradients. What they are compiled for is then the same in every life of a run."""
        priming = Priming(self.unembedding.kernels, self.backend, self.compute_dtype, device)
        priming.model(self.config, self.stacks(tokens), tokens, self.unembedding.scale)

    def keep_low_copies(self) -> LowCopies | None:
        """Copies in the compute dtype of all matrices that are multiplied in it, but for the head's, which is cast once
        a micro-batch. None where weights are stored in that dtype. Refresh them when the weights have changed."""
        matrices = [module for module in self.modules() if isinstance(module, MupLinear)
                    and module.role not in (Role.BOUNDARY, Role.UNEMBEDDING)]
        if all(module.weight.dtype == self.compute_dtype for module in matrices):
            return None
        copies = LowCopies([module.weight for module in matrices], self.compute_dtype)
        for number, module in enumerate(matrices):
            module.copies = copies, number
        return copies

    def drop_low_copies(self) -> None:
        """Weights are cast at every use again."""
        for module in self.modules():
            if isinstance(module, MupLinear):
                module.copies = None

    def stacks(self, tokens: int) -> list[tuple[StackShape, int]]:
        """What blocks there are, and how many positions they run over."""
        return [(token_stack(self.config, self.config.decoder_layers, "none"), tokens)]

    def new_state(self, slots: int, tokens: int) -> DecodingState:
        """What `extend` remembers: so many sequences, of so many tokens before arrays have to grow."""
        return DecodingState(slots, [], self._caches(token_stack, self.config.decoder_layers, slots, tokens), [])

    def _caches(self, shape_of: Callable[..., StackShape], layers: int, slots: int, capacity: int) -> list[KeyValues]:
        shape = shape_of(self.config, layers, "none")
        return [KeyValues.empty(slots, shape.kv_heads, capacity, shape.head_dim, self.compute_dtype, self.where)
                for _ in range(layers)]

    def cut_by(self, boundaries: Boundaries) -> None:
        """What p is compared with from now on. ConfigError: no boundary of this model compares it with anything else;
        nothing is drawn in it."""
        if boundaries != "thresholded":
            raise ConfigError(f"--boundaries {boundaries}: a dense model has none; leave it out")

    @property
    def where(self) -> torch.device:
        """The device that the model is on."""
        return self.embedding.weight.device

    @torch.no_grad()
    def extend(self, tokens: Tensor, counts: list[int], slots: list[int], state: DecodingState,
               noise: Tensor | None = None) -> Extended:
        """`forward` of the next tokens of some sequences, with what the state remembers of those before; no gradients.

        tokens (N,) int64: `counts[r]` of them, at least one, go on the sequence in slot `slots[r]`, row after row.
        noise (N,) in [0, 1) samples the boundaries, None thresholds them. However a sequence is cut into calls, and
        whatever is in the other slots, each token's hidden state is that of one `forward` but for rounding.
        """
        if not len(counts) == len(slots) == len(set(slots)) or min(counts) < 1 or sum(counts) != tokens.shape[0]:
            raise ValueError(f"extend: {tokens.shape[0]} tokens, counts {counts}, slots {slots}: give one count of at "
                             "least 1 for each slot, each slot once, and as many tokens as they add up to")
        before = [state.tokens[slot] for slot in slots]
        new = Extension.of(slots, before, counts, tokens.device)
        state.reserve_tokens(new.longest)
        extended = self._extend(self.embedding(tokens, self.compute_dtype), new, state, noise)
        for slot, count in zip(slots, counts, strict=True):
            state.tokens[slot] += count
        return extended

    def prefill(self, tokens: Tensor, counts: list[int], slots: list[int], state: DecodingState,
                noise: Tensor | None = None) -> Extended:
        """`extend` of sequences that begin: one packed forward that fills the state."""
        state.reset(slots)
        return self.extend(tokens, counts, slots, state, noise)

    def step(self, tokens: Tensor, slots: list[int], state: DecodingState, noise: Tensor | None = None) -> Extended:
        """`extend` by one token a sequence: tokens (n,)."""
        return self.extend(tokens, [1] * len(slots), slots, state, noise)

    @abstractmethod
    def _extend(self, h: Tensor, new: Extension, state: DecodingState, noise: Tensor | None) -> Extended:
        """h (N, D): the embeddings of the new tokens."""

    def output(self, hidden: Tensor, targets: Tensor | None, segmentation: Segmentation | None = None,
               concepts: Concepts | None = None) -> Output:
        """The loss is taken here, inside the model's forward: what shards a model gathers weights only there."""
        nothing = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        nll_sum, nll = (nothing.sum(), nothing) if targets is None else self.unembedding(hidden, targets)
        return Output(hidden, nll_sum, nll, segmentation, concepts)


class Dense(LanguageModel):
    """The LLaMA baseline."""

    def forward(self, tokens: Tensor, documents: Segments, noise: Tensor | None = None,
                targets: Tensor | None = None) -> Output:
        """tokens (T,) int64, documents over T; noise is not used; targets (T,) int64 for the loss."""
        hidden = self.decoder(self.embedding(tokens, self.compute_dtype), documents, self.backend)
        return self.output(hidden, targets)

    def _extend(self, h: Tensor, new: Extension, state: DecodingState, noise: Tensor | None) -> Extended:
        return Extended(self.decoder.extend(h, new, state.decoder, self.backend), None)


class DLCM(LanguageModel):
    """The four stages."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype, backend: str, recompute: str = "none"
                 ) -> None:
        super().__init__(config, compute_dtype, backend, recompute)
        self.encoder = Stack(token_stack(config, config.encoder_layers, recompute), final_norm=False)
        self.boundary = build_boundary(config.d_token, config.boundary)
        self.pool = Pool(config.d_token, config.d_concept)
        self.backbone = Stack(concept_stack(config, recompute), final_norm=True)
        self.cross_attention = CrossAttention(
            config.d_token, config.d_concept, config.heads_token, config.kv_heads_token, config.head_dim,
            config.norm_epsilon,
        )

    def cut_by(self, boundaries: Boundaries) -> None:
        form = self.config.boundary.form
        if boundaries != "thresholded" and not self.config.boundary.learned:
            raise ConfigError(f"--boundaries {boundaries}: those of form {form!r} are not learned; leave it out")
        named: dict[Boundaries, Threshold] = {"calibrated": "calibrated", "half": "half"}
        self.boundary.decide_by(named.get(boundaries, self.config.boundary.threshold))

    def stacks(self, tokens: int) -> list[tuple[StackShape, int]]:
        concepts = max(2, round(tokens / self.config.boundary.target_ratio))
        return [*super().stacks(tokens), (concept_stack(self.config, "none"), concepts)]

    def forward(self, tokens: Tensor, documents: Segments, noise: Tensor | None = None,
                targets: Tensor | None = None) -> Output:
        """tokens (T,) int64, documents over T; noise (T,) samples the boundaries, None thresholds them; targets (T,)
        int64 for the loss."""
        h = self.encoder(self.embedding(tokens, self.compute_dtype), documents, self.backend)  # (T, D)
        segmentation = self.boundary(h, documents, noise)
        decisions = Decisions(segmentation.boundaries)
        query = self.cross_attention.queries(h)  # work for the device while the number of concepts travels
        concepts = concepts_from_boundaries(decisions, documents)
        multiple = CPU_CONCEPT_MULTIPLE if h.device.type == "cpu" else 1
        lifted = self.pool(h, concepts, multiple)  # (M rounded up, E)
        z = self.backbone(lifted, round_up(concepts.documents, len(concepts), multiple), self.backend)[: len(concepts)]
        gates = segmentation.probabilities.detach()[concepts.closing]
        z = smooth(z, gates, concepts.documents)  # (M, E)
        h = h + self.cross_attention(query, z, concepts, documents, self.backend)
        return self.output(self.decoder(h, documents, self.backend), targets, segmentation, concepts)

    def new_state(self, slots: int, tokens: int) -> DecodingState:
        config = self.config
        wide = torch.promote_types(self.compute_dtype, torch.float32)
        concepts = round(tokens / config.boundary.target_ratio) + 1

        def rows(width: int) -> Tensor:
            return torch.zeros(slots, width, dtype=wide, device=self.where)

        memory = KeyValues.empty(slots, config.kv_heads_token, concepts, config.head_dim, self.compute_dtype,
                                 self.where)
        closing = torch.full((slots, concepts), FAR, device=self.where)
        return DecodingState(
            slots, self._caches(token_stack, config.encoder_layers, slots, tokens),
            self._caches(token_stack, config.decoder_layers, slots, tokens),
            [KeyValues.empty(slots, config.kv_heads_concept, concepts, config.head_dim, self.compute_dtype, self.where)
             for _ in range(config.backbone_layers)],
            ConceptMemory(memory.keys, memory.values, closing),
            BoundaryState(rows(config.d_token), rows(config.d_token)),
            ConceptState(rows(config.d_token), rows(config.d_concept)))

    def _extend(self, h: Tensor, new: Extension, state: DecodingState, noise: Tensor | None) -> Extended:
        h = self.encoder.extend(h, new, state.encoder, self.backend)
        segmentation = self.boundary.extend(h, new, noise, state.boundary)
        query = self.cross_attention.queries(h)
        closed = close_concepts(segmentation.boundaries, new, state)
        pooled = self.pool.extend(h, closed, new, state.concept)
        z: Tensor | None = None
        if closed.any:  # only rows that close a concept go through the backbone
            state.reserve_concepts(closed.longest)
            z = self.backbone.extend(pooled, closed.concepts, state.backbone, self.backend)
            z = extend_smoothing(z, segmentation.probabilities[closed.closing], closed.concepts, state.concept.smoothed)
        h = h + self.cross_attention.extend(query, z, closed, new, state.memory, self.backend)
        return Extended(self.decoder.extend(h, new, state.decoder, self.backend), segmentation)


def assemble(config: ModelConfig, compute_dtype: torch.dtype, backend: str, recompute: str = "none",
             compile_kernels: bool = False) -> LanguageModel:
    """The model that `config.kind` names, its parameters not filled: fp32 (fp64 for fp64). recompute: what blocks run
    again in the backward, see `StackShape`. compile_kernels: by torch.compile, see `ops/fused.py`."""
    kinds: dict[str, type[LanguageModel]] = {"dlcm": DLCM, "dense": Dense}
    model = kinds[config.kind](config, compute_dtype, backend, recompute)
    for module in model.modules() if compile_kernels else ():
        if isinstance(module, UsesKernels):
            module.kernels = compiled()
    return model.double() if compute_dtype == torch.float64 else model


def build_model(config: ModelConfig, compute_dtype: torch.dtype, backend: str, seed: int) -> LanguageModel:
    """The same, initialised by the muP table."""
    model = assemble(config, compute_dtype, backend)
    initialise(model, config, seed)
    return model
