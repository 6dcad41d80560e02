"""Gradients of the whole loss, exact: many ranks and micro-batches as one process that holds the whole batch.

Compared before clipping and before the optimizer, because AdamW hides any constant factor: in float64 for DDP and
FSDP2, in float32, which is all it has, for ZeRO.
"""

from __future__ import annotations

import pytest
import torch

from dlcm_lightning.config import DataConfig
from tests.distributed.conftest import STEPS, STRATEGIES, Do, Task, step_config

Found = dict[str, torch.Tensor]
EXACT, ROUNDED = 1e-9, 2e-4
"""Of the largest entry of a gradient, in float64 and in float32."""
RECOMPUTED = [f"{strategy}-{mode}" for strategy in STRATEGIES for mode in ("selective", "full")]
PLANTED = {"without_the_factor_w": ("ddp", 1), "without_the_factor_k": ("ddp", 3), "rate_of_one_rank": ("ddp", 1),
           "counts_of_one_rank": ("ddp", 1), "rows_of_rank_0": ("ddp", 1), "deepspeed_divides_twice": ("zero2", 3)}
"""Bugs of mutants.py, each with a strategy and a number of micro-batches under which it attempts."""
MATRIX = [pytest.param(ranks, micro, marks=() if ranks == 2 else pytest.mark.whole)
          for ranks in (1, 2, 4) for micro in (1, 3)]


def precision(strategy: str) -> str:
    return "fp32" if strategy.startswith("zero") else "fp64"


@pytest.fixture(scope="module")
def alone(do: Do, config: DataConfig) -> dict[bool, Found]:
    """One process, one micro-batch, float64; by the rule for F."""
    found = do(1, {str(previous): Task("gradients", step_config(config, previous=previous))
                   for previous in (False, True)})
    return {name == "True": one for name, one in found.items()}


@pytest.fixture(scope="module")
def beginning(do: Do, config: DataConfig) -> Found:
    """Weights and buffers of one process before its first step."""
    return do(1, {"initial": Task("initial", step_config(config, precision="fp32"))})["initial"]


class Together:
    """What so many ranks found, by strategy and micro-batches; done when it is first asked for."""

    def __init__(self, do: Do, config: DataConfig) -> None:
        self.do, self.config = do, config
        self.found: dict[int, dict[str, Found]] = {}

    def __getitem__(self, ranks: int) -> dict[str, Found]:
        if ranks not in self.found:
            self.found[ranks] = self.do(ranks, self.tasks(ranks))
        return self.found[ranks]

    def tasks(self, ranks: int) -> dict[str, Task]:
        def task(strategy: str, micro: int, mutant: str = "", **train: object) -> Task:
            return Task("gradients", step_config(self.config, ranks, micro, strategy=strategy,
                                                 precision=precision(strategy), **train), mutant)

        tasks = {f"{strategy}-{micro}": task(strategy, micro) for strategy in STRATEGIES for micro in (1, 3)}
        tasks["autograd"] = Task("by_autograd", step_config(self.config, ranks, 1))
        if ranks == 2:
            tasks |= {f"{strategy}-{mode}": task(strategy, 3, recompute=mode)
                      for strategy in STRATEGIES for mode in ("selective", "full")}
            tasks["zero3-offload"] = task("zero3", 3, offload=True)
            tasks["fsdp2-replicas"] = task("fsdp2", 3, shard_ranks=1)
            tasks |= {f"{strategy}-bf16": Task("gradients", step_config(
                self.config, ranks, 3, strategy=strategy, precision="bf16")) for strategy in STRATEGIES}
            tasks["fsdp2-replicas-bf16"] = Task("gradients", step_config(
                self.config, ranks, 3, strategy="fsdp2", precision="bf16", shard_ranks=1))
        if ranks == 4:
            tasks["fsdp2-replicas"] = task("fsdp2", 3, shard_ranks=2)
        if ranks == 2:
            tasks |= {f"{strategy}-initial": Task("initial", step_config(self.config, ranks, 1, strategy=strategy,
                                                                         precision="fp32")) for strategy in STRATEGIES}
            tasks |= {mutant: task(strategy, micro, mutant) for mutant, (strategy, micro) in PLANTED.items()}
        return tasks


@pytest.fixture(scope="module")
def together(do: Do, config: DataConfig) -> Together:
    return Together(do, config)


def gradients_of(found: Found, step: int) -> Found:
    """By parameter."""
    prefix = f"{step}/"
    return {name.removeprefix(prefix): value.double() for name, value in found.items()
            if name.startswith(prefix) and name.count("/") == 1 and name.endswith(".weight")}


