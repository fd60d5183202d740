"""Which tile a program of the long route works on: a padded grid, or a schedule where that would be mostly empty.

The padded grid gives every segment as many tiles as the longest could have, and a program whose tile does not exist
ends at once. A schedule lists the tiles that exist, longest segments first so that none is left alone at the end:

    padded grid    (S + 1) · ⌈max_seqlen / BLOCK⌉ · H programs
    schedule       (S + 1 + ⌊T / BLOCK⌋) · H          at least Σ ⌈n_s / BLOCK⌉ · H, whatever the n_s: no host reads them

64 segments of 100 … 8192 rows, most of them short, 100,000 rows in all, BLOCK = 128: 4160 tiles a head or 846, of which
at most 64 are empty. Equal lengths gain nothing; nor do the 512 tokens of BERT, four tiles. So a call is scheduled
where that at least halves its grid, which pays for the launch it takes: 8 bytes a tile, read from cu_seqlens alone.
It is made in each call rather than once a batch: it depends on BLOCK, which differs between kernels and head sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import tl, triton
from .tile import segment_bounds

BLOCK_S = 64


@triton.jit
def _tiles(cu_seqlens_ptr, segments, num_segments, num_rows, BLOCK: tl.constexpr):
    """(rows, tiles) of segments; the rows behind the last are segment S, of no length, in one tile."""
    real = segments < num_segments
    origin = tl.load(cu_seqlens_ptr + segments, mask=real, other=0)
    end = tl.load(cu_seqlens_ptr + segments + 1, mask=real, other=0)
    rows = tl.minimum(end, num_rows) - tl.minimum(tl.maximum(origin, 0), num_rows)
    rows = tl.maximum(rows, 0)
    return rows, tl.where(segments == num_segments, 1, tl.cdiv(rows, BLOCK))


@triton.jit
def schedule_tiles(
    cu_seqlens_ptr,  # [S + 1] int32
    slots_ptr,  # [2, num_slots] int32: a tile's segment, and its segment's first slot; segment −1: no tile
    num_segments,
    num_rows,
    num_slots,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program places BLOCK_S segments: each counts the tiles that come before its own, so nobody waits or sorts."""
    mine = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows, tiles = _tiles(cu_seqlens_ptr, mine, num_segments, num_rows, BLOCK)
    first = tl.zeros((BLOCK_S,), dtype=tl.int32)
    total = 0
    for start in range(0, num_segments + 1, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)
        other_rows, other_tiles = _tiles(cu_seqlens_ptr, others, num_segments, num_rows, BLOCK)
        longer = other_rows[None, :] > rows[:, None]
        before = longer | ((other_rows[None, :] == rows[:, None]) & (others[None, :] < mine[:, None]))
        first += tl.sum(tl.where(before, other_tiles[None, :], 0), axis=1)
        total += tl.sum(other_tiles, axis=0)
    for tile in range(0, tl.max(tiles, axis=0)):
        # cu_seqlens that overlap, an error, may ask for more tiles than there are slots.
        inside = (tile < tiles) & (first + tile < num_slots)
        tl.store(slots_ptr + first + tile, mine, mask=inside)
        tl.store(slots_ptr + num_slots + first + tile, first, mask=inside)
    if tl.program_id(0) == 0:
        for start in range(total, num_slots, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)
            tl.store(slots_ptr + slot, -1, mask=slot < num_slots)


@triton.jit
def locate(
    slots_ptr,
    num_tiles,
    cu_seqlens_ptr,
    num_segments,
    num_heads,
    num_rows,
    BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
    SCHEDULED: tl.constexpr,
):
    """(segment, head, first row of the tile) of this program; a start beyond the segment: nothing to do.

    num_tiles: slots of the schedule, or tiles the padded grid gives each segment. Either way the tiles of one head run
    side by side, so that what they share is read from L2.
    """
    if SCHEDULED:
        slot = tl.program_id(0) // num_heads
        owner = tl.load(slots_ptr + slot)
        segment = tl.where(owner < 0, num_segments, owner)
        rows = segment_bounds(cu_seqlens_ptr, tl.minimum(segment, num_segments - 1), num_rows, VARLEN)[1]
        tiles = tl.where(segment == num_segments, 1, tl.maximum(tl.cdiv(rows, BLOCK), 1))
        within = tl.program_id(0) - tl.load(slots_ptr + num_tiles + slot) * num_heads
        head, tile = within // tiles, within % tiles
        return segment, tl.where(owner < 0, 0, head), tl.where(owner < 0, 1, tile) * BLOCK
    else:
        plane = tl.program_id(0) // num_tiles
        return plane // num_heads, plane % num_heads, tl.program_id(0) % num_tiles * BLOCK


def grid(
    cu_seqlens: Tensor | None, num_segments: int, longest: int, num_rows: int, block: int
) -> tuple[int, Tensor | None]:
    """(num_tiles, slots) for `locate`, and so the programs a head: len of slots, or num_tiles a segment.

    slots is None where the padded grid will do. num_segments: packed, one more than there are.
    """
    num_tiles = triton.cdiv(max(longest, 1), block)
    num_slots = num_segments + num_rows // block
    if cu_seqlens is None or 2 * num_slots > num_tiles * num_segments:
        return num_tiles, None
    slots = torch.empty((2, num_slots), dtype=torch.int32, device=cu_seqlens.device)
    schedule_tiles[(triton.cdiv(num_segments, BLOCK_S),)](
        cu_seqlens, slots, num_segments - 1, num_rows, num_slots, BLOCK=block, BLOCK_S=BLOCK_S
    )
    return num_slots, slots


__all__ = ["grid", "locate", "schedule_tiles"]
