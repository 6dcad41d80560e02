"""What only a GPU can say: `make gpu` runs these, `make test` does not. Each is skipped where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product

import torch

from dlcm_lightning.training.device import compute_exactly


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """As a run computes."""
    compute_exactly()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", 0)
