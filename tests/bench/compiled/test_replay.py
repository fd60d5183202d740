"""A recorded launch, run again on tensors of its own."""

import pytest
import torch

pytest.importorskip("triton")

from oracle import DEVICE

from fusebert.bench.compiled.aot import Launch
from fusebert.bench.compiled.replay import Replay
from fusebert.kernels.norm import launch as norm

HIDDEN, ROWS = 64, 5


class Recorder:
    """Stands for a Triton function: keeps its launches, and runs them too."""

    def __init__(self, function):
        self.function, self.launches = function, []

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            names = getattr(self.function, "arg_names", ())
            arguments = dict(zip(names, args, strict=False)) | kwargs
            self.launches.append(Launch(None, "", grid, self.function, arguments, {}))
            return self.function[grid](*args, **kwargs)

        return run


def recorded(monkeypatch):
    recorder = Recorder(norm.layernorm_forward)
    monkeypatch.setattr(norm, "layernorm_forward", recorder)
    x, residual = (torch.full((ROWS, HIDDEN), 3.0, device=DEVICE) for _ in range(2))
    weight, bias = (torch.ones(HIDDEN, device=DEVICE) for _ in range(2))
    seed = torch.tensor([7], device=DEVICE)
    norm.launch_forward(x, None, residual, weight, bias, seed, 0.0, 1e-12, True, True)
    (launch,) = recorder.launches
    return launch


def test_the_kernel_runs_on_other_numbers(monkeypatch):
    """The recorded launch normalises constants; the replay random numbers, which it writes to its own tensors."""
    seen = []

    class Seen:
        def __getitem__(self, grid):
            return lambda **arguments: (seen.append(arguments), launch.function[grid](**arguments))

    launch = recorded(monkeypatch)
    Replay(launch._replace(function=Seen())).on(torch.device(DEVICE))()
    (arguments,) = seen
    assert arguments.keys() == launch.arguments.keys()
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    for name, x in tensors.items():
        old = launch.arguments[name]
        assert (x.shape, x.stride(), x.dtype) == (old.shape, old.stride(), old.dtype), name
        assert x.data_ptr() != old.data_ptr(), name
    s = tensors["x_ptr"] + tensors["residual_ptr"]
    torch.testing.assert_close(tensors["mean_ptr"], s.mean(1))
    assert s.std() > 0.5


def test_integers_are_those_of_the_launch_and_views_share_their_storage():
    qkv = torch.empty(4, 3, 8)
    bounds = torch.tensor([0, 3, 4], dtype=torch.int32)
    arguments = {"q_ptr": qkv[:, 0], "k_ptr": qkv[:, 1], "cu_seqlens_ptr": bounds[1:], "none_ptr": None, "N": 4}
    got = {}

    class Function:
        def __getitem__(self, grid):
            assert grid == (2,)
            return got.update

    replay = Replay(Launch(None, "", (2,), Function(), arguments, {}))
    bounds.fill_(99)  # a later launch
    assert replay.bytes == 4 * (4 * 3 * 8 + 3)
    replay.on(torch.device("cpu"))()
    assert got["cu_seqlens_ptr"].tolist() == [3, 4]
    assert (got["none_ptr"], got["N"]) == (None, 4)
    assert got["q_ptr"].stride() == (24, 1)
    assert got["k_ptr"].data_ptr() - got["q_ptr"].data_ptr() == 4 * 8
    assert got["q_ptr"].data_ptr() != qkv.data_ptr()
