"""A causal language model of transformers around the model: padded batches in, packed rows inside.

transformers pads a batch to a rectangle; this model lays documents end to end. `forward` packs the tokens that the
attention mask marks, runs the model, and lays the result out again; so padding, left or right, costs nothing and enters
nothing. With a cache, the new tokens go through `LanguageModel.extend`, and the backbone runs once a closed concept.

transformers renamed `past_key_values` to `cache` in 5.24; both are understood, and outputs have the name that the
installed version knows. Boundaries are thresholded, in training mode too.

Axes: B rows of a batch, L columns of it, N tokens that are marked, D token width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from dlcm_lightning.export.huggingface.configuration_dlcm import DLCMConfig
from dlcm_lightning.model.boundary import LearnedBoundary
from dlcm_lightning.model.cache import DecodingState
from dlcm_lightning.model.dlcm import assemble
from dlcm_lightning.model.layers import Block
from dlcm_lightning.model.mup import RoleModule, initial_value
from dlcm_lightning.ops.attention import choose_backend
from dlcm_lightning.ops.segments import Segments

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
IGNORED = -100
"""A label where nothing is predicted."""


class ConceptCache(Cache):
    """What the model remembers of the rows of a batch. Made by `DLCMForCausalLM.forward`; it only goes forward."""

    def __init__(self, state: DecodingState) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = 0
        """Columns of the padded batch that the model has read."""

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.columns

    def get_max_cache_shape(self, *_: Any, **__: Any) -> int:
        return -1

    get_max_length = get_max_cache_shape

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def max_batch_size(self) -> int:
        return self.state.slots

    def __len__(self) -> int:
        return len(self.state.decoder)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row r goes on from where row beam_idx[r] is."""
        self.state.copy(beam_idx.tolist(), range(len(beam_idx)))

    def reset(self) -> None:
        self.columns = 0
        self.state.reset(range(self.state.slots))

    def crop(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a closed concept cannot be opened again: compute the cache anew")

    def _fixed(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("the rows of this cache are those that it was made for; compute it anew")

    update = batch_repeat_interleave = batch_select_indices = _fixed


def casting_by_itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast the model casts where it has to, as in training: autocast is off inside."""

    @functools.wraps(forward)  # transformers reads the names of its arguments
    def run(self: DLCMForCausalLM, *given: Any, **named: Any) -> Any:
        with torch.autocast(self._settle().type, enabled=False):
            return forward(self, *given, **named)

    return run


class DLCMForCausalLM(PreTrainedModel, GenerationMixin):
    """AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) makes one."""

    config_class = DLCMConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["DLCM", "Dense"]  # noqa: RUF012 - transformers declares it so
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "boundary", "norm", "attention_norm", "ffn_norm", "token_norm", "concept_norm", "query_head_norm",
        "key_head_norm"]

    def __init__(self, config: DLCMConfig) -> None:
        super().__init__(config)
        config.check_untied()
        self.model = assemble(config.model_config(), torch.float32, "sdpa")
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """By the muP table, where nothing was loaded."""
        with torch.no_grad():
            if isinstance(module, RoleModule) and not getattr(module.weight, "_is_hf_initialized", False):
                module.weight.copy_(initial_value(module, self.config.model_config()))
            if isinstance(module, LearnedBoundary):
                for name in module._non_persistent_buffers_set:  # what no file holds
                    getattr(module, name).zero_()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.model.unembedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise NotImplementedError("the embedding of this model cannot be replaced")

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        raise NotImplementedError("the vocabulary of this model cannot be resized; it is the tokenizer's")

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(isinstance(module, Block) and module.recompute != "none" for module in self.modules())

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Every block runs again in the backward."""
        self._recompute("full")

    def gradient_checkpointing_disable(self) -> None:
        self._recompute("none")

    def _recompute(self, what: str) -> None:
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = what

    def _settle(self) -> torch.device:
        """Computes in the dtype that the matrices are in, or that autocast asks for, on the device that they are on."""
        weight = self.model.embedding.weight
        kind = weight.device.type
        self.model.compute_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.model.backend = choose_backend("auto", weight.device, self.model.compute_dtype)
        return weight.device

    @casting_by_itself
    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: ConceptCache | None = None,
                cache: ConceptCache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, return_dict: bool | None = None,
                num_items_in_batch: Tensor | int | None = None, **_: Any) -> Any:
        """input_ids (B, L); attention_mask (B, L), or (B, columns of the cache + L), 0 where there is padding.
        position_ids (B, L): positions count the marked tokens of a row by themselves; where these begin at 0 again, a
        row is cut into documents that do not see each other. labels (B, L): the loss is the mean over labels, or their
        sum divided by num_items_in_batch; label t is predicted at t - 1. Returns logits (B, L or logits_to_keep, V), 0
        at padding. A cache is made where use_cache asks for one, or by default where no gradient is taken."""
        cache = past_key_values if cache is None else cache
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: this model takes no inputs_embeds")
        if cache is not None and not isinstance(cache, ConceptCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: this model goes on from the cache that it "
                             "returned itself; leave it out at the first call")
        rows, columns = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -columns:].to(input_ids.device).bool()
        where = real.flatten().nonzero().squeeze(1)  # (N,)
        counts = real.sum(1).tolist()
        marked = [row for row, count in enumerate(counts) if count]
        lengths = [counts[row] for row in marked]
        if not marked:
            raise ValueError("attention_mask marks no token")
        tokens = input_ids.flatten()[where]
        lengths = self._documents(position_ids, real, lengths, cache)
        if len(lengths) > len(marked):
            use_cache = False  # several documents a row
        if use_cache is None:
            use_cache = cache is not None or (
                labels is None and not torch.is_grad_enabled() and getattr(self.config, "use_cache", True))
        if use_cache and self.training and torch.is_grad_enabled():
            raise ValueError("use_cache = True in training: no gradient goes through a cache; leave it out")
        loss = None
        if use_cache and labels is None:
            cache = cache or ConceptCache(self.model.new_state(rows, max(lengths)))
            if rows > cache.state.slots:
                raise ValueError(f"input_ids has {rows} rows, the cache {cache.state.slots}")
            hidden = self.model.extend(tokens, lengths, marked, cache.state).hidden
            cache.columns += columns
        else:
            if cache is not None:
                raise ValueError("a loss is taken of whole texts: give no cache with labels" if labels is not None else
                                 "use_cache = False with a cache: choose one")
            targets = None if labels is None else self._targets(labels, real, lengths)
            output = self.model(tokens, Segments.from_lengths(lengths, tokens.device), None, targets)
            hidden = output.hidden
            if targets is not None:
                loss = output.nll_sum / ((targets >= 0).sum() if num_items_in_batch is None else num_items_in_batch)
        laid = hidden.new_zeros(rows * columns, hidden.shape[1]).index_copy(0, where, hidden).unflatten(0, (rows, -1))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        output = CausalLMOutputWithPast(loss=loss, logits=self.model.logits(laid[:, kept]), **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output

    @staticmethod
    def _documents(position_ids: Tensor | None, real: Tensor, lengths: list[int], cache: ConceptCache | None
                   ) -> list[int]:
        """Lengths of documents: those of the rows, or of what position_ids cut them into."""
        if position_ids is None or cache is not None:
            return lengths
        given = position_ids.to(real.device).expand_as(real)[real]  # (N,)
        ends = torch.tensor(lengths, device=given.device).cumsum(0)
        starts = torch.zeros_like(given, dtype=torch.bool)
        starts[0] = True
        starts[ends[:-1]] = True
        starts |= given == 0
        begun = starts.nonzero().squeeze(1)
        places = torch.arange(len(given), device=given.device)
        if not torch.equal(given, places - begun[starts.long().cumsum(0) - 1]):
            raise ValueError("position_ids do not count the marked tokens of a row from 0: leave them out, or let them "
                             "begin at 0 with every document")
        return torch.diff(begun, append=begun.new_tensor([len(given)])).tolist()

    @staticmethod
    def _targets(labels: Tensor, real: Tensor, lengths: list[int]) -> Tensor:
        """(N,) int64: what is to be predicted at each marked token, -1 for nothing. lengths: of the documents."""
        packed = labels.to(real.device)[real]
        following = torch.cat([packed[1:], packed.new_full((1,), IGNORED)])
        ends = torch.tensor(lengths, device=packed.device).cumsum(0) - 1
        following[ends] = IGNORED  # what comes next belongs to another document
        return torch.where(following == IGNORED, -1, following)

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values: ConceptCache | None = None,
                                      attention_mask: Tensor | None = None, cache: ConceptCache | None = None,
                                      use_cache: bool = True, **_: Any) -> dict[str, Any]:
        """The columns that the cache has not read. Some versions hand over all of them, some only the new ones."""
        cache = past_key_values if cache is None else cache
        if cache is not None:
            total = input_ids.shape[1] if attention_mask is None else attention_mask.shape[1]
            if total <= cache.columns:
                raise ValueError(f"the cache has read {cache.columns} columns and only goes forward, and there are "
                                 f"{total}: leave it out, or give a text that goes on from it")
            input_ids = input_ids[:, cache.columns - total:]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, CACHE: cache,
                "logits_to_keep": 1}
