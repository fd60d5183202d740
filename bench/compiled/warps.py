"""Instructions that look at a whole warp: votes and reductions of a block's threads, warp by warp."""

from __future__ import annotations

from typing import Any

import numpy as np

from .integers import Value, low, signed, u64
from .sass import WARP


def vote(kind: str, values: Any, active: np.ndarray) -> tuple[Value, Value]:
    """(ballot of each warp's active threads, whether all, any or equal), with an element a thread."""
    rows, used = (np.broadcast_to(x, active.shape).reshape(-1, WARP) for x in (np.asarray(values, bool), active))
    true = rows & used
    ballot = (true.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(axis=1)
    some, every = true.any(axis=1), (rows | ~used).all(axis=1)
    found = {"ANY": some, "ALL": every, "EQ": every | ~some}[kind]
    return np.repeat(ballot, WARP), np.repeat(found, WARP)


def reduce(kind: str, value: Value, active: np.ndarray, is_signed: bool) -> Value:
    """REDUX: over the active threads of each warp; None: there is no such reduction."""
    combine: Any = {
        "MIN": np.minimum,
        "MAX": np.maximum,
        "SUM": np.add,
        "OR": np.bitwise_or,
        "AND": np.bitwise_and,
    }.get(kind)
    if combine is None or value is None:
        return None
    whole = np.broadcast_to(signed(value) if is_signed else u64(value).astype(np.int64), active.shape)
    rows = [
        combine.reduce(row[used]) if used.any() else 0
        for row, used in zip(whole.reshape(-1, WARP), active.reshape(-1, WARP), strict=True)
    ]
    return low(np.repeat(np.array(rows, np.int64), WARP))
