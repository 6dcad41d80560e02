"""A number on its way to the host is waited for on the device that it comes from."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dlcm_lightning.ops.segments import HostNumber


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_number_is_waited_for_where_it_is(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is another one where a model was loaded onto a card that nobody made current."""
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = None) -> None:
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda where=None: f"stream of {where}")
    with FakeTensorMode(allow_non_fake_inputs=True):
        HostNumber(torch.empty((), dtype=torch.int64, device=device))
    assert recorded == [f"stream of {device}"]
