"""Decoding with state on a card equals one forward there, as on a CPU (tests/model/test_extend.py)."""

from __future__ import annotations

import pytest
import torch

from tests.model.conftest import FORMS
from tests.model.test_extend import EXACT, LENGTHS, ROUNDED, difference, models

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "thresholded"])
@pytest.mark.parametrize("form", [*FORMS, "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_decoding_equals_one_forward_on_a_card(form: str, sampled: bool, dtype: torch.dtype) -> None:
    model = models(form).to("cuda", dtype)
    model.compute_dtype = dtype
    assert difference(model, LENGTHS, sampled, seed=1) < (EXACT if dtype == torch.float64 else ROUNDED)
