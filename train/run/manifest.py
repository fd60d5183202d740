"""out/run.json: everything that is needed to repeat a run.

command             as typed
settings            every option, with the values that the run chose
ranks, threads      training processes, threads of each on a CPU
identity            model, hashes of corpus and tokenizer, batches: `resume.run_identity`
init_from_sha256    of the weights of --init-from
seeds               of the run, and of the held-out batches
versions, commit, source_sha256, device, processor
sessions            {"step", "settings"} of each start of the run
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from ...model.atomic import replace_file
from ..environment import commit, processor, source_sha256, versions
from ..errors import UserError
from .strict_json import strict_json

FILE = "run.json"
FORMAT_VERSION = 1
PACKAGES = ("fusebert", "torch", "triton", "numpy", "tokenizers", "safetensors")
# These may differ between the sessions of a run that can be repeated: they do not change its weights.
WITHOUT_EFFECT = {
    "data",
    "out",
    "resume",
    "reproduce",
    "workers",
    "save_every",
    "log_every",
    "eval_every",
    "keep",
    "keep_best",
    "tensorboard",
}

OF_A_SESSION = {"out", "resume", "reproduce"}  # not options of the run itself


def settings_json(settings: Any) -> dict[str, Any]:
    """The options of a `PretrainSettings` by field name, paths absolute."""
    fields = dataclasses.asdict(settings)
    return {name: os.path.abspath(value) if isinstance(value, Path) else value for name, value in fields.items()}


def write_manifest(out: Path, command: str, settings: Any, step: int, **facts: Any) -> None:
    """Writes the manifest of a run; if it has one, adds the session that starts after ``step``.

    Args:
        settings: `PretrainSettings` with the values that the run chose.
        facts: ranks, threads, identity, init_from_sha256, device.
    """
    session = {"step": step, "settings": settings_json(settings)}
    if step and (out / FILE).is_file():
        content = read_manifest(out)
        content["sessions"] = [each for each in content["sessions"] if each["step"] <= step] + [session]
    else:
        content = {
            "version": FORMAT_VERSION,
            "command": command,
            "settings": session["settings"],
            **facts,
            "seeds": {"run": settings.seed, "held-out": 0},
            "versions": versions(PACKAGES),
            "commit": commit(),
            "source_sha256": source_sha256(),
            "processor": processor(),
            "sessions": [session],
        }
    with replace_file(out / FILE) as partial:
        partial.write_text(strict_json(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a run.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = out / FILE
    if not path.is_file():
        raise UserError(f"{out} has no {FILE}: it is not the folder of a run, or of one of an earlier version")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != FORMAT_VERSION:
            raise UserError(f"{path} has format version {content['version']!r}; this fusebert reads {FORMAT_VERSION}")
        ranks, sessions = content["ranks"], content["sessions"]
        usable = isinstance(ranks, int) and all(isinstance(each["settings"], dict) for each in [content, *sessions])
        usable = usable and bool(sessions) and all(isinstance(each["step"], int) for each in sessions)
        if not usable or "steps" not in content["settings"] or not isinstance(content["identity"], dict):
            raise TypeError("a field has another type")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): it cannot be used") from error
    return content


def options_to_repeat(run: Path) -> dict[str, Any]:
    """The options, by field name, with which ``fusebert pretrain`` repeats ``run``, into a folder beside it.

    Raises:
        UserError: the run cannot be repeated; the message says why.
    """
    content = read_manifest(run)
    if content["settings"]["steps"] is None:
        raise UserError(f"{run} cannot be repeated: with --minutes the learning rate followed the clock")
    if [session["step"] for session in content["sessions"]][:1] != [0]:
        raise UserError(f"{run} cannot be repeated: its manifest does not go back to its first step")
    for session in content["sessions"]:
        changed = [
            name
            for name, value in session["settings"].items()
            if name not in WITHOUT_EFFECT and value != content["settings"].get(name)
        ]
        if changed:
            raise UserError(
                f"{run} cannot be repeated in one go: it was continued after step {session['step']} with another "
                f"--{changed[0].replace('_', '-')}"
            )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != content["ranks"] != content["settings"].get("processes"):
        raise UserError(f"{run} had {content['ranks']} training processes, not {ranks}: start that many with torchrun")
    options = {name: value for name, value in content["settings"].items() if value is not None}
    beside = Path(os.path.abspath(run))
    return {**options, "resume": False, "out": str(beside.with_name(f"{beside.name}-reproduced"))}


def options_to_continue(run: Path) -> dict[str, Any]:
    """The options, by field name, of the last session of ``run``. None if it has no checkpoint to continue from.

    Raises:
        UserError: the manifest is damaged.
    """
    if not any((run / "checkpoints").glob("step-*")) or not (run / FILE).is_file():
        return {}
    options = read_manifest(run)["sessions"][-1]["settings"]
    return {name: value for name, value in options.items() if value is not None and name not in OF_A_SESSION}


def check_repetition(run: Path, identity: dict[str, Any], init_from_sha256: str | None) -> None:
    """Raises UserError unless model, corpus, batches and first weights are those of ``run``."""
    content = read_manifest(run)
    now = {**json.loads(strict_json(identity)), "--init-from": init_from_sha256}
    before = {**content["identity"], "--init-from": content.get("init_from_sha256")}
    differing = [name for name in now if now[name] != before.get(name)]
    if differing:
        raise UserError(
            f"--reproduce {run}: {', '.join(differing)} is not that run's: give the corpus it was made from"
        )


def compare(run: Path, again: Path) -> str:
    """Compares the weights of two runs, and says so in a sentence.

    Raises:
        UserError: they differ, or there is nothing to compare.
    """
    step = max((path.name for path in (again / "checkpoints").glob("step-*")), default="")
    files = [out / "checkpoints" / step / "model.safetensors" for out in (run, again)]
    if not step or not files[0].is_file():
        raise UserError(f"{run} has no checkpoint {step} to compare with")
    if files[0].read_bytes() == files[1].read_bytes():
        return f"{step}: the weights are those of {run}, to the bit"
    then = read_manifest(run)
    now = {**versions(PACKAGES), "processor": processor(), "source_sha256": source_sha256()}
    before = {**then["versions"], "processor": then["processor"], "source_sha256": then["source_sha256"]}
    other = [f"{name} {before.get(name)} then, {value} now" for name, value in now.items() if before.get(name) != value]
    raise UserError(
        f"{step}: the weights differ from those of {run}; "
        + (f"what else differs: {'; '.join(other)}" if other else "the versions and the processor are the same")
    )
