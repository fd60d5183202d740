"""Philox against the published vectors, the kernel's mask against PyTorch's, and the seeds an operator accepts."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import dropout_mask
from fusebert.kernels._triton import tl, triton
from fusebert.kernels.dropout import _philox, dropout_keep, keep_threshold, resolve_seed


@triton.jit
def _write_mask(mask_ptr, seed_ptr, p_threshold, first_column, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, first_column, plane, BLOCK_M, BLOCK_N)
    tl.store(mask_ptr + rows[:, None] * BLOCK_N + columns[None, :], keep.to(tl.int8))


def counter(word: int) -> torch.Tensor:
    return torch.tensor([word])


def words(seed: int, c0: int, c1: int, c2: int) -> list[int]:
    return _philox(seed, counter(c0), counter(c1), counter(c2)).flatten().tolist()


def test_known_answer() -> None:
    """philox4x32-10 of counter 0, key 0, in the kat_vectors of Random123 (Salmon et al. 2011)."""
    assert words(0, 0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def philox_by_hand(key: tuple[int, int], c: tuple[int, int, int, int]) -> list[int]:
    """The paper's ten rounds on Python's unbounded integers."""
    c0, c1, c2, c3 = c
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 - 1, -1, -(2**63)])
def test_words_for_any_seed_and_counter(seed: int) -> None:
    assert philox_by_hand((2**32 - 1, 2**32 - 1), (2**32 - 1,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    key = seed % 2**64 % 2**32, seed % 2**64 >> 32
    for c in ((0, 0, 0), (1, 2, 3), (2**31, 2**32 - 1, 2**32 - 1)):
        assert words(seed, *c) == philox_by_hand(key, (*c, 0))


@pytest.mark.parametrize("seed", [0, 123456789, 2**40 + 3, -7])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])  # 0.5 and more is a threshold beyond int32
def test_kernel_mask_is_dropout_mask(p: float, seed: int) -> None:
    block_m, block_n, first_column, plane = 8, 16, 12, 5
    mask = torch.empty(2 * block_m, block_n, dtype=torch.int8, device=DEVICE)
    _write_mask[(2,)](
        mask, resolve_seed(seed, mask.device), keep_threshold(p), first_column, plane, BLOCK_M=block_m, BLOCK_N=block_n
    )
    expected = dropout_mask(p, seed, 2 * block_m, first_column + block_n, plane + 1, device=DEVICE)
    assert torch.equal(mask.bool(), expected[plane, :, first_column:])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_keep_rate(p: float) -> None:
    """Over n = 400,000 elements, within 5 standard deviations of 1 − p; and rows, columns, planes are not alike."""
    mask = dropout_mask(p, 3, 200, 200, 10)
    assert abs(mask.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / mask.numel()) ** 0.5
    if p == 0.5:
        for axis in range(3):
            agreement = (
                (mask.narrow(axis, 1, mask.shape[axis] - 1) == mask.narrow(axis, 0, mask.shape[axis] - 1))
                .double()
                .mean()
            )
            assert abs(agreement.item() - 0.5) < 0.01


def test_mask_is_a_function_of_position() -> None:
    """A smaller mask is a corner of a larger one: tiles and grids do not matter."""
    large, small = dropout_mask(0.3, 9, 50, 67, 3), dropout_mask(0.3, 9, 20, 5, 2)
    assert torch.equal(large[:2, :20, :5], small)
    assert torch.equal(dropout_mask(0.3, torch.tensor([9]), 20, 5, 2), small)
    assert not torch.equal(dropout_mask(0.3, 10, 20, 5, 2), small)
    assert dropout_mask(0.3, 9, 0, 5).shape == (1, 0, 5)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_threshold_refuses(p: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        keep_threshold(p)


def test_threshold() -> None:
    assert [keep_threshold(p) for p in (0.0, 0.5, 0.25)] == [0, 2**31, 2**30]


def test_seed_resolution() -> None:
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    for seed in (5, -(2**63), 2**63 - 1):
        tensor = resolve_seed(seed, device)
        assert (tensor.dtype, tensor.shape, tensor.device, tensor.item()) == (torch.int64, (1,), device, seed)
    given = torch.tensor(5, device=device)
    assert resolve_seed(given, device) is given
    torch.manual_seed(1)
    first, second = resolve_seed(None, device), resolve_seed(None, device)
    torch.manual_seed(1)
    assert first.item() == resolve_seed(None, device).item() != second.item()


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        ("7", TypeError, "int, an int64 tensor or None; got str"),
        (True, TypeError, "got bool"),
        (2**63, ValueError, "64 bits"),
        (torch.tensor([1], dtype=torch.int32), TypeError, "int64 tensor; got torch.int32"),
        (torch.tensor([1, 2]), ValueError, r"one element on cpu; got shape \(2,\)"),
        (torch.tensor([1], device="meta"), ValueError, "one element on cpu"),
    ],
)
def test_seed_refused(seed: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resolve_seed(seed, torch.device("cpu"))  # type: ignore[arg-type]
