"""Which checkpoint a run continues from, and which settings may change."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...model.config import BertConfig
from ..batches.shape import BatchShape
from ..corpus.reader import Corpus
from ..errors import UserError
from ..step.distributed import Ranks
from ..step.optim import learning_rate
from .checkpoint import CheckpointError, TrainerState, clean_up, list_checkpoints, newest_good
from .manifest import FILE, OF_A_SESSION, read_manifest, settings_json
from .phases import common_divisor, phases, step_sizes
from .plan import Plan
from .settings import PretrainSettings


def find_checkpoint(root: Path, settings: PretrainSettings) -> tuple[Path, TrainerState] | None:
    """The newest undamaged checkpoint in ``root`` and its state; None if there is none. Says which ones it passed over.

    Raises:
        UserError: there is a checkpoint but no ``--resume``, or all checkpoints are damaged.
    """
    clean_up(root)
    found = list_checkpoints(root)
    if not found:
        return None
    if not settings.resume:
        raise UserError(
            f"{settings.out} already holds a run ({found[0].name}): give --resume to continue it, or another --out"
        )
    good = newest_good(root, _check_progress)
    if good is None:
        raise UserError(f"all checkpoints in {root} are damaged: remove that folder, or give another --out")
    return good


def _check_progress(path: Path, state: TrainerState) -> None:
    """Raises CheckpointError unless the counts of a checkpoint agree with each other."""
    tokens, batch = state.identity.get("--tokens-per-batch"), state.identity.get("--batch-tokens")
    fits = False
    if isinstance(tokens, int) and tokens > 0:
        try:
            sizes = [phase.size for phase in step_sizes(str(batch))]
            fits = not any(size % tokens for size in sizes) and _fits([size // tokens for size in sizes], state)
            fits = fits and len(state.phases) < len(phases(state.identity.get("--seqlen", 128)))
        except UserError:
            fits = False
    if not fits:
        raise CheckpointError(f"{path / 'trainer.json'} is damaged: its steps and batches do not fit together")


def _fits(windows: list[int], state: TrainerState) -> bool:
    """Whether the counts of ``state`` are those of steps with ``windows`` micro-batches, one number for each phase."""
    common = math.gcd(*windows)
    if len(state.step_sizes) >= len(windows) or common % state.lanes or any(each % common for each in state.phases):
        return False
    bounds = itertools.pairwise([0, *state.step_sizes, state.step])
    return state.batches == sum((end - begin) * window for (begin, end), window in zip(bounds, windows, strict=False))


def keep_batch_sizes(settings: PretrainSettings, state: TrainerState, ranks: Ranks) -> PretrainSettings:
    """``settings`` with the batch sizes of the continued run in place of the defaults, which depend on the ranks.

    Raises:
        UserError: the number of processes does not divide the micro-batches of a step.
    """
    tokens, batch = state.identity["--tokens-per-batch"], state.identity["--batch-tokens"]
    common = common_divisor(batch) // tokens
    if settings.batch_tokens in (None, batch) and common % ranks.world_size:
        raise UserError(
            f"the run in {settings.out} has {common} micro-batches of {tokens} tokens in a step: continue it "
            f"with a number of processes that divides {common}; there are {ranks.world_size}"
        )
    return dataclasses.replace(
        settings,
        tokens_per_batch=settings.tokens_per_batch or tokens,
        batch_tokens=settings.batch_tokens or batch,
    )


def run_identity(
    settings: PretrainSettings, plan: Plan, corpus: Corpus, config: BertConfig, shapes: Sequence[BatchShape]
) -> dict[str, Any]:
    """What must not change when a run is continued: model, corpus and batches, by the name of the option.

    Args:
        shapes: of the batches of each phase.
    """
    model = {k: v for k, v in dataclasses.asdict(config).items() if not k.endswith("dropout_prob")}
    splits = json.dumps(corpus.manifest["splits"], sort_keys=True).encode()
    return {
        "--model": model,
        "--data (tokenizer)": corpus.manifest["tokenizer"]["sha256"],
        "--data": hashlib.sha256(splits).hexdigest(),
        "--seqlen": settings.seqlen,
        "--tokens-per-batch": plan.tokens_per_batch,
        "--batch-tokens": plan.batch_tokens,
        "--seed": settings.seed,
        "--optimizer": settings.optimizer,
        "--nsp": settings.nsp,
        "--sop": settings.sop or None,  # None, as in checkpoints from before the option
        "--ema": settings.ema,
        "--whole-word": settings.whole_word,
        "--mlm-probability": settings.mlm_probability,
        "batch shape": dataclasses.asdict(shapes[0]),
        **{f"batch shape {number}": dataclasses.asdict(each) for number, each in enumerate(shapes[1:], 2)},
    }


def check_identity(saved: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Compares two results of `run_identity`.

    Raises:
        UserError: they differ. The message names the option and both values.
    """
    for name, value in now.items():
        before = saved.get(name)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            parts = [key for key in value if before.get(key) != value[key]]
            detail = ", ".join(f"{key} {before.get(key)} there, {value[key]} here" for key in parts)
        else:
            detail = f"{before} there, {value} here"
        raise UserError(
            f"the run in {out} cannot be continued with another {name} ({detail}): give the value that it was started "
            "with, or another --out"
        )


def describe_changes(state: TrainerState, chosen: PretrainSettings) -> list[str]:
    """How a continued run differs from its earlier sessions, a sentence each.

    Args:
        state: of the checkpoint that the run continues from.
        chosen: the options of this session, with the values that the run chose.
    """
    if chosen.steps is not None and state.step > chosen.steps:
        past = [f"the run has done {state.step:,} steps, more than --steps {chosen.steps:,}: nothing is left to train"]
    else:
        past = []
    if not (chosen.out / FILE).is_file():
        return [*past, f"{chosen.out} has no {FILE}: options that are not given again have their defaults"]
    before = read_manifest(chosen.out)["sessions"][-1]["settings"]
    now = settings_json(chosen)
    changed = [name for name in now if name not in OF_A_SESSION and name in before and before[name] != now[name]]
    if not changed:
        return past
    words = ", ".join(f"--{name.replace('_', '-')} {now[name]} (before: {before[name]})" for name in changed)
    sentences = [*past, f"other options than before: {words}"]
    if {"steps", "minutes", "lr", "warmup", "schedule"} & set(changed):
        old, new = (_rate(state, each) for each in (before, now))
        sentences.append(f"the learning rate goes on at {new:.3g}; with the options from before it would be {old:.3g}")
    return sentences


def _rate(state: TrainerState, settings: dict[str, Any]) -> float:
    if settings["steps"] is not None:
        progress = (state.step + 0.5) / settings["steps"]
    else:
        progress = state.elapsed_s / (60.0 * settings["minutes"])
    return learning_rate(settings["lr"], progress, settings["warmup"], settings.get("schedule", "linear"))
