"""Embedding, LayerNorm and dropout against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_check import ON_CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICE, DTYPES
from row_cases import (
    BACKENDS,
    Inputs,
    check_against_oracle,
    check_compiled,
    check_seeds,
    check_wanted_gradients,
    differentiate,
    meta_or_fake,
    saved_bytes,
)
from torch import Tensor, nn

from fusebert.kernels import dropout_mask, embed_layernorm, reference, use_backend
from fusebert.kernels.embedding.launch import sum_by_key

pytestmark = pytest.mark.usefixtures("nan_memory")

ON_GPU = DEVICE == "cuda"
IDS = ("input_ids", "token_type_ids", "position_ids")
TABLES = ("word_weight", "token_type_weight", "position_weight")
PARAMETERS = (*TABLES, "norm_weight", "norm_bias")
# Tokens, H, rows of the three tables: odd widths, a ragged last tile, one row in a table, more words than tokens.
SHAPES = [(1, 64, 5, 2, 3), (70, 7, 11, 2, 40), (33, 65, 100, 1, 9), (130, 64, 3, 2, 33), (9, 768, 30, 3, 9)]
if ON_GPU and not ON_CPU:
    SHAPES += [(65536, 768, 30522, 2, 512), (8191, 1024, 1000, 2, 128), (700, 16384, 50, 2, 512)]


def problem(
    tokens: int | tuple[int, ...],
    hidden_size: int,
    num_words: int = 20,
    num_types: int = 2,
    num_positions: int = 16,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Every tensor argument."""
    shape = (tokens,) if isinstance(tokens, int) else tokens
    sizes = (num_words, num_types, num_positions)
    found = {name: torch.randint(0, n, shape, device=DEVICE) for name, n in zip(IDS, sizes, strict=True)}
    for name, n in zip(TABLES, sizes, strict=True):
        found[name] = torch.randn(n, hidden_size, device=DEVICE).to(dtype)
    for name in ("norm_weight", "norm_bias"):
        found[name] = torch.randn(hidden_size, device=DEVICE).to(norm_dtype)
    return found


def run(inputs: Inputs, dy: Tensor | None = None, *, backend: str = "triton", **options: Any) -> dict[str, Tensor]:
    """The output y and "d" + name of each parameter, for dy, inputs' "dy" or ones."""
    dy = inputs.get("dy") if dy is None else dy
    inputs = {k: v for k, v in inputs.items() if k != "dy"}
    dy = torch.ones(*inputs["input_ids"].shape, inputs["word_weight"].shape[1], device=DEVICE) if dy is None else dy
    return differentiate(
        lambda **tensors: embed_layernorm(**tensors, **{"eps": 1e-5, **options}), inputs, [dy], backend
    )


