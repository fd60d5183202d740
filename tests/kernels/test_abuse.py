"""Arguments of every kind in every place of every public operator: one clear error, the same on both paths."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from oracle import DEVICE

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


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def ids(count: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, (count,), device=DEVICE)


def packed() -> dict[str, Any]:
    return {"cu_seqlens_q": torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE), "max_seqlen_q": 4}


DROPOUT = {"dropout_p": 0.1, "seed": 3}
CALLS = {
    "attention": lambda: (
        attention,
        {name: floats(1, 2, 4, 16) for name in "qkv"}
        | {"key_padding_mask": torch.ones(1, 4, dtype=torch.bool, device=DEVICE), "scale": 0.5, **DROPOUT},
    ),
    "attention_varlen": lambda: (
        attention_varlen,
        {"qkv": floats(4, 3, 2, 16), **{key.removesuffix("_q"): x for key, x in packed().items()}, **DROPOUT},
    ),
    "attention_varlen_separate": lambda: (
        attention_varlen_separate,
        {name: floats(4, 2, 16) for name in "qkv"}
        | {**packed(), **{key.replace("_q", "_k"): x for key, x in packed().items() if key != "cu_seqlens_q"}}
        | {"cu_seqlens_k": packed()["cu_seqlens_q"], **DROPOUT},
    ),
    "dropout_add_layernorm": lambda: (
        dropout_add_layernorm,
        {"x": floats(3, 8), "residual": floats(3, 8), "weight": floats(8), "bias": floats(8)}
        | {"linear_bias": floats(8), "p": 0.1, "seed": 3, "eps": 1e-5},
    ),
    "layernorm": lambda: (layernorm, {"x": floats(3, 8), "weight": floats(8), "bias": floats(8), "eps": 1e-5}),
    "rmsnorm": lambda: (rmsnorm, {"x": floats(3, 8), "weight": floats(8), "eps": 1e-5}),
    "bias_gelu": lambda: (bias_gelu, {"x": floats(3, 8), "bias": floats(8)}),
    "masked_lm_loss": lambda: (
        masked_lm_loss,
        {"hidden": floats(3, 8), "weight": floats(11, 8), "bias": floats(11), "labels": ids(3, 11), "max_labels": 3}
        | {"label_smoothing": 0.1, "z_loss": 0.1},
    ),
    "cross_entropy": lambda: (
        cross_entropy,
        {"logits": floats(3, 11), "labels": ids(3, 11), "label_smoothing": 0.1, "z_loss": 0.1},
    ),
    "embed_layernorm": lambda: (
        embed_layernorm,
        {"input_ids": ids(3, 5), "token_type_ids": ids(3, 2), "position_ids": ids(3, 4)}
        | {"word_weight": floats(5, 8), "token_type_weight": floats(2, 8), "position_weight": floats(4, 8)}
        | {"norm_weight": floats(8), "norm_bias": floats(8), "eps": 1e-5, "p": 0.1, "seed": 3},
    ),
}


def wrong(value: Any) -> Iterator[Any]:
    """Values of other kinds than ``value``. Some are allowed in some places."""
    if isinstance(value, torch.Tensor):
        yield from (value.tolist(), value.cpu().numpy(), None, "x", 3)
        yield from (value.to(dtype) for dtype in (torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8))
        yield from (value.flatten()[0], value[None], value.to_sparse(), value[..., :0], value[:0], value.to("meta"))
        if value.dim() > 2:
            yield value[..., :0, :]
    elif isinstance(value, int):
        yield from (2**31, 2**63, 2**70, -(2**63) - 1, 4.0, "4", True, [4], np.float32(4))
    else:
        yield from (float("nan"), float("inf"), -1.0, 1.0, "x", [0.1], None)


def outcome(function: Any, arguments: dict[str, Any], backend: str) -> str:
    with use_backend(backend):
        try:
            function(**arguments)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, call in CALLS.items() for place in call()[1]])
def test_an_argument_of_another_kind(name, place):
    function, arguments = CALLS[name]()
    assert {outcome(function, arguments, backend) for backend in ("reference", "triton")} == {"accepted"}
    refused = 0
    for value in wrong(arguments[place]):
        outcomes = {outcome(function, arguments | {place: value}, backend) for backend in ("reference", "triton")}
        assert len(outcomes) == 1, f"{value!r}: {outcomes}"
        message = outcomes.pop()
        if message != "accepted":
            refused += 1
            assert " must " in message or "position_ids and cu_seqlens" in message, f"{value!r}: {message}"
    assert refused >= 3


@pytest.mark.parametrize("name", CALLS)
def test_threads_get_what_one_thread_gets(name):
    """The reference; Triton's interpreter itself is not safe between threads, and a GPU has the Triton path."""
    function, arguments = CALLS[name]()
    backend = "triton" if DEVICE == "cuda" else "reference"
    results: list[torch.Tensor] = []

    def call():
        with use_backend(backend):
            results.append(function(**arguments))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results[1:])
