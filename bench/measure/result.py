"""Result files: JSON, written whole or not at all, read only where this version knows what the fields mean."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...train.errors import UserError

SCHEMA = 1  # of the result files; raise it when a field changes its meaning


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` to ``path``, replacing it in one step, so that a run cut short leaves its last whole state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _kind(result: Any) -> str | None:
    """What a file says it is; two of the first kinds say it by their fields alone."""
    if not isinstance(result, dict):
        return None
    for kind, fields in (("aot", ("about", "kernels")), ("campaign", ("stages", "seconds"))):
        if "kind" not in result and all(name in result for name in fields):
            return kind
    return result.get("kind")


def read_result(path: Path, kinds: Collection[str]) -> dict[str, Any]:
    """The result in ``path``, with its "kind" filled in.

    Args:
        kinds: those that the caller can use.

    Raises:
        UserError: there is no such file, it is no result file, of another kind, or of another version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a file that fusebert bench ... --out wrote") from error
    except ValueError as error:  # not UTF-8, not JSON
        raise UserError(f"{path}: not JSON ({error}); give a file that fusebert bench ... --out wrote") from error
    kind = _kind(result)
    if kind is None:
        raise UserError(f"{path}: not a result file; give one that fusebert bench ... --out wrote")
    if kind not in kinds:
        raise UserError(f"{path}: holds a result of kind {kind!r}; this takes {', '.join(sorted(kinds))}")
    schema = result.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise UserError(
            f"{path}: written as version {schema!r} of the result files; this fusebert reads version {SCHEMA}"
        )
    return {**result, "kind": kind}


__all__ = ["SCHEMA", "read_result", "write_json"]