def check(draw: Callable[[], Inputs], **options: Any) -> dict[str, Tensor]:
    """Triton's results, the draws stacked. A few tokens, each with one rstd, are drawn several times."""

    def draw_with_dy() -> Inputs:
        inputs = draw()
        dtype = options.get("out_dtype", inputs["word_weight"].dtype)
        shape = (*inputs["input_ids"].shape, inputs["word_weight"].shape[1])
        return inputs | {"dy": torch.randn(shape, device=DEVICE).to(dtype)}

    def run_with_options(inputs: Inputs, backend: str, **more: Any) -> dict[str, Tensor]:
        return run(inputs, backend=backend, **{**options, **more})

    def draws(inputs: Inputs) -> int:
        return max(32 // inputs["input_ids"].numel(), 2048 // inputs["dy"].numel())

    return check_against_oracle(run_with_options, draw_with_dy, draws, out_dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Half precision tables meet float32 norm parameters; ids repeat, and some do not occur."""
    check(lambda: problem(*shape, dtype=dtype))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_autocast_training(out_dtype: torch.dtype) -> None:
    """Float32 tables, the result in the linears' dtype, dropout, a padding row: the encoder's own call."""
    found = check(lambda: problem(90, 48), p=0.3, seed=5, padding_idx=3, out_dtype=out_dtype, eps=1e-12)
    assert found["y"].dtype == out_dtype
    assert found["dword_weight"].dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("without", [("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias")], ids=str)
def test_without_weight_or_bias(without: tuple[str, ...], p: float) -> None:
    check(lambda: problem(40, 33) | dict.fromkeys(without), p=p, seed=1)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_magnitudes(scale: float) -> None:
    def draw() -> dict[str, Tensor]:
        inputs = problem(40, 33)
        return inputs | {name: inputs[name] * scale for name in TABLES}

    check(draw, eps=1e-36)


def test_norm_parameters_of_the_tables_dtype() -> None:
    found = check(lambda: problem(30, 33, dtype=torch.float16, norm_dtype=torch.float16))
    assert found["dnorm_weight"].dtype == torch.float16


def test_agrees_with_modules() -> None:
    """nn.Embedding three times, nn.LayerNorm: the numbers and every gradient, the padding row's included."""
    inputs, dy = problem(60, 40), torch.randn(60, 40, device=DEVICE)
    inputs["input_ids"][::7] = 4
    embeddings = [nn.Embedding.from_pretrained(inputs[name].double(), freeze=False) for name in TABLES]
    embeddings[0].padding_idx = 4
    norm = nn.LayerNorm(40, eps=1e-3, device=DEVICE, dtype=torch.float64)
    norm.load_state_dict({"weight": inputs["norm_weight"], "bias": inputs["norm_bias"]})
    y = norm(sum(e(inputs[ids]) for e, ids in zip(embeddings, IDS, strict=True)))
    y.backward(dy.double())
    expected = [e.weight.grad for e in embeddings] + [norm.weight.grad, norm.bias.grad]
    found = run(inputs, dy, eps=1e-3, padding_idx=4)
    torch.testing.assert_close(found.pop("y").double(), y, atol=1e-5, rtol=1e-5)
    for (name, gradient), e in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(gradient.double(), e, atol=1e-4, rtol=1e-5, msg=name)
    assert not found["dword_weight"][4].any()


def test_reference_is_the_composition() -> None:
    inputs = problem((3, 5), 24)
    s = sum(F.embedding(inputs[ids], inputs[table]) for ids, table in zip(IDS, TABLES, strict=True))
    expected = F.layer_norm(s, (24,), inputs["norm_weight"], inputs["norm_bias"], 1e-3)
    assert torch.equal(reference.embed_layernorm(**inputs, eps=1e-3), expected)
    assert torch.equal(run(inputs, backend="reference", eps=1e-3)["y"], expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(8, 120),
    hidden_size=st.integers(8, 150),
    sizes=st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 60)),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.7]),
    seed=st.integers(-(2**63), 2**63 - 1),
    padded=st.booleans(),
)
def test_any_shape(
    tokens: int,
    hidden_size: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    p: float,
    seed: int,
    padded: bool,
) -> None:
    torch.manual_seed(seed)
    check(lambda: problem(tokens, hidden_size, *sizes, dtype=dtype), p=p, seed=seed, padding_idx=0 if padded else None)


