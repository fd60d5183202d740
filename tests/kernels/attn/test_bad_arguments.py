"""Bad arguments of attention raise an error that names the argument."""

from __future__ import annotations

import pytest
import torch
from attention_cases import randn
from oracle import DEVICE

from fusebert.kernels import attention, attention_varlen, attention_varlen_separate, use_backend


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": torch.zeros(4, 8, 16)}, ValueError, r"q must have shape \[B, H, N, D\]"),
        ({"k": torch.zeros(2, 2, 8, 16, dtype=torch.float16)}, TypeError, "k must have q's dtype"),
        (
            {"q": torch.zeros(2, 4, 8, 16, dtype=torch.int64)},
            TypeError,
            "q must be bfloat16, float16, float32 or float64",
        ),
        ({"k": torch.zeros(2, 3, 8, 16), "v": torch.zeros(2, 3, 8, 16)}, ValueError, "heads must be a multiple"),
        ({"k": torch.zeros(1, 2, 8, 16), "v": torch.zeros(1, 2, 8, 16)}, ValueError, "batch size"),
        ({"v": torch.zeros(2, 2, 9, 16)}, ValueError, "v must have k's shape"),
        ({n: torch.zeros(1, 1, 2, 257) for n in "qkv"}, ValueError, r"head size .* 1 … 256; got 257"),
        ({"key_padding_mask": torch.ones(2, 8)}, TypeError, "key_padding_mask must be bool"),
        (
            {"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask must have shape \(2, 8\)",
        ),
        ({"dropout_p": 1.0}, ValueError, r"dropout probability, must be in \[0, 1\)"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"window": -1}, ValueError, "window must be None or an int"),
        ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an int"),
    ],
)
def test_bad_padded_input(changes, error, words):
    arguments = {"q": randn(2, 4, 8, 16), "k": randn(2, 2, 8, 16), "v": randn(2, 2, 8, 16)}
    arguments |= {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in changes.items()}
    with pytest.raises(error, match=words):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize(
    ("cu", "max_seqlen", "error", "words"),
    [
        (torch.tensor([0, 8]), 8, TypeError, "cu_seqlens must be int32"),
        (torch.tensor([0], dtype=torch.int32), 8, ValueError, r"cu_seqlens must have shape \[S \+ 1\]"),
        (torch.tensor([0, 8], dtype=torch.int32), 0, ValueError, "max_seqlen must be an int of at least 1"),
        (torch.tensor([0, 8], dtype=torch.int32), 7.0, ValueError, "max_seqlen must be an int"),
    ],
)
def test_bad_packed_input(cu, max_seqlen, error, words):
    with pytest.raises(error, match=words):
        attention_varlen(randn(8, 3, 1, 16), cu.to(DEVICE), max_seqlen)


@pytest.mark.parametrize(
    ("cu", "max_seqlen", "words"),
    [
        ([0, 5, 3, 8], 8, r"never fall .* \[0, 5, 3, 8\]"),
        ([1, 8], 8, "must start at 0"),
        ([0, 9], 9, "end at most at 8"),
        ([0, 8], 7, "max_seqlen is 7, but the longest segment has 8 rows"),
    ],
)
def test_bad_segments_on_the_cpu(cu, max_seqlen, words):
    with use_backend("auto"), pytest.raises(ValueError, match=words):
        attention_varlen(torch.zeros(8, 3, 1, 16), torch.tensor(cu, dtype=torch.int32), max_seqlen)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_seqlen_k": None}, "must be given together"),
        ({"window": 3}, "window needs the queries' own segments"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 8], dtype=torch.int32)}, "as many segments as cu_seqlens_q, 1; got 2"),
        ({"cu_seqlens_k": None, "max_seqlen_k": None, "k": torch.zeros(9, 1, 16)}, "k must have q's rows, 8"),
    ],
)
def test_bad_segments_of_separate_tensors(changes, words):
    cu = torch.tensor([0, 8], dtype=torch.int32)
    x = torch.zeros(8, 1, 16)
    arguments = {"q": x, "k": x, "cu_seqlens_q": cu, "max_seqlen_q": 8, "cu_seqlens_k": cu, "max_seqlen_k": 8} | changes
    with use_backend("auto"), pytest.raises(ValueError, match=words):
        attention_varlen_separate(v=arguments["k"], **arguments)
