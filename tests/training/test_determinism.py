"""No operation of a step adds up in an order that a GPU may change: every one that is called stands in a list here.

The list is closed: an operation that is new in a step fails the test until somebody has looked up what it does on a
GPU. `Trainer(deterministic=True)` turns on torch.use_deterministic_algorithms, whose documentation says which
operations it makes deterministic and which it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dlcm_lightning.model import concepts
from dlcm_lightning.ops import pool_and_replicate
from tests import varlen_cpu
from tests.steps import CONFIG, MODEL, Steps

ELEMENT_BY_ELEMENT = {
    "__rshift__", "_to_copy", "abs", "add", "add_", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor",
    "clamp", "clamp_", "clamp_min", "clamp_min_", "clone", "copy_", "cos", "cumprod", "cumsum", "div", "empty",
    "empty_like", "eq", "exp", "exp_", "fill_", "flip", "full", "ge", "gt", "le", "lerp_", "log", "logical_and_", "lt",
    "masked_fill_", "mul", "mul_", "neg", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "pow", "reciprocal",
    "remainder", "rsqrt", "rsub", "scalar_tensor", "sigmoid", "silu", "silu_backward", "sin", "sqrt", "sub", "sub_",
    "tril", "triu", "where", "zeros", "zeros_like", "_local_scalar_dense", "promote_types",
}
"""And what makes, copies or scans; cumulative products and sums walk one line each."""
VIEWS = {"_unsafe_view", "alias", "cat", "constant_pad_nd", "detach", "expand", "select", "slice", "slice_backward",
         "split", "split_with_sizes", "squeeze", "squeeze_", "stack", "t", "unbind", "unsqueeze", "view"}
TREES = {"amax", "linalg_vector_norm", "max", "mean", "sum"}
"""Reductions by a fixed tree."""
PRODUCTS = {"bmm", "mm"}
"""cuBLAS, with CUBLAS_WORKSPACE_CONFIG set."""
EACH_PLACE_ONCE = {"embedding", "gather", "index", "index_fill_", "index_select", "repeat_interleave", "scatter_",
                   "searchsorted"}
"""Reads, and writes to places of which no two are the same or get different numbers."""
ONE_THREAD_A_SUM = {"segment_reduce"}
"""With offsets; tests/gpu/test_ops.py repeats them."""
BY_THE_FLAG = {"embedding_dense_backward"}
"""Sorts first in torch's deterministic mode."""
ATTENTION = {"_varlen_attn", "_varlen_attn_backward"}
"""Ask for the flag; tests/gpu/test_attention.py repeats them."""
OPTIMIZER = {"_foreach_add_", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_fused_adamw_",
             "_record_function_enter_new", "_record_function_exit"}
LISTED = (ELEMENT_BY_ELEMENT | VIEWS | TREES | PRODUCTS | EACH_PLACE_ONCE | ONE_THREAD_A_SUM | BY_THE_FLAG
          | ATTENTION | OPTIMIZER)


class Names(TorchDispatchMode):
    """Which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        floats = name == "cumsum" and arguments[0].is_floating_point()
        self.found.add("cumsum of floats" if floats else name)  # which a GPU refuses
        return function(*arguments, **(keywords or {}))


def operations(kind: str = "dlcm", recompute: str = "none", **boundary: Any) -> set[str]:
    """Of an optimizer step: forward, backward, statistics, clipping, AdamW, buffers."""
    varlen_cpu.register()
    model = replace(MODEL, kind=kind, boundary=replace(MODEL.boundary, **boundary))  # type: ignore[arg-type]
    config = replace(CONFIG, model=model,
                     train=replace(CONFIG.train, recompute=recompute))  # type: ignore[arg-type]
    run = Steps(config, torch.device("cpu"), torch.bfloat16, "varlen")
    batches = run.batches(0)
    with Names() as names:
        run.compute(batches)
    return names.found


@pytest.mark.parametrize("form", ["both", "paper", "rule", "fixed"])
@pytest.mark.parametrize("rate_scope", ["global", "document"])
def test_every_operation_of_a_step_is_listed(form: str, rate_scope: str) -> None:
    found = operations(form=form, rate_scope=rate_scope)
    assert len(found) > 50
    assert not found - LISTED, "look up what a GPU does, and list it"


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["dlcm", "dense"])
def test_nor_is_one_of_a_dense_model_or_of_what_is_computed_again(kind: str, recompute: str) -> None:
    found = operations(kind, recompute)
    assert len(found) > 40
    assert not found - LISTED, "look up what a GPU does, and list it"


def test_nothing_that_is_listed_is_refused_by_torchs_deterministic_mode() -> None:
    documentation = torch.use_deterministic_algorithms.__doc__ or ""
    refused = documentation.partition("nondeterministic operations will throw a")[2]
    assert "cumsum" in refused, "of floats alone: ours are of whole numbers"
    for name in LISTED - {"cumsum"}:
        assert f"torch.{name}`" not in refused and f"torch.Tensor.{name}`" not in refused, name


def adds_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def pooled(x: torch.Tensor, made: Any) -> torch.Tensor:
        sums = torch.zeros(len(made) + 1, x.shape[1], dtype=x.dtype).index_add(0, made.owner % (len(made) + 1), x)
        return sums[:-1] / made.lengths[:, None].to(x.dtype)

    monkeypatch.setattr(concepts, "mean_pool", pooled)


def adds_by_scattering(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment_sum(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        owner = torch.searchsorted(offsets[1:], torch.arange(len(x)), right=True).clamp(max=len(offsets) - 2)
        out = torch.zeros(len(offsets) - 1, x.shape[1])
        return out.scatter_add(0, owner[:, None].expand_as(x), x.float())

    monkeypatch.setattr(pool_and_replicate, "segment_sum", segment_sum)


def sums_floats_along_the_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_and_replicate, "segment_sum", lambda x, offsets: F.pad(
        x.float().cumsum(0), (0, 0, 1, 0)).index_select(0, offsets.long()).diff(dim=0))


@pytest.mark.parametrize("plant", [adds_by_index, adds_by_scattering, sums_floats_along_the_axis])
def test_a_sum_in_any_order_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    plant(monkeypatch)
    assert operations() - LISTED
