"""The operators that a step launches on a GPU, counted on a CPU, and that it never synchronises.

The step runs under fake tensors with the Triton operators chosen, as on a GPU. A fake tensor has no values, so
any operation that would wait for a value raises.
"""

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import DEVICE
from steps import random_batch, small_model
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusebert.kernels import use_backend
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.step.step import TrainingStep


class Count(TorchDispatchMode):
    """Counts the operators that launch a kernel: not those that only make a view or allocate memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        makes_a_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not makes_a_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::")):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


def fake_step(
    mode: FakeTensorMode, layers: int, dtype: torch.dtype, wrap: Any = lambda model: model, **options: Any
) -> tuple[TrainingStep, list[Any]]:
    """A step with fake tensors only, and its window of two micro-batches."""
    model: BertForPreTraining = small_model(dropout=0.1, layers=layers).to(DEVICE).train()
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.detach()))
    generator = torch.Generator().manual_seed(0)
    window = [random_batch(generator, [9, 4], masked=7, pairs=2).to(DEVICE) for _ in range(2)]
    with mode:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        step = TrainingStep(wrap(model), optimizer, clip=1.0, compute_dtype=dtype, **options)
        return step, [batch.map(mode.from_tensor) for batch in window]


def count(layers: int, dtype: torch.dtype, *, first: bool, **options: Any) -> collections.Counter[str]:
    """A micro-batch's operators: a step's first, or a further one."""
    mode = FakeTensorMode()
    step, window = fake_step(mode, layers, dtype, **options)
    with mode:
        if not first:
            step.micro_batch(window[0], first=True)
        with Count() as counted:
            step.micro_batch(window[1], first=first)
    return counted.found


def a_layer(dtype: torch.dtype, *, first: bool, **options: Any) -> dict[str, int]:
    """What one more layer adds to a micro-batch."""
    more, less = (count(n, dtype, first=first, **options) for n in (4, 3))
    more.subtract(less)
    return {name.removeprefix("aten::"): n for name, n in more.items() if n}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_never_synchronises(dtype: torch.dtype, graph: bool) -> None:
    mode = FakeTensorMode()
    step, window = fake_step(mode, 2, dtype, graph=graph)
    with mode:
        for _ in range(2):
            result = step(window, 1e-3)
    assert result.sums.shape == (4,)


@pytest.mark.parametrize("waiting", ["tolist", "nonzero"])
def test_a_synchronisation_is_noticed(waiting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = FakeTensorMode()
    step, window = fake_step(mode, 2, torch.float32)
    update = step.update
    monkeypatch.setattr(step, "update", lambda: (getattr(step.sums, waiting)(), update()))
    with mode, pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        step(window, 1e-3)


# Forward and backward of a layer: one product a matrix in the forward, two in the backward. "sum" is qkv's bias
# gradient; each "add" sums the gradients of a residual and its sub-layer.
ONCE = {
    "mm": 11,
    "addmm": 1,
    "sum": 1,
    "add": 2,
    "fusebert::attention_qkv": 1,
    "fusebert::attention_qkv_backward": 1,
    "fusebert::dropout_add_layernorm": 2,
    "fusebert::dropout_add_layernorm_backward": 2,
    "fusebert::bias_gelu": 1,
    "fusebert::bias_gelu_backward": 1,
}
PARAMETERS = 12


@pytest.mark.parametrize("first", [True, False])
def test_launches_of_a_layer_in_float32(first: bool) -> None:
    assert a_layer(torch.float32, first=first) == ONCE | ({} if first else {"add_": PARAMETERS})


@pytest.mark.parametrize("first", [True, False])
def test_launches_of_a_layer_in_bf16(first: bool) -> None:
    """Also: qkv's bias is cast, and its gradient cast back; the matrices' gradients are cast or added to float32.

    The matrices are cast by one multi-tensor copy a step, which is not counted for a layer."""
    found = a_layer(torch.bfloat16, first=first)
    found.pop("copy_", None)
    casts = {"_to_copy": 2 + 4} if first else {"_to_copy": 2, "add_": PARAMETERS}
    assert found == ONCE | casts


def test_the_low_precision_copy_saves_casts() -> None:
    """Autocast casts each matrix, and in further micro-batches each gradient before the sum."""

    class Wrapped(torch.nn.Module):
        def __init__(self, model: BertForPreTraining) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Any:
            return self.model(batch)

    saved = {}
    for first in (True, False):
        ours, autocast = (a_layer(torch.bfloat16, first=first, wrap=wrap) for wrap in (lambda model: model, Wrapped))
        saved[first] = sum(autocast.values()) - sum(n for name, n in ours.items() if name != "copy_")
    assert saved == {True: 4, False: 8}
