"""Philox against the published vectors, the kernel's mask against PyTorch's, and the seeds an operator accepts."""

from __future__ import annotations

import pytest
import torch
from oracle import DEVICE

from fusebert.kernels import attention_dropout_mask, dropout_mask
from fusebert.kernels.attn.dropout_tile import keep_tile, keep_tile_transposed
from fusebert.kernels.backend import tl, triton
from fusebert.kernels.dropout import dropout_keep, keep_threshold, philox_words, resolve_seed


@triton.jit
def _write_rows(mask_ptr, seed_ptr, p_threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = dropout_keep(tl.load(seed_ptr), p_threshold, rows, BLOCK_M, BLOCK_N)
    tl.store(mask_ptr + rows[:, None] * BLOCK_N + columns[None, :], keep.to(tl.int8))


@triton.jit
def _write_tile(
    tile_ptr, transposed_ptr, seed_ptr, p_threshold, start_m, start_n, plane,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n, seed = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.load(seed_ptr)
    keep = keep_tile(seed, p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)
    tl.store(tile_ptr + m[:, None] * BLOCK_N + n[None, :], keep.to(tl.int8))
    keep = keep_tile_transposed(seed, p_threshold, start_m, start_n, plane, BLOCK_M, BLOCK_N)
    tl.store(transposed_ptr + n[:, None] * BLOCK_M + m[None, :], keep.to(tl.int8))


def counter(word: int) -> torch.Tensor:
    return torch.tensor([word])


def words(seed: int, c0: int, c1: int, c2: int) -> list[int]:
    return philox_words(seed, counter(c0), counter(c1), counter(c2)).flatten().tolist()


def test_known_answer() -> None:
    """philox4x32-7 of counter 0, key 0, in the kat_vectors of Random123 (Salmon et al. 2011)."""
    assert words(0, 0, 0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def philox_by_hand(key: tuple[int, int], c: tuple[int, int, int, int], rounds: int = 7) -> list[int]:
    """The paper's rounds on Python's unbounded integers."""
    c0, c1, c2, c3 = c
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 - 1, -1, -(2**63)])
def test_words_for_any_seed_and_counter(seed: int) -> None:
    ones = 2**32 - 1  # kat_vectors, ten rounds
    assert philox_by_hand((ones, ones), (ones,) * 4, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    key = seed % 2**64 % 2**32, seed % 2**64 >> 32
    for c in ((0, 0, 0), (1, 2, 3), (2**31, 2**32 - 1, 2**32 - 1)):
        assert words(seed, *c) == philox_by_hand(key, (*c, 0))


def kept_by_hand(p: float, seed: int, c: tuple[int, int, int], draw: int) -> bool:
    word = philox_by_hand((seed % 2**32, seed % 2**64 >> 32), (*c, 0))[draw // 2]
    return (word >> 16 if draw % 2 else word % 2**16) >= round(p * 2**16)


def test_masks_are_the_documented_draws() -> None:
    p, seed, plane = 0.3, 2**40 + 7, 2
    by_row, by_tile = dropout_mask(p, seed, 40, 50), attention_dropout_mask(p, seed, 40, 50, plane + 1)[plane]
    for i in range(40):
        for j in range(50):
            assert by_row[i, j] == kept_by_hand(p, seed, (j // 8, i, 0), j % 8)
            counter = (j // 16 * 4 + j % 8 // 2, i // 16 * 8 + i % 8, plane)
            assert by_tile[i, j] == kept_by_hand(p, seed, counter, 4 * (i >> 3 & 1) + 2 * (j >> 3 & 1) + j % 2)


SEEDS = pytest.mark.parametrize("seed", [0, 123456789, 2**40 + 3, -7])
PROBABILITIES = pytest.mark.parametrize("p", [0.1, 0.5, 0.9])  # 0.5 and more is a threshold beyond int32


@SEEDS
@PROBABILITIES
def test_row_kernels_draw_dropout_mask(p: float, seed: int) -> None:
    block_m, block_n = 4, 32
    mask = torch.empty(2 * block_m, block_n, dtype=torch.int8, device=DEVICE)
    _write_rows[(2,)](mask, resolve_seed(seed, mask.device), keep_threshold(p), BLOCK_M=block_m, BLOCK_N=block_n)
    assert torch.equal(mask.bool(), dropout_mask(p, seed, 2 * block_m, block_n, DEVICE))


@SEEDS
@PROBABILITIES
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (64, 32), (32, 64)])
def test_tiles_draw_attention_dropout_mask(p: float, seed: int, block_m: int, block_n: int) -> None:
    start_m, start_n, plane = 48, 16, 5
    tile = torch.empty(block_m, block_n, dtype=torch.int8, device=DEVICE)
    transposed = torch.empty(block_n, block_m, dtype=torch.int8, device=DEVICE)
    arguments = resolve_seed(seed, tile.device), keep_threshold(p), start_m, start_n, plane
    _write_tile[(1,)](tile, transposed, *arguments, BLOCK_M=block_m, BLOCK_N=block_n)
    whole = attention_dropout_mask(p, seed, start_m + block_m, start_n + block_n, plane + 1, DEVICE)
    expected = whole[plane, start_m:, start_n:]
    assert torch.equal(tile.bool(), expected)
    assert torch.equal(transposed.bool().T, expected)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_keep_rate(p: float) -> None:
    """Over 400,000 elements, within 5 standard deviations of 1 − p; neighbours are independent along every axis."""
    for mask in (dropout_mask(p, 3, 400, 1000), attention_dropout_mask(p, 3, 200, 200, 10)):
        assert abs(mask.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / mask.numel()) ** 0.5
        if p == 0.5:
            for axis in range(mask.dim()):
                for shift in (1, 2, 4, 8, 16):  # within one Philox call, and beyond it
                    rest = mask.shape[axis] - shift
                    if rest > 0:
                        agree = mask.narrow(axis, shift, rest) == mask.narrow(axis, 0, rest)
                        assert abs(agree.double().mean().item() - 0.5) < 5 * 0.5 / agree.numel() ** 0.5


def test_mask_is_a_function_of_position() -> None:
    """A smaller mask is a corner of a larger one, whatever the tiles and the grid."""
    large, small = attention_dropout_mask(0.3, 9, 50, 67, 3), attention_dropout_mask(0.3, 9, 20, 5, 2)
    assert torch.equal(large[:2, :20, :5], small)
    assert torch.equal(dropout_mask(0.3, 9, 50, 67)[:20, :5], dropout_mask(0.3, 9, 20, 5))
    for draw in (dropout_mask, attention_dropout_mask):
        assert torch.equal(draw(0.3, torch.tensor([9]), 20, 5), draw(0.3, 9, 20, 5))
        assert not torch.equal(draw(0.3, 10, 20, 5), draw(0.3, 9, 20, 5))
    assert dropout_mask(0.3, 9, 0, 5).shape == (0, 5)
    assert attention_dropout_mask(0.3, 9, 0, 5).shape == (1, 0, 5)


def test_threshold() -> None:
    for p in (-0.1, 1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"p, the dropout probability, must be in \[0, 1\)"):
            keep_threshold(p)
    assert [keep_threshold(p) for p in (0.0, 0.5, 0.25)] == [0, 2**31, 2**30]
    assert keep_threshold(2**-17 * 0.99) == 0  # met to within 2⁻¹⁷
    assert keep_threshold(1 - 1e-9) == (2**16 - 1) << 16


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