def worst(found: Found, expected: Found, step: int) -> tuple[float, str]:
    """The largest deviation from an expected gradient, relative to that gradient's largest entry, and where."""
    mine, theirs = gradients_of(found, step), gradients_of(expected, step)
    assert mine.keys() == theirs.keys() and len(theirs) > 20
    errors = []
    for name, value in theirs.items():
        size = value.abs().max().item()
        assert size > 0 or name.startswith("boundary"), name
        errors.append(((mine[name] - value).abs().max().item() / (size or 1.0), name))
    return max(errors)


def deviation(found: Found, expected: Found) -> float:
    return max(worst(found, expected, step)[0] for step in range(STEPS))


def tolerance(name: str) -> float:
    return ROUNDED if name.startswith("zero") else EXACT


@pytest.mark.parametrize(("ranks", "micro"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_one_process(
    alone: dict[bool, Found], together: Together, strategy: str, ranks: int, micro: int
) -> None:
    found, expected = together[ranks][f"{strategy}-{micro}"], alone[micro > 1]
    for step in range(STEPS):
        error, where = worst(found, expected, step)
        assert error < tolerance(strategy), (step, where)
        assert found[f"{step}/rate"] == expected[f"{step}/rate"]


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.whole),
                                   pytest.param(4, marks=pytest.mark.whole)])
def test_a_collective_that_knows_its_gradient_gives_the_same(
    alone: dict[bool, Found], together: Together, ranks: int
) -> None:
    assert worst(together[ranks]["autograd"], alone[False], 0)[0] < EXACT


@pytest.mark.parametrize(("ranks", "micro"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_clipped_by_their_global_norm(
    together: Together, strategy: str, ranks: int, micro: int
) -> None:
    """The norm is that of all gradients, and what reached AdamW is gradient x limit / norm: its first moment says so,
    where its update would hide it."""
    found = together[ranks][f"{strategy}-{micro}"]
    for step in range(STEPS):
        norm = torch.stack([value.square().sum() for value in gradients_of(found, step).values()]).sum().sqrt()
        assert norm > 1.5, "the limit of 1 must bind, or this shows nothing"
        torch.testing.assert_close(found[f"{step}/norm"].double(), norm, rtol=tolerance(strategy), atol=0)
    norm = found["0/norm"].double()
    for name, gradient in gradients_of(found, 0).items():
        torch.testing.assert_close(found[f"0/moment/{name}"].double(), 0.1 * gradient / norm, atol=1e-6,
                                   rtol=100 * tolerance(strategy), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", RECOMPUTED)
def test_what_is_recomputed_changes_no_gradient(
    alone: dict[bool, Found], together: Together, name: str
) -> None:
    assert deviation(together[2][name], alone[True]) < tolerance(name)


def test_offloading_changes_no_gradient(alone: dict[bool, Found], together: Together) -> None:
    assert deviation(together[2]["zero3-offload"], alone[True]) < ROUNDED


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.whole)])
def test_cutting_over_some_ranks_and_repeating_on_others_changes_no_gradient(
    alone: dict[bool, Found], together: Together, ranks: int
) -> None:
    assert deviation(together[ranks]["fsdp2-replicas"], alone[True]) < EXACT


@pytest.mark.parametrize("name", [f"{name}-bf16" for name in (*STRATEGIES[1:], "fsdp2-replicas")])
def test_gradients_in_bf16_are_those_of_ddp(alone: dict[bool, Found], together: Together, name: str) -> None:
    """Of the first step, whose decisions are the same to the last token. fsdp2 gathers the matrices of blocks in bf16,
    and a micro-batch's gradient of theirs comes in bf16, as it does under the other strategies on a CPU; all are added
    up in fp32."""
    found, expected = together[2][name], together[2]["ddp-bf16"]
    assert found["0/rate"] == expected["0/rate"] and found["0/norm"] != alone[True]["0/norm"]
    assert all(found[f"0/{where}"].dtype == torch.float32 for where in gradients_of(found, 0))
    error, where = worst(found, expected, 0)
    print(name, error, where)
    assert error < ROUNDED, where


@pytest.mark.parametrize("mutant", PLANTED)
def test_a_bug_planted_in_the_sums_over_ranks_is_noticed(
    alone: dict[bool, Found], together: Together, mutant: str
) -> None:
    """Each is far from the tolerance that the honest code keeps."""
    strategy, micro = PLANTED[mutant]
    assert deviation(together[2][mutant], alone[micro > 1]) > 20 * tolerance(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_begins_with_the_weights_of_one_process(together: Together, beginning: Found, strategy: str
                                                               ) -> None:
    found = together[2][f"{strategy}-initial"]
    assert found.keys() == beginning.keys() and len(found) > 30
    assert all(torch.equal(found[name], beginning[name]) for name in beginning)
