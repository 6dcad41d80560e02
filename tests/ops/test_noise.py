"""The boundary's dice."""

from __future__ import annotations

import torch

from dlcm_lightning.data.order import key, keys_of, splitmix64_of
from dlcm_lightning.ops.noise import uniform


def test_noise_is_the_hash_it_is_said_to_be() -> None:
    keys = keys_of(key(1, 2), torch.arange(3).numpy())
    drawn = uniform(torch.from_numpy(keys.view("int64")), 50)
    for row, row_key in enumerate(keys.tolist()):
        wanted = [(splitmix64_of(row_key + place * 0x9E3779B97F4A7C15) >> 40) * 2.0**-24 for place in range(50)]
        assert drawn[row].tolist() == wanted


def test_noise_is_uniform_and_keyed_by_row_and_offset() -> None:
    drawn = uniform(torch.tensor([5, 6]), 20_000)
    assert drawn.dtype == torch.float32 and drawn.min() >= 0 and drawn.max() < 1
    assert (drawn.mean(1) - 0.5).abs().max() < 0.01 and (drawn.var(1) - 1 / 12).abs().max() < 0.003
    assert uniform(torch.tensor([5]), 100)[0].tolist() == drawn[0, :100].tolist()
    assert not (drawn[0] == drawn[1]).any()