@pytest.mark.parametrize("chunk", [1, 4, 32])
@pytest.mark.parametrize("tokens", [1, 31, 32, 96, 300])
def test_runs_cut_anywhere(tokens: int, chunk: int) -> None:
    """Runs shorter and longer than a chunk, that end at its edge, that fill it, and more parts than one load joins.

    The rows are small integers: float32 holds their sums exactly, in any order.
    """
    if chunk == 1 and not ON_GPU:
        tokens = min(tokens, 100)
    sizes = (max(2, tokens // 3), 2, 5)
    ids = [torch.randint(0, n, (tokens,), device=DEVICE) for n in sizes]
    ids[0][: tokens // 4] = 1
    ids[1][tokens // 9 :] = 1
    ds = torch.randint(-8, 9, (tokens, 20), device=DEVICE).float()
    keys = torch.stack([ids[0], ids[1] + sizes[0], ids[2] + sizes[0] + sizes[1]]).int()
    found = [torch.zeros(n, 20, device=DEVICE) for n in sizes]
    sum_by_key(ds, keys, found, sizes, chunk)
    for name, table_ids, sums in zip(TABLES, ids, found, strict=True):
        assert torch.equal(sums, torch.zeros_like(sums).index_add_(0, table_ids, ds)), name


def test_one_id_everywhere() -> None:
    def draw() -> dict[str, Tensor]:
        return {k: torch.ones_like(v) if k in IDS else v for k, v in problem(150, 24).items()}

    found = check(draw)
    for name in TABLES:
        assert found["d" + name][0].any(-1).nonzero().flatten().tolist() == [1]


def test_rows_of_absent_ids_are_zero() -> None:
    inputs = problem(12, 24, num_words=50)
    found = run(inputs)
    absent = torch.ones(50, dtype=torch.bool, device=DEVICE).index_fill(0, inputs["input_ids"], False)
    assert absent.any()
    assert not found["dword_weight"][absent].any()
    assert found["dword_weight"][~absent].any(-1).all()


@pytest.mark.parametrize("padding_idx", [0, 7, 19])
def test_padding_row_has_no_gradient(padding_idx: int) -> None:
    """Most tokens are padding, as in a padded batch; the other gradients are unchanged."""
    inputs, dy = problem(80, 24), torch.randn(80, 24, device=DEVICE)
    inputs["input_ids"][20:] = padding_idx
    without, found = run(inputs, dy), run(inputs, dy, padding_idx=padding_idx)
    assert without["dword_weight"][padding_idx].any()
    without["dword_weight"][padding_idx] = 0
    for name, expected in without.items():
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5, msg=name)
    assert not found["dword_weight"][padding_idx].any()


def test_deterministic() -> None:
    inputs, dy = problem(200, 40), torch.randn(200, 40, device=DEVICE)
    first, second = (run(inputs, dy, p=0.1, seed=9) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_only_wanted_gradients() -> None:
    subsets = (*((name,) for name in PARAMETERS), ("word_weight", "position_weight", "norm_bias"))
    call = lambda **tensors: embed_layernorm(**tensors, eps=1e-5, p=0.2, seed=1)  # noqa: E731
    check_wanted_gradients(call, problem(50, 24), subsets)


@BACKENDS
@pytest.mark.parametrize(("tokens", "hidden_size"), [(70, 7), (37, 65), (3, 768)])
def test_dropout_is_dropout_mask(tokens: int, hidden_size: int, backend: str) -> None:
    """Forward and backward draw the documented mask, after the LayerNorm, element by element, on either path."""
    p, seed = 0.3, -(2**40) - 17
    inputs = problem(tokens, hidden_size) | {"norm_weight": torch.zeros(hidden_size, device=DEVICE)}
    inputs["norm_bias"] = torch.ones(hidden_size, device=DEVICE)
    found = run(inputs, p=p, seed=seed, backend=backend)
    kept = dropout_mask(p, seed, tokens, hidden_size).to(DEVICE) / (1 - p)
    torch.testing.assert_close(found["y"], kept.float(), atol=0, rtol=1e-6)
    torch.testing.assert_close(found["dnorm_bias"], kept.sum(0).float())


@BACKENDS
def test_seeds(backend: str) -> None:
    inputs = problem(12, 64)
    check_seeds(lambda seed: run(inputs, p=0.5, seed=seed, backend=backend)["y"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bounds", [[0, 30], [0, 5, 6, 30], [0, 0, 7, 7, 7, 20], [0, 1, 2]], ids=str)
def test_positions_from_cu_seqlens(bounds: list[int], dtype: torch.dtype, backend: str) -> None:
    """Empty segments, segments of one, and tokens after the last segment, which count from 0 again."""
    inputs = problem(30, 24, num_positions=30)
    starts = [*bounds, 30]
    inputs["position_ids"] = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(starts)]).to(DEVICE)
    expected = run(inputs, backend=backend)
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=DEVICE)
    found = run(inputs | {"position_ids": None, "cu_seqlens": cu_seqlens}, backend=backend)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_any_layout() -> None:
    """[B, N] ids, int32 ids, views of every kind, a gradient with rows apart."""
    inputs = problem((4, 12), 24)
    dy = torch.randn(4, 12, 24, device=DEVICE)
    expected = run({k: v.reshape(-1) if k in IDS else v for k, v in inputs.items()}, dy.view(48, 24))
    views = {k: v.t().contiguous().t() if v.dim() == 2 else F.pad(v, (1, 2))[1:-2] for k, v in inputs.items()}
    views["token_type_ids"] = views["token_type_ids"].int()
    assert not any(v.is_contiguous() for k, v in views.items() if k in (*TABLES, "input_ids"))
    found = run(views, F.pad(dy, (3, 5))[..., 3:-5])
    assert found["y"].shape == (4, 12, 24)
    assert found["y"].is_contiguous()
    for name, e in expected.items():
        assert torch.equal(found[name].reshape(e.shape), e), name


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
@BACKENDS
def test_no_tokens(shape: tuple[int, ...], backend: str) -> None:
    inputs = problem(shape, 24)
    found = run(inputs, p=0.1, seed=1, backend=backend)
    assert found["y"].shape == (*shape, 24)
    for name in PARAMETERS:
        assert found["d" + name].shape == inputs[name].shape
        assert not found["d" + name].any()


def test_one_token_of_no_axis() -> None:
    found = check(lambda: problem((), 64))
    assert found["y"].shape[1:] == (64,)


def test_wider_than_the_kernels() -> None:
    check(lambda: problem(2, 16385))  # runs the reference


@pytest.mark.skipif(ON_GPU, reason="that many bytes are only free where memory is not touched")
def test_offsets_beyond_32_bits() -> None:
    """A row of the table 2³¹ elements from its start (the memory between is never touched)."""
    torch.use_deterministic_algorithms(False)
    hidden_size, far = 16384, 2**17 + 1
    table = torch.empty(far + 1, hidden_size, dtype=torch.bfloat16)
    table[far], table[0] = torch.randn(hidden_size), 0.0
    inputs = problem(1, hidden_size, dtype=torch.bfloat16) | {"input_ids": torch.tensor([far]), "word_weight": table}
    near = inputs | {"input_ids": torch.tensor([0]), "word_weight": table[far:].clone()}
    with use_backend("triton"), torch.no_grad():
        assert torch.equal(embed_layernorm(**inputs, eps=1e-5), embed_layernorm(**near, eps=1e-5))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("wrong", [20, 10**12, -1, -(2**62)])
def test_id_out_of_range_is_nan_in_the_kernels(name: str, wrong: int) -> None:
    """On a GPU ids are not checked before the kernels: no access outside the table, and the error shows as NaN."""
    inputs = problem(9, 24, num_types=20, num_positions=20)
    inputs[name][4] = wrong
    options = (None, 0.0, 1e-5, torch.float32, True)
    y, mean, rstd = torch.ops.fusebert.embed_layernorm(*inputs.values(), *options)
    assert y.isnan().any(-1).tolist() == [token == 4 for token in range(9)]
    assert y[4].isnan().all()
    dy, wanted = torch.ones_like(y), (True,) * 5
    backward = torch.ops.fusebert.embed_layernorm_backward
    gradients = backward(dy, *inputs.values(), mean, rstd, None, 0.0, None, *wanted)
    for ids, gradient in zip(IDS, gradients[:3], strict=True):
        assert gradient.isnan().any(-1).nonzero().flatten().tolist() == [int(inputs[ids][4].clamp(0, 19))]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_saved_for_the_backward(p: float) -> None:
    """8 bytes a token: README.md promises it."""
    inputs = {k: v.requires_grad_() if k in PARAMETERS else v for k, v in problem(10, 64).items()}
    found = saved_bytes(lambda **tensors: embed_layernorm(**tensors, eps=1e-5, p=p), inputs)
    assert found == 10 * 8 + (8 if p else 0)


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep: bool) -> None:
    inputs = problem((3, 4), 24)
    seed = torch.tensor([5], device=DEVICE) if keep else None
    forward = torch.ops.fusebert.embed_layernorm.default
    torch.library.opcheck(forward, (*inputs.values(), seed, 0.2 if keep else 0.0, 1e-5, torch.bfloat16, keep))
    _, mean, rstd = forward(*inputs.values(), seed, 0.2 if keep else 0.0, 1e-5, torch.bfloat16, True)
    dy = torch.randn(4, 3, 24, dtype=torch.bfloat16, device=DEVICE).transpose(0, 1)
    options = (
        (seed, 0.2, 1, True, True, True, True, True) if keep else (None, 0.0, None, True, False, False, False, True)
    )
    torch.library.opcheck(
        torch.ops.fusebert.embed_layernorm_backward.default, (dy, *inputs.values(), mean, rstd, *options)
    )


@BACKENDS
@pytest.mark.parametrize("packed", [True, False])
def test_compiles_as_one_graph(packed: bool, backend: str) -> None:
    inputs: Inputs = {k: v.requires_grad_() if k in PARAMETERS else v for k, v in problem(20, 24).items()}
    if packed:
        inputs["position_ids"] = None
        inputs["cu_seqlens"] = torch.tensor([0, 8, 20], dtype=torch.int32, device=DEVICE)

    def model(**inputs: Any) -> Tensor:
        return embed_layernorm(**inputs, eps=1e-5, p=0.25, seed=11, padding_idx=1).square()

    with use_backend(backend):
        check_compiled(model, inputs)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_meta_and_fake_tensors(device: str, backend: str) -> None:
    with meta_or_fake(device, backend), use_backend(backend):
        ids = torch.zeros(6, dtype=torch.int64)
        tables = [torch.empty(n, 24, requires_grad=True) for n in (20, 2, 16)]
        cu_seqlens = torch.zeros(3, dtype=torch.int32)
        y = embed_layernorm(ids, ids, None, *tables, None, None, eps=1e-5, p=0.1, seed=3, cu_seqlens=cu_seqlens)
        assert y.shape == (6, 24)
        y.sum().backward()
        assert [table.grad.shape for table in tables] == [table.shape for table in tables]


@BACKENDS
def test_out_dtype_holds_under_autocast(backend: str) -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inputs = problem(6, 24)
        assert run(inputs, backend=backend)["y"].dtype == torch.float32
        assert run(inputs, backend=backend, out_dtype=torch.bfloat16)["y"].dtype == torch.bfloat16


def test_double_precision_runs_the_reference() -> None:
    inputs = problem(6, 24, dtype=torch.float64)
    found = run(inputs, backend="auto")
    assert found["y"].dtype == found["dword_weight"].dtype == torch.float64
    assert found["dnorm_weight"].dtype == torch.float32


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_captured_in_a_cuda_graph() -> None:
    """A replay with other ids and another seed equals a fresh call: no size and no branch is frozen."""
    inputs, other = problem(500, 64), problem(500, 64)
    seed = torch.tensor([1], device=DEVICE)
    run(inputs, p=0.1, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(inputs, p=0.1, seed=seed)
    for name in IDS:
        inputs[name].copy_(other[name])
    seed.fill_(2)
    graph.replay()
    for name, expected in run(inputs, p=0.1, seed=seed).items():
        assert torch.equal(found[name], expected), name


@BACKENDS
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(input_ids=torch.zeros(9)), TypeError, "input_ids must be int64 or int32"),
        (dict(token_type_ids=torch.zeros(8, dtype=torch.int64)), ValueError, "token_type_ids must have input_ids'"),
        (dict(position_ids=torch.zeros(1, 9, dtype=torch.int64)), ValueError, "position_ids must have input_ids'"),
        (
            dict(token_type_ids=torch.zeros(9, dtype=torch.int64, device="meta")),
            ValueError,
            "token_type_ids must be on",
        ),
        (dict(position_ids=None), ValueError, "position_ids and cu_seqlens: .* got neither"),
        (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "position_ids and cu_seqlens: .* got both"),
        (dict(position_ids=None, cu_seqlens=torch.tensor([0.0, 9])), TypeError, "cu_seqlens must be int64 or int32"),
        (dict(position_ids=None, cu_seqlens=torch.tensor([9])), ValueError, r"cu_seqlens must have shape \[S \+ 1\]"),
        (dict(word_weight=torch.zeros(24)), ValueError, r"word_weight must have shape \[rows, H\]"),
        (
            dict(position_weight=torch.zeros(0, 24)),
            ValueError,
            r"position_weight must have shape \[rows, 24\], rows at least 1",
        ),
        (dict(token_type_weight=torch.zeros(2, 25)), ValueError, r"token_type_weight must have shape \[rows, 24\]"),
        (dict(position_weight=torch.zeros(2, 24).half()), TypeError, "position_weight must have word_weight's dtype"),
        (dict(word_weight=torch.zeros(2, 24).int()), TypeError, "word_weight must be bfloat16"),
        (dict(position_weight=torch.zeros(2, 24, device="meta")), ValueError, "position_weight must be on input_ids'"),
        (dict(norm_weight=torch.zeros(25)), ValueError, "norm_weight must have shape"),
        (dict(norm_bias=torch.zeros(24).half()), TypeError, "norm_bias must have word_weight's dtype"),
        (dict(norm_bias=torch.zeros(24, device="meta")), ValueError, "norm_bias must be on"),
        (dict(eps=-1.0), ValueError, "eps must not be negative"),
        (dict(p=1.0), ValueError, "p, the dropout probability"),
        (dict(padding_idx=20), ValueError, "padding_idx must be in 0 … 19"),
        (dict(padding_idx=-1), ValueError, "padding_idx must be in 0 … 19"),
        (dict(out_dtype=torch.float64), TypeError, "out_dtype must be"),
        (dict(p=0.1, seed="one"), TypeError, "seed must be"),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    changes = {k: x.to(DEVICE) if isinstance(x, Tensor) and not x.is_meta else x for k, x in changes.items()}
    with use_backend(backend), pytest.raises(error, match=message):
        embed_layernorm(**{**problem(9, 24), "eps": 1e-5, **changes})


@pytest.mark.skipif(ON_GPU, reason="there values are not read")
@BACKENDS
@pytest.mark.parametrize(("name", "table", "rows"), list(zip(IDS, TABLES, (20, 2, 16), strict=True)))
def test_values_out_of_range_are_errors_where_they_can_be_read(name: str, table: str, rows: int, backend: str) -> None:
    for wrong in (rows, -1):
        inputs = problem(9, 24)
        inputs[name][3] = wrong
        message = rf"{name} must be in 0 … {rows - 1}, the rows of {table}; got {wrong}"
        with use_backend(backend), pytest.raises(ValueError, match=message):
            embed_layernorm(**inputs, eps=1e-5)


@pytest.mark.skipif(ON_GPU, reason="there values are not read")
@BACKENDS
def test_bad_cu_seqlens_are_errors_where_they_can_be_read(backend: str) -> None:
    inputs = problem(9, 24, num_positions=4) | {"position_ids": None}
    for bounds, message in (
        ([1, 9], r"cu_seqlens must start at 0, never fall and end at most at 9, .* got \[1, 9\]"),
        ([0, 4, 3, 9], "cu_seqlens must start at 0, never fall"),
        ([0, 3, 9], "position_ids must be in 0 … 3, the rows of position_weight; got 5"),
    ):
        with use_backend(backend), pytest.raises(ValueError, match=message):
            embed_layernorm(**inputs, eps=1e-5, cu_seqlens=torch.tensor(bounds))
    two_axes = problem((3, 3), 24) | {"position_ids": None}
    with use_backend(backend), pytest.raises(ValueError, match=r"input_ids must be packed, \[T\]"):
        embed_layernorm(**two_axes, eps=1e-5, cu_seqlens=torch.tensor([0, 9]))
