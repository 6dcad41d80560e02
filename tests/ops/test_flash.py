"""The FlashAttention packages, called as each wants to be. Their kernels need a GPU: tests/gpu/test_attention.py."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlcm_lightning.config import ConfigError
from dlcm_lightning.ops import attention
from dlcm_lightning.ops.attention import FLASH, FlashAttention, choose_backend, why_not
from dlcm_lightning.ops.segments import Segments

GPU = torch.device("cuda", 0)

Told = list[tuple[bool, bool]]
"""causal, deterministic."""


def second(told: Told) -> Callable[..., Any]:
    """As flash-attn 2.8 has it."""

    def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
            max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
            window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None, deterministic: bool = False,
            return_attn_probs: bool = False, block_table: Any = None) -> Tensor:
        told.append((causal, deterministic))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        return attention.reference(q, k, v, Segments(cu_seqlens_q, max_seqlen_q))

    return flash_attn_varlen_func


def third(told: Told) -> Callable[..., Any]:
    """As hopper/flash_attn_interface.py has it."""
    inner = second(told)

    def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
            max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
            causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
            window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
            pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0,
            return_attn_probs: bool = False) -> Tensor:
        return inner(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
                     deterministic=deterministic)

    return flash_attn_varlen_func


def fourth(told: Told) -> Callable[..., Any]:
    """As flash-attn-4 has it: other arguments in front, and two results."""
    inner = second(told)

    def flash_attn_varlen_func(
            q: Tensor, k: Tensor, v: Tensor, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
            max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None, seqused_q: Any = None,
            seqused_k: Any = None, gather_kv_indices: Any = None, page_table: Any = None, softmax_scale: Any = None,
            causal: bool = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: float = 0.0,
            num_splits: int = 1, pack_gqa: Any = None, deterministic: bool = False) -> tuple[Tensor, None]:
        return inner(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
                     deterministic=deterministic), None

    return flash_attn_varlen_func


PACKAGES = {"flash": second, "flash3": third, "flash4": fourth}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """Puts stand-ins where the packages would be, and a card of a compute capability."""
    def act(*names: str, capability: tuple[int, int] = (9, 0)) -> Told:
        told: Told = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name, package in FLASH.items():
            fresh = replace(package)  # which has not looked yet
            monkeypatch.setitem(FLASH, name, fresh)
            monkeypatch.setitem(attention.BACKENDS, name, fresh)
            module = SimpleNamespace(flash_attn_varlen_func=PACKAGES[name](told)) if name in names else None
            monkeypatch.setitem(sys.modules, package.module, module)
        return told

    return act


@pytest.mark.parametrize("name", FLASH)
def test_each_is_told_to_be_causal_and_deterministic(name: str, install: Callable[..., Told]) -> None:
    """Their own default adds up gradients in any order, and none looks at torch's mode."""
    told = install(name)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(40, heads, 8, generator=generator) for heads in (4, 2, 2))
    segments = Segments.from_lengths([30, 1, 9])
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for mode in (True, False):
            torch.use_deterministic_algorithms(mode)
            out = attention.attention(query, key, value, segments, name)
    finally:
        torch.use_deterministic_algorithms(before)
    assert told == [(True, True), (True, False)]
    assert torch.equal(out, attention.reference(query, key, value, segments))


def test_auto_prefers_torch_then_the_newest_that_the_card_can_run(install: Callable[..., Told],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    install(*FLASH)
    assert choose_backend("auto", GPU, torch.bfloat16) == "varlen"
    install(*FLASH, capability=(13, 0))
    assert choose_backend("auto", GPU, torch.bfloat16) == "varlen", "which comes with torch, for cards of its time"
    monkeypatch.setattr(attention, "_torch_varlen", None)
    install(*FLASH, capability=(13, 0))
    assert choose_backend("auto", GPU, torch.bfloat16) == "sdpa", "which any card runs"
    for capability, expected in (((10, 0), "flash4"), ((9, 0), "flash4"), ((8, 6), "flash3"), ((12, 0), "flash"),
                                 ((7, 5), "sdpa")):
        install(*FLASH, capability=capability)
        assert choose_backend("auto", GPU, torch.bfloat16) == expected
    install("flash")
    assert choose_backend("auto", GPU, torch.bfloat16) == "flash"
    assert choose_backend("auto", GPU, torch.bfloat16, begun="flash4") == "flash", "which is not there"
    install(*FLASH)
    assert choose_backend("auto", GPU, torch.bfloat16, begun="flash3") == "flash3"


def test_what_cannot_run_is_refused_with_the_reason(install: Callable[..., Told]) -> None:
    install("flash")
    with pytest.raises(ConfigError, match=r"flash4'.*flash-attn-4 is not installed; here run: flex, varlen, flash, "):
        choose_backend("flash4", GPU, torch.bfloat16)
    install(*FLASH, capability=(12, 0))
    with pytest.raises(ConfigError, match=r"flash4'.*needs compute capability 9 to 11, this card has 12\.0"):
        choose_backend("flash4", GPU, torch.bfloat16)
    install(*FLASH, capability=(7, 0))
    assert all(why_not(name, GPU, torch.bfloat16) == "it needs compute capability 8 or more, this card has 7.0"
               for name in ("flex", "varlen"))
    assert why_not("flash", GPU, torch.bfloat16) == "it needs compute capability 8 to 12, this card has 7.0"
    assert choose_backend("auto", GPU, torch.bfloat16, compiled=True) == "sdpa", "which any card runs"


@pytest.mark.filterwarnings("ignore")  # what its dependencies say of each other
@pytest.mark.parametrize(("name", "package"), FLASH.items())
def test_the_real_package_takes_what_it_is_given(name: str, package: FlashAttention) -> None:
    if package.kernel is None:
        pytest.skip(f"{package.package} is not installed")
    real, known = inspect.signature(package.kernel), inspect.signature(PACKAGES[name]([]))
    assert list(real.parameters)[:len(known.parameters)] == list(known.parameters)
