"""Which tile a program of the long route computes: a padded grid, or a schedule of the tiles that exist.

The padded grid gives every segment as many tiles as the longest could have; programs without a tile end at once. A
schedule lists the tiles that exist, longest segments first. It is used where it at least halves the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import tl, triton
from .tile import segment_bounds

BLOCK_S = 64  # segments that a program of attn_schedule_tiles places


@triton.jit
def count_tiles(cu_seqlens_ptr, segments, num_segments, num_rows, BLOCK: tl.constexpr):
    """(rows, tiles) of segments, [BLOCK_S] each. Segment num_segments, the rows after the last: 0 rows, 1 tile."""
    real = segments < num_segments  # [BLOCK_S]
    origin = tl.load(cu_seqlens_ptr + segments, mask=real, other=0)  # [BLOCK_S]
    end = tl.load(cu_seqlens_ptr + segments + 1, mask=real, other=0)  # [BLOCK_S]
    # As in segment_bounds: the difference may not wrap.
    rows = tl.minimum(tl.maximum(end, 0), num_rows) - tl.minimum(tl.maximum(origin, 0), num_rows)  # [BLOCK_S]
    rows = tl.maximum(rows, 0)  # [BLOCK_S]
    return rows, tl.where(segments == num_segments, 1, tl.cdiv(rows, BLOCK))


@triton.jit
def attn_schedule_tiles(
    cu_seqlens_ptr,  # [S + 1] int32
    slots_ptr,  # [2, num_slots] int32: a tile's segment (−1: no tile), and the first slot of that segment
    num_segments,
    num_rows,
    num_slots,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program places BLOCK_S segments. It counts the tiles before each of them, so programs need no order."""
    mine = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    rows, tiles = count_tiles(cu_seqlens_ptr, mine, num_segments, num_rows, BLOCK)  # [BLOCK_S], [BLOCK_S]
    first = tl.zeros((BLOCK_S,), dtype=tl.int32)  # [BLOCK_S]
    total = 0
    for start in range(0, num_segments + 1, BLOCK_S):
        others = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        other_rows, other_tiles = count_tiles(cu_seqlens_ptr, others, num_segments, num_rows, BLOCK)  # [BLOCK_S] each
        longer = other_rows[None, :] > rows[:, None]  # [BLOCK_S, BLOCK_S]
        # [BLOCK_S, BLOCK_S]
        before = longer | ((other_rows[None, :] == rows[:, None]) & (others[None, :] < mine[:, None]))
        other_tiles = tl.minimum(other_tiles, num_slots)  # [BLOCK_S]: sums of overlapping segments' tiles could wrap
        first = tl.minimum(first + tl.sum(tl.where(before, other_tiles[None, :], 0), axis=1), num_slots)  # [BLOCK_S]
        total = tl.minimum(total + tl.sum(other_tiles, axis=0), num_slots)
    # Segments that overlap may need more tiles than there are slots.
    tiles = tl.minimum(tiles, num_slots - first)  # [BLOCK_S]
    for tile in range(0, tl.max(tiles, axis=0)):
        inside = tile < tiles  # [BLOCK_S]
        tl.store(slots_ptr + first + tile, mine, mask=inside)
        tl.store(slots_ptr + num_slots + first + tile, first, mask=inside)
    if tl.program_id(0) == 0:
        for start in range(total, num_slots, BLOCK_S):
            slot = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
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
    """(segment, head, first row of the tile) of this program. There is no tile if the row is beyond the segment.

    num_tiles: slots of the schedule, or tiles that the padded grid gives each segment. Either way the tiles of one head
    are adjacent programs, which share the head's other side in L2.
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


def choose_grid(
    cu_seqlens: Tensor | None, num_segments: int, longest: int, num_rows: int, block: int
) -> tuple[int, Tensor | None]:
    """The padded grid, or a schedule where that at least halves the number of programs.

    Args:
        cu_seqlens: int32 [S + 1]; None for padded tensors, which always take the padded grid.
        num_segments: segments with programs: S + 1 where packed, the last for the rows after the last segment.
        longest: rows of the longest segment, an upper bound.
        num_rows: rows of the packed axis.
        block: rows of a tile.

    Returns:
        (num_tiles, slots) for `locate`. slots None: the padded grid, num_tiles programs per segment and head. Otherwise
        slots is int32 [2, num_tiles], and there are num_tiles programs per head.
    """
    num_tiles = triton.cdiv(max(longest, 1), block)
    num_slots = num_segments + num_rows // block
    if cu_seqlens is None or 2 * num_slots > num_tiles * num_segments:
        return num_tiles, None
    slots = torch.empty((2, num_slots), dtype=torch.int32, device=cu_seqlens.device)
    attn_schedule_tiles[(triton.cdiv(num_segments, BLOCK_S),)](
        cu_seqlens, slots, num_segments - 1, num_rows, num_slots, BLOCK=block, BLOCK_S=BLOCK_S, enable_fp_fusion=True
    )
    return num_slots, slots
