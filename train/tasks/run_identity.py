"""OUT/run.json of a fine-tuning run: its settings, and what must not change when it is continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ...model.atomic import replace_file
from ...model.hf.encoders import EncoderFolder
from ..corpus.format import file_sha256
from ..environment import commit, processor, source_sha256, versions
from ..errors import UserError
from ..run.manifest import FILE, PACKAGES, settings_json
from ..run.resume import check_identity
from ..run.strict_json import strict_json
from .settings import FinetuneSettings

# Options that may differ when a run is continued.
FREE = {"out", "resume", "seeds", "device", "threads", "tensorboard", "graph", "model", "train", "dev", "test"}

# A run that an older version began lacks the options that are newer. It had their defaults.
DEFAULTS: dict[str, Any] = {
    f"--{field.name.replace('_', '-')}": field.default
    for field in dataclasses.fields(FinetuneSettings)
    if field.default is not dataclasses.MISSING
}


def identity_of(settings: FinetuneSettings, folder: EncoderFolder) -> dict[str, Any]:
    """What must not change when a run is continued, by the name of the option."""
    files = [path for path in sorted(folder.directory.iterdir()) if path.suffix in (".json", ".safetensors", ".txt")]
    options = {name: value for name, value in settings_json(settings).items() if name not in FREE}
    return {
        "--model": {path.name: file_sha256(path) for path in files if path.is_file()},
        "--train": [_sha256(path) for path in settings.train],
        "--dev": _sha256(settings.dev),
        **{f"--{name.replace('_', '-')}": value for name, value in options.items()},
    }


def _sha256(path: str) -> str | None:
    return file_sha256(Path(path)) if Path(path).is_file() else None  # `read_rows` names what is missing


def check_place(settings: FinetuneSettings, identity: dict[str, Any]) -> None:
    """Raises UserError if the folder has another run, or this run and no ``--resume``."""
    path = settings.out / FILE
    if not path.is_file():
        if any(settings.out.glob("checkpoints/step-*")):
            raise UserError(f"{settings.out} is the folder of another run: give another --out")
        return
    if not settings.resume:
        raise UserError(f"{settings.out} already holds a run: give --resume to continue it, or another --out")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved = content["identity"]
        if "--task" not in saved:
            raise UserError(f"{settings.out} is the folder of another run: give another --out")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): give another --out") from error
    check_identity(DEFAULTS | saved, json.loads(strict_json(identity)), settings.out)


def write_run_json(settings: FinetuneSettings, identity: dict[str, Any], command: str, device: str) -> None:
    """Writes run.json.

    Args:
        command: that continues the run.
        device: in words.
    """
    content = {
        "version": 1,
        "command": command,
        "settings": settings_json(settings),
        "identity": identity,
        "device": device,
        "versions": versions((*PACKAGES, "scikit-learn")),
        "commit": commit(),
        "source_sha256": source_sha256(),
        "processor": processor(),
    }
    with replace_file(settings.out / FILE) as partial:
        partial.write_text(strict_json(content, indent=1) + "\n", encoding="utf-8")
