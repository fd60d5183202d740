from collections.abc import Iterator

import pytest
import torch
from interpreter import round_bfloat16
from oracle import DEVICE


@pytest.fixture
def nan_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, so that an element no kernel wrote is noticed; and bfloat16 rounds as on a GPU."""
    if DEVICE == "cpu":
        round_bfloat16(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    assert torch.ones((), device=DEVICE).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
