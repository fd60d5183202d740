"""JSON without NaN and Infinity, which other programs cannot read: they become null."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(content: Any, indent: int | None = None) -> str:
    """``content`` as JSON text; numbers that are not finite become null."""
    return json.dumps(_finite(content), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
