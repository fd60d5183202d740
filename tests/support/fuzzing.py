"""What the tests with random and damaged files share: strategies, and how many examples they draw."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

# `make fuzz` sets it, and then the examples differ from one run to the next.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
few = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)

NUMBERS = st.sampled_from([0, -1, 1, 2**16, 2**31, 2**32, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LINE = st.builds(json.dumps, JSON | st.fixed_dictionaries({"text": JSON})).map(str.encode)
TEXT = st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=200)
DAMAGE = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3)
KEPT = st.just(1.0) | st.floats(0, 1)


def damaged(data: bytes, damage: list[tuple[float, int]], kept: float) -> bytes:
    """``data`` with some bytes replaced, and cut to the share ``kept``."""
    changed = bytearray(data)
    for place, byte in damage:
        if changed:
            changed[int(place * len(changed))] = byte
    return bytes(changed[: round(kept * len(changed))])


def check_message(error: Exception, path: Path) -> None:
    """The message is one line and names the file."""
    assert str(path) in str(error)
    assert "\n" not in str(error)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The way to each value inside a JSON value."""
    inner: Iterator[Any] = iter(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    return [way for key, each in inner for way in [(key,), *((key, *rest) for rest in places(each))]]


def with_change(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """``value`` with ``new`` at the place ``way``."""
    value = copy.deepcopy(value)
    inner = value
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = new
    return value
