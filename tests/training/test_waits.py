"""The host waits for the device once a micro-batch, for the number of concepts, and not at all in the optimizer's step.

Counted on a CPU, where waiting shows in the operations that are called: reading a number, making a shape that depends
on values, and giving a tensor a number of Python's by an index, which a GPU is told of by a copy; and in the methods
that a CPU answers without an operation. What only a GPU can say is in tests/gpu/test_syncs.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dlcm_lightning
from dlcm_lightning.config import Config
from dlcm_lightning.model import boundary, dlcm
from dlcm_lightning.ops.segments import Decisions, HostNumber
from dlcm_lightning.training import run as run_module
from dlcm_lightning.training.metrics import sums
from dlcm_lightning.training.run import pretrain
from tests import varlen_cpu
from tests.steps import CONFIG, MODEL, Steps

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive",
         "unique_dim", "bincount", "histc", "equal", "allclose", "lift_fresh", "index_put_"}
"""index_put_ is how a number is written by a tensor of indices; lift_fresh how one of Python's becomes a tensor."""
COPIES = {Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__array__}
PACKAGE = str(Path(dlcm_lightning.__file__).parent)


class _Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put") and any(
            one is not None and one.dtype == torch.bool for one in arguments[1])
        if name in WAITS or masked:
            self.waits.note(name)
        return function(*arguments, **(keywords or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        # by its name; a device that is a variable is the model's own, which is the host only here
        to_host = function is Tensor.to and any(isinstance(one, str) and one == "cpu"
                                                for one in [*arguments[1:], *keywords.values()])
        if function in COPIES or to_host:
            self.waits.note(function.__name__)
        return function(*arguments, **keywords)


class Waits:
    """Counts what a host would wait for."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        """By the function of ours, or of Lightning's, that is nearest."""
        self._stack = ExitStack()

    def __enter__(self) -> Waits:
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Methods(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def note(self, what: str) -> None:
        self.found[what] += 1
        frame = sys._getframe()
        while frame.f_back is not None and not any(
                one in frame.f_code.co_filename for one in (PACKAGE, "/lightning/pytorch/", "/lightning/fabric/")):
            frame = frame.f_back
        self.places[frame.f_code.co_qualname] += 1


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


def copies(method: Callable[[Tensor], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        honest = dlcm.smooth

        def looking(z: Tensor, gates: Tensor, documents: Any) -> Tensor:
            method(gates.detach().float())
            return honest(z, gates, documents)

        monkeypatch.setattr(dlcm, "smooth", looking)

    return plant


@pytest.mark.parametrize("plant", [
    reads_a_number, asks_for_places, writes_a_number_by_an_index, takes_by_a_mask,
    *map(copies, (Tensor.tolist, Tensor.cpu, Tensor.numpy, lambda x: x.to("cpu"), lambda x: x.to(device="cpu"))),
])
def test_one_wait_more_is_seen(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert waits_of_a_step() != {"_local_scalar_dense": 2}


class Watched(Callback):
    """Counts from the beginning of one step to that of a later one: all that loop, strategy and callbacks do."""

    def __init__(self, first: int, after: int) -> None:
        """Micro-batches of the run."""
        self.first, self.after, self.waits = first, after, Waits()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.waits.__enter__()
        elif batch_idx == self.after:
            self.waits.__exit__()

    def on_exception(self, *_: Any) -> None:
        self.waits.__exit__()


def places_of_a_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of two optimizer steps of two micro-batches between two lines of the log, in a whole run, its attention by
    torch's varlen operation."""
    varlen_cpu.register()
    monkeypatch.setattr(run_module, "choose_backend", lambda *_, **__: "varlen")
    config = replace(
        config, data=replace(config.data, micro_batch_size=2, workers=1),  # whose processes read the rows
        model=replace(config.model, boundary=replace(config.model.boundary, previous_rate=True)),
        train=replace(config.train, log_every_steps=6, validate_every_steps=12, checkpoint_every_steps=12))
    watched = Watched(4, 8)
    pretrain(config, lambda _: None, callbacks=[watched])
    assert config.micro_batches == 2 and watched.waits.places
    return watched.waits.places


OF_THE_HOST = {"ControlGroup.all_reduce_max", "batches"}
"""Which read numbers that were never on a device: what ranks agree on, and the rows of a micro-batch."""


def test_nothing_around_the_steps_of_a_run_waits_either(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = places_of_a_run(run_config, monkeypatch)
    assert {name: count for name, count in found.items() if name not in OF_THE_HOST} == {"HostNumber.__int__": 4}


def test_a_callback_that_reads_a_number_is_seen_in_a_run(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlcm_lightning.training.callbacks.metrics import Metrics

    honest = Metrics.on_train_batch_end

    def reading(self: Metrics, trainer: Trainer, module: Any, *rest: Any) -> None:
        honest(self, trainer, module, *rest)
        float(module.grad_norm)

    monkeypatch.setattr(Metrics, "on_train_batch_end", reading)
    found = places_of_a_run(run_config, monkeypatch)
    assert set(found) - OF_THE_HOST > {"HostNumber.__int__"}


class Order(TorchDispatchMode):
    """What is enqueued between making the decisions and asking how many concepts they are."""

    def __init__(self) -> None:
        super().__init__()
        self.between: list[str] | None = None

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if self.between is not None:
            self.between.append(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


def enqueued_while_the_number_travels(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of each micro-batch of a step."""
    found: list[list[str]] = []
    made, asked = HostNumber.__init__, HostNumber.__int__

    def making(self: HostNumber, number: Tensor) -> None:
        made(self, number)
        order.between = []

    def asking(self: HostNumber) -> int:
        assert order.between is not None
        found.append(order.between)
        order.between = None
        return asked(self)

    varlen_cpu.register()
    run = Steps(CONFIG, torch.device("cpu"), torch.bfloat16, "varlen")
    batches = run.batches(0)
    with monkeypatch.context() as patch, Order() as order:
        patch.setattr(HostNumber, "__init__", making)
        patch.setattr(HostNumber, "__int__", asking)
        run.compute(batches)
    return found


def test_the_device_has_a_product_to_do_while_the_number_of_concepts_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = enqueued_while_the_number_travels(monkeypatch)
    assert len(found) == 2 and all("mm" in between for between in found)


def test_a_number_that_is_asked_for_at_once_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    decided = Decisions.__init__

    def deciding(self: Decisions, boundaries: Tensor) -> None:
        decided(self, boundaries)
        int(self.concepts)

    monkeypatch.setattr(Decisions, "__init__", deciding)
    with pytest.raises(AssertionError):  # the second asking finds nothing under way
        enqueued_while_the_number_travels(monkeypatch)
