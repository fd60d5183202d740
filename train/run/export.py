"""``fusebert export``: a checkpoint of a run as a Hugging Face folder, without training on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from ..errors import UserError
from ..options import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """The options of ``fusebert export``."""

    checkpoint: Annotated[
        Path,
        Option("A run's folder, for its newest good checkpoint, or one of its checkpoints/step-*.", positional=True),
    ]
    out: Annotated[Path, Option("Folder to write, in Hugging Face's format.")]


def export(settings: ExportSettings) -> tuple[Path, int]:
    """Writes a checkpoint's model and its run's tokenizer to ``settings.out``. The training state stays behind.

    Returns:
        The checkpoint, and its step.

    Raises:
        UserError: there is no good checkpoint at that path, or its run's folder has no tokenizer.
        OSError: for example no space left; the message names the file, and ``out`` is as it was.
    """
    from ...model.hf.save import save_hf
    from ...model.pretraining import BertForPreTraining
    from .checkpoint import weights_to_export
    from .phases import trained_positions

    path, state = _find(settings.checkpoint)
    run = path.resolve().parent.parent
    tokenizer = run / "inputs" / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} is missing: copy the tokenizer.json of the run's corpus there")
    try:
        model = BertForPreTraining(_config(state.identity["--model"], run))
        model.load_state_dict(weights_to_export(path))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is not of a model that this fusebert knows ({str(error).splitlines()[0]})") from error
    positions = trained_positions(state.identity.get("--seqlen", 128), _was_continued(run), model.config)
    save_hf(model, settings.out, tokenizer, model_max_length=positions)
    return path, state.step


def _was_continued(run: Path) -> bool:
    """Whether the run began with the weights of another model, or does not say."""
    from .manifest import FILE, read_manifest

    return not (run / FILE).is_file() or read_manifest(run)["settings"].get("init_from") is not None


def _find(place: Path) -> tuple[Path, Any]:
    """(path, state) of a checkpoint, or of the newest good one of a run."""
    from .checkpoint import list_checkpoints, newest_good, read_state

    if place.name.startswith("step-"):
        return place, read_state(place)
    root = place / "checkpoints"
    if not list_checkpoints(root):
        raise UserError(f"{place} is no run with checkpoints: give runs/NAME or one of its checkpoints/step-*")
    good = newest_good(root)
    if good is None:
        raise UserError(f"all checkpoints in {root} are damaged")
    return good


def _config(fields: dict[str, Any], run: Path) -> Any:
    """The model's configuration. Dropout may change between sessions: it is that of the last."""
    from ...model.config import BertConfig
    from .manifest import FILE, read_manifest

    if (run / FILE).is_file():
        dropout = read_manifest(run)["sessions"][-1]["settings"]["dropout"]
        fields = {**fields, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertConfig(**fields)
