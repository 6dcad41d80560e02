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
MATRIX = [(ranks, micro) for ranks in (1, 2, 4) for micro in (1, 3)]


@pytest.fixture(scope="module")
def alone(do: Do, config: DataConfig) -> dict[bool, Found]:
    """One process, one micro-batch, float64; by the rule for F."""
    found = do(1, {str(previous): Task("gradients", step_config(config, previous=previous))
                   for previous in (False, True)})
    return {name == "True": one for name, one in found.items()}


@pytest.fixture(scope="module")
def together(do: Do, config: DataConfig) -> dict[int, dict[str, Found]]:
    """By ranks, then by strategy and micro-batches."""
    found = {}
    for ranks in (1, 2, 4):
        tasks = {f"{strategy}-{micro}": Task("gradients", step_config(
            config, ranks, micro, strategy=strategy, precision="fp32" if strategy.startswith("zero") else "fp64"))
            for strategy in STRATEGIES for micro in (1, 3)}
        tasks["autograd"] = Task("by_autograd", step_config(config, ranks, 1))
        found[ranks] = do(ranks, tasks)
    return found


def worst(found: Found, expected: Found, step: int) -> tuple[float, str]:
    """The largest deviation from an expected gradient, relative to that gradient's largest entry, and where."""
    prefix = f"{step}/"
    names = [name for name in expected if name.startswith(prefix) and "/weight/" not in name
             and name.removeprefix(prefix) not in ("norm", "rate")]
    assert len(names) > 20
    errors = []
    for name in names:
        size = expected[name].abs().max().item()
        assert size > 0 or name.startswith(f"{step}/boundary"), name
        errors.append(((found[name].double() - expected[name].double()).abs().max().item() / (size or 1.0), name))
    return max(errors)


@pytest.mark.parametrize(("ranks", "micro"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_those_of_one_process(
    alone: dict[bool, Found], together: dict[int, dict[str, Found]], strategy: str, ranks: int, micro: int
) -> None:
    found, expected = together[ranks][f"{strategy}-{micro}"], alone[micro > 1]
    tolerance = ROUNDED if strategy.startswith("zero") else EXACT
    for step in range(STEPS):
        error, where = worst(found, expected, step)
        assert error < tolerance, (step, where)
        assert found[f"{step}/rate"] == expected[f"{step}/rate"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_collective_that_knows_its_gradient_gives_the_same(
    alone: dict[bool, Found], together: dict[int, dict[str, Found]], ranks: int
) -> None:
    assert worst(together[ranks]["autograd"], alone[False], 0)[0] < EXACT


@pytest.mark.parametrize(("ranks", "micro"), MATRIX)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipping_knows_the_global_norm_and_the_update_follows_it(
    alone: dict[bool, Found], together: dict[int, dict[str, Found]], strategy: str, ranks: int, micro: int
) -> None:
    found, expected = together[ranks][f"{strategy}-{micro}"], alone[micro > 1]
    tolerance = ROUNDED if strategy.startswith("zero") else EXACT
    for step in range(STEPS):
        gradients = [value.double() for name, value in found.items() if name.startswith(f"{step}/")
                     and "/weight/" not in name and name.split("/", 1)[1] not in ("norm", "rate")]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        assert norm > 1.0, "the limit must bind, or this shows nothing"
        torch.testing.assert_close(found[f"{step}/norm"].double(), norm, rtol=tolerance, atol=0)
    for name in (name for name in expected if name.startswith(f"{STEPS - 1}/weight/")):
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=0, atol=100 * tolerance * 1e-2,
                                   msg=lambda text, name=name: f"{name}: {text}")
