"""The host waits for the device once a micro-batch, for the number of concepts, and not at all in the optimizer's step.

Counted on a CPU, where waiting shows in the operations that are called: reading a number, making a shape that depends
on values, and giving a tensor a number of Python's by an index, which a GPU is told of by a copy. What only a GPU can
say is in tests/gpu/test_syncs.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlcm_lightning.model import boundary, dlcm
from dlcm_lightning.training.metrics import sums
from tests import varlen_cpu
from tests.steps import CONFIG, MODEL, Steps

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
         "unique_dim", "bincount", "histc", "equal", "allclose", "lift_fresh", "index_put_"}
"""index_put_ is how a number is written by a tensor of indices; lift_fresh how one of Python's becomes a tensor."""


class Waits(TorchDispatchMode):
    """Counts operations for which a host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put") and any(
            one is not None and one.dtype == torch.bool for one in arguments[1])
        if name in WAITS or masked:
            self.found[name] += 1
        return function(*arguments, **(keywords or {}))


def waits_of_a_step(kind: str = "dlcm", recompute: str = "none") -> Counter[str]:
    """Of one optimizer step of two micro-batches, attention by torch's varlen operation, as on a GPU."""
    varlen_cpu.register()
    config = replace(CONFIG, model=replace(MODEL, kind=kind),  # type: ignore[arg-type]
                     train=replace(CONFIG.train, recompute=recompute))  # type: ignore[arg-type]
    run = Steps(config, torch.device("cpu"), torch.bfloat16, "varlen")
    run.step(0)
    batches = run.batches(1)
    assert len(batches) == 2
    with Waits() as waits:
        run.compute(batches)
    return waits.found


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_step_waits_once_a_micro_batch(recompute: str) -> None:
    assert waits_of_a_step(recompute=recompute) == {"_local_scalar_dense": 2}


def test_a_dense_step_waits_for_nothing() -> None:
    assert not waits_of_a_step("dense")


def reads_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = dlcm.smooth
    monkeypatch.setattr(dlcm, "smooth", lambda z, gates, documents: honest(z, gates * float(gates[0]), documents))


def asks_for_places(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = boundary.document_starts

    def starts(documents: Any, tokens: int) -> torch.Tensor:
        found = honest(documents, tokens)
        return torch.zeros_like(found).index_fill_(0, found.nonzero().squeeze(1), True)

    monkeypatch.setattr(boundary, "document_starts", starts)


def writes_a_number_by_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(documents: Any, tokens: int) -> torch.Tensor:
        first = torch.zeros(tokens, dtype=torch.bool)
        first[documents.cu_seqlens[:-1].long()] = True
        return first

    monkeypatch.setattr(boundary, "document_starts", starts)


def takes_by_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sums.digest
    monkeypatch.setattr(sums, "digest", lambda numbers, counted: honest(numbers[counted], counted[counted]))


@pytest.mark.parametrize("plant", [reads_a_number, asks_for_places, writes_a_number_by_an_index, takes_by_a_mask])
def test_one_wait_more_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert waits_of_a_step() != {"_local_scalar_dense": 2}
