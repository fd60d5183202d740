"""A model folder opened for a task, on its device, in its precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...model.hf.encoders import EncoderFolder, load_weights, open_encoder
from ..errors import UserError
from ..run.plan import choose_device
from ..step.distributed import Ranks
from ..step.finite import blown_up
from ..step.precision import COMPUTE_DTYPES, PRECISIONS, check_precision, default_precision, set_float32_products
from .settings import ModelSettings

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}  # without a backward, larger batches are hardly faster
TASK_PRECISIONS = ("auto", *(name for name in PRECISIONS if name != "fp8"))  # fp8 is for pretraining


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where and how a task runs.

    Attributes:
        device: the CPU or a GPU.
        precision: one of `precision.PRECISIONS`.
        compute_dtype: dtype of the matrix products.
        tokens_per_batch: the most tokens of a batch; a longer text is a batch of its own.
    """

    device: torch.device
    precision: str
    compute_dtype: torch.dtype
    tokens_per_batch: int


def choose_machine(settings: ModelSettings) -> Machine:
    """Checks the options about the machine and chooses what they leave open.

    Raises:
        UserError: an option is not allowed here.
    """
    for name in ("tokens_per_batch", "threads"):
        value = getattr(settings, name)
        if value is not None and not 0 < value <= 1 << 20:
            raise UserError(f"--{name.replace('_', '-')} must be from 1 to {1 << 20}; got {value}")
    device = choose_device(settings.device, Ranks())
    if settings.precision not in TASK_PRECISIONS:
        raise UserError(
            f"--precision {settings.precision!r} is not known here: choose one of {', '.join(TASK_PRECISIONS)}"
        )
    precision = default_precision(device) if settings.precision == "auto" else settings.precision
    check_precision(precision, device)
    set_float32_products(precision)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    tokens = settings.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    return Machine(device, precision, COMPUTE_DTYPES[precision], tokens)


def load(model: nn.Module, folder: EncoderFolder, *, needs: tuple[str, ...] = ()) -> list[str]:
    """Loads the folder's weights into ``model``; returns what to tell the user about those that do not fit.

    Args:
        needs: our names of parts without which the task makes no sense, such as "mlm_dense".

    Raises:
        UserError: such a part is not in the folder, or a weight is not finite.
    """
    loading = load_weights(model, folder)
    names = folder.family.names(folder.config.num_hidden_layers)
    for part in needs:
        theirs = [name for ours, each in names.items() if ours.startswith(part) for name in each]
        if not theirs or any(name in loading.missing for name in theirs):
            raise UserError(
                f"{folder.directory} has no {' or '.join(theirs) or part}: this task needs a model with that head"
            )
    bad = blown_up(dict(model.named_parameters()))
    if bad is not None:
        raise UserError(f"{folder.directory}: {bad} is not finite, or too large to compute with: give another model")
    return str(loading).splitlines()


def sentence_settings(directory: Path) -> dict[str, Any] | None:
    """{"pooling": …, "normalize": …} of a sentence-transformers folder; None for another folder.

    Raises:
        UserError: the folder does what `SentenceEncoder` cannot: another module, or several poolings.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
        pooling = json.loads((directory / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): give --pooling and --normalize or --no-normalize") from error
    known = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        **{f"pooling_mode={mode}": mode for mode in ("mean", "cls", "max")},
    }
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value]
    if isinstance(pooling.get("pooling_mode"), str):
        modes.append(f"pooling_mode={pooling['pooling_mode']}")
    extra = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if extra or len(modes) != 1 or modes[0] not in known:
        what = f"a module {', '.join(sorted(extra))}" if extra else f"the pooling {', '.join(modes) or 'none'}"
        raise UserError(
            f"{directory} has {what}, which fusebert does not compute: give --pooling and --normalize or "
            "--no-normalize to embed without it"
        )
    return {"pooling": known[modes[0]], "normalize": "Normalize" in kinds}


def open_folder(directory: Path) -> EncoderFolder:
    """`open_encoder`, with a hint for a run's folder.

    Raises:
        UserError: ``directory`` is a run, not the model in it.
        ValueError: see `open_encoder`.
    """
    if not (directory / "config.json").exists() and (directory / "hf" / "config.json").is_file():
        raise UserError(f"{directory} is a run's folder: give the model in it, --model {directory / 'hf'}")
    return open_encoder(directory)
