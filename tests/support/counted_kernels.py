"""Triton kernels with known counts, compiled for the architecture named; prints the counts as JSON."""

import json
import sys

import torch
import triton
import triton.language as tl

from fusebert.bench.compiled.aot import Launch, compiled_kernels
from fusebert.bench.compiled.emulate import Unknown, loop_trips
from fusebert.bench.compiled.launches import work


@triton.jit
def multiply_adds(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = x
    for _ in range(n):
        y = y * x + 1.0
    tl.store(y_ptr + offsets, y)


@triton.jit
def sum_of_exponentials(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.exp2(tl.load(x_ptr + row * n + offsets, mask=offsets < n, other=0.0))
    tl.store(y_ptr + row * BLOCK + tl.arange(0, BLOCK), total)


@triton.jit
def product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def sum_of_segments(x_ptr, cu_seqlens_ptr, y_ptr, parts, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    begin = tl.load(cu_seqlens_ptr + tl.program_id(0))
    end = tl.load(cu_seqlens_ptr + tl.program_id(0) + 1)
    if begin == end:
        return
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(begin, end):
        for part in range(0, parts):
            total += tl.load(x_ptr + (row * parts + part) * BLOCK + columns)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + columns, total)


@triton.jit
def depends_on_data(x_ptr, y_ptr):
    if tl.load(x_ptr) > 0:
        tl.store(y_ptr, 1.0)


def calls():
    """Launches, each preceded by its name and the number of programs to sample."""
    x, y = torch.empty(1024), torch.empty(1024)
    yield "multiply_adds 7", 1, lambda: multiply_adds[(1,)](x, y, 7, BLOCK=1024, num_warps=4)
    yield "multiply_adds 32", 1, lambda: multiply_adds[(1,)](x, y, 32, BLOCK=1024, num_warps=4)
    rows = torch.empty(3, 1056)
    yield "exponentials", 1, lambda: sum_of_exponentials[(3,)](rows, y, 1056, BLOCK=256, num_warps=4)
    for m, n, k in ((64, 64, 256), (16, 32, 512), (128, 128, 256)):
        a, b = torch.empty(m, k, dtype=torch.bfloat16), torch.empty(k, n, dtype=torch.bfloat16)
        c = torch.empty(m, n)
        yield (
            f"product {m} {n} {k}",
            1,
            lambda a=a, b=b, c=c, m=m, n=n, k=k: product[(1,)](a, b, c, k, M=m, N=n, BLOCK_K=64, num_warps=4),
        )
    bounds = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    values, sums = torch.empty(5, 6, 128), torch.empty(3, 128)
    yield "segments", 3, lambda: sum_of_segments[(3,)](values, bounds, sums, 6, BLOCK=128, num_warps=2)
    yield "data", 1, lambda: depends_on_data[(1,)](x, y)


def matrix_instructions(counts):
    return {x.words[0] for x, n in zip(counts.code, counts.executed, strict=True) if n and x.pipe == "tensor"}


def main() -> None:
    launched: list[Launch] = []
    found = {}
    with compiled_kernels(int(sys.argv[1]), launched.append):
        for name, sample, call in calls():
            call()
            try:
                counted = work(launched[-1], sample)
            except Unknown as error:
                found[name] = str(error)
                continue
            found[name] = [
                {
                    "matrix": sorted(matrix_instructions(counts)),
                    "issued": sum(counts.executed),
                    "multiply-adds": counts.total(lambda x: {"FFMA": 1, "FFMA2": 2}.get(x.words[0], 0)),
                    "MUFU": counts.total(lambda x: x.opcode == "MUFU.EX2"),
                    "flops": counts.flops,
                    "bytes": {f"{tensor} {written}": 32 * n for (tensor, written), n in counts.sectors.items()},
                    "trips": list(loop_trips(counts).values()),
                }
                for counts in counted.sampled
            ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
