"""Every operator compiled and exported for any length, under vmap and torch.func.grad, and differentiated twice.

opcheck, autocast and compilation at one shape are in the operators' own tests.
"""

import subprocess
import sys

import pytest
import torch
from oracle import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from fusebert.kernels import (
    attention,
    attention_varlen,
    attention_varlen_separate,
    bias_gelu,
    cross_entropy,
    dropout_add_layernorm,
    embed_layernorm,
    layernorm,
    masked_lm_loss,
    rmsnorm,
    use_backend,
)

H = 16
WEIGHT, BIAS = torch.linspace(0.5, 1.5, H, device=DEVICE), torch.linspace(-1, 1, H, device=DEVICE)
TABLE = torch.randn(31, H, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _heads(x):
    return x.unflatten(-1, (2, 8))  # (B, N, 2, 8)


def _cu_seqlens(x):
    return torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], dtype=torch.int32, device=x.device)


def _labels(x, classes):
    return torch.arange(x.shape[0] * x.shape[1], device=x.device) % classes


def _attention(x):
    q = _heads(x).transpose(1, 2)
    return attention(q, 2 * q, q + 1, key_padding_mask=x[..., 0] > -1)


def _varlen(x):
    qkv = _heads(x).flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    return attention_varlen(qkv, _cu_seqlens(x), x.shape[1])


def _varlen_separate(x):
    q = _heads(x).flatten(0, 1)
    return attention_varlen_separate(q, 2 * q, q + 1, _cu_seqlens(x), x.shape[1])


def _embed(x):
    ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return embed_layernorm(ids, ids % 2, ids % 7, TABLE + x.mean(), TABLE[:2], TABLE, WEIGHT, BIAS, eps=1e-5)


OPERATORS = {
    "attention": _attention,
    "attention_varlen": _varlen,
    "attention_varlen_separate": _varlen_separate,
    "layernorm": lambda x: layernorm(x, WEIGHT, BIAS),
    "rmsnorm": lambda x: rmsnorm(x, WEIGHT),
    "dropout_add_layernorm": lambda x: dropout_add_layernorm(x, 2 * x, WEIGHT, BIAS),
    "bias_gelu": lambda x: bias_gelu(x, BIAS),
    "embed_layernorm": _embed,
    "masked_lm_loss": lambda x: masked_lm_loss(x.flatten(0, 1), TABLE, None, _labels(x, 31)),
    "masked_lm_loss, lean": lambda x: masked_lm_loss(x.flatten(0, 1), TABLE, None, _labels(x, 31), lean=True),
    "cross_entropy": lambda x: cross_entropy(x.flatten(0, 1), _labels(x, H)),
}
OPERATOR = pytest.mark.parametrize("name", OPERATORS)


def sample(batch=2, length=5, **settings):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, H, generator=generator).to(DEVICE).requires_grad_(**settings)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_these_are_all_the_operators():
    """OPERATORS calls every registered operator, forward and backward. Add a new operator to it."""
    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusebert":
                called.add(func.name().split(".")[0])
            return func(*args, **(kwargs or {}))

    with use_backend("triton"), Record():
        for function in OPERATORS.values():
            function(sample()).square().sum().backward()
    # In a process of its own: another test may have imported bench, which registers operators too.
    code = "import torch, fusebert.kernels; print(*torch._C._dispatch_get_all_op_names())"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in names if name.startswith("fusebert::")} == called


@OPERATOR
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiled_once_for_every_length(name, backend):
    """One graph for the first length, one for all others, forward and backward."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    function = OPERATORS[name]
    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend=count)
        for length in (5, 7, 9, 12, 3):
            x = sample(length=length)
            ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, function))
            torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 2


@OPERATOR
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(name, backend, dynamic):
    function, x = OPERATORS[name], sample(requires_grad=False)
    sizes = ({0: torch.export.Dim("B", max=64), 1: torch.export.Dim("N", min=2, max=512)},) if dynamic else None
    with use_backend(backend):
        program = torch.export.export(Module(function), (x,), dynamic_shapes=sizes)
        other = sample(batch=3, length=9, requires_grad=False) if dynamic else x
        torch.testing.assert_close(program.module()(other), function(other), rtol=1e-5, atol=1e-5)
    ours = [node for node in program.graph.nodes if str(node.target).startswith("fusebert.")]
    assert bool(ours) == (backend == "triton")


@OPERATOR
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_of_torch_func(name, transform):
    """The Triton path raises; the reference gives what a loop over the batch, or autograd, gives."""
    function, x = OPERATORS[name], torch.stack([sample(length=5), sample(length=5) + 1]).detach()
    total = lambda x: function(x).square().sum()  # noqa: E731
    transformed = torch.vmap(function) if transform == "vmap" else torch.vmap(torch.func.grad(total))
    with use_backend("triton"), pytest.raises(RuntimeError, match=r'inside torch\.vmap.*use_backend\("reference"\)'):
        transformed(x)
    if name == "embed_layernorm":  # it reads the ids to check them, which vmap does not allow
        return
    with use_backend("reference"):
        if transform == "vmap":
            expected = [function(row) for row in x]
        else:
            rows = [row.clone().requires_grad_() for row in x]
            expected = [torch.autograd.grad(total(row), row)[0] for row in rows]
        torch.testing.assert_close(transformed(x), torch.stack(expected), rtol=1e-4, atol=1e-5)


@OPERATOR
def test_a_second_derivative_is_an_error(name):
    x = sample()

    def twice():
        (gradient,) = torch.autograd.grad(OPERATORS[name](x).square().sum(), x, create_graph=True)
        gradient.sum().backward()

    with use_backend("triton"), pytest.raises(RuntimeError, match=r"differentiate twice|no second derivative"):
        twice()
