"""Checks the settings of a pretraining run and chooses the values that they leave open, by the device."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...model.config import PRESETS, BertConfig
from ...model.hf.folder import check_settings
from ...model.json_file import read_json
from ..errors import UserError
from ..step.distributed import Ranks
from ..step.optim import OPTIMIZERS, SCHEDULES
from ..step.precision import COMPUTE_DTYPES, PRECISIONS, check_precision, default_precision
from ..step.sharding import PARALLEL
from .phases import Phase, common_divisor, longest, phases, step_sizes
from .settings import RECIPES, PretrainSettings

DEVICES = ("auto", "cpu", "cuda")
# base and large: Devlin et al. 2018. The others are the highest stable rates measured, which suit short runs.
LEARNING_RATES = {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "base": 1e-4, "large": 1e-4}
CPU_MODEL, GPU_MODEL = "tiny", "base"
CPU_TOKENS_PER_BATCH = 2048  # a larger batch is hardly faster on a CPU
# Measured on 2 cores: see docs/scale-out.md.
WIDEST_FOR_PROCESSES, SEGMENTS_PER_PROCESS = 256, 4
GPU_TOKENS_PER_BATCH = 65536  # at most; fewer if the memory is small
GPU_BATCH_TOKENS = 131072  # BERT's 256 sequences of 512 tokens
# Larger values are mistakes, and would fill the memory or start that many threads.
LARGEST = {
    "tokens_per_batch": 1 << 20,  # several batches of the host, and all activations of a batch, are in memory at once
    "workers": 256,
    "threads": 512,
    "processes": 512,
    "layers": 1 << 10,
    "hidden_size": 1 << 14,  # of the LayerNorm kernels
    "heads": 1 << 10,
    "intermediate_size": 1 << 18,
    "max_positions": 1 << 20,
    "seed": (1 << 64) - 1,  # of torch's generators
}
LARGEST_INTEGER = 1 << 62  # of the others
# Options with the sizes of the model, and their names in config.json.
SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The values of a run that `PretrainSettings` may leave open.

    Attributes:
        model: name of a preset; not used with ``init_from``.
        device: of this rank.
        precision: one of `precision.PRECISIONS`.
        compute_dtype: dtype of the matrix products.
        tokens_per_batch: tokens of a micro-batch, T.
        batch_tokens: tokens of an optimisation step on all ranks, or text for `step_sizes`.
        lr: peak learning rate.
        workers: processes that make batches, for each rank.
        log_every: steps between log lines.
    """

    model: str
    device: torch.device
    precision: str
    compute_dtype: torch.dtype
    tokens_per_batch: int
    batch_tokens: int | str
    lr: float
    workers: int
    log_every: int

    @property
    def step_sizes(self) -> tuple[Phase, ...]:
        """The micro-batches of a step on all ranks, in each phase of the run."""
        return tuple(Phase(size // self.tokens_per_batch, end) for size, end in step_sizes(self.batch_tokens))

    @property
    def common_micro_batches(self) -> int:
        """The largest number that divides the micro-batches of every step."""
        return common_divisor(self.batch_tokens) // self.tokens_per_batch


def resolve(settings: PretrainSettings, ranks: Ranks | None = None) -> Plan:
    """Checks ``settings`` and chooses what they leave open.

    On GPUs the default size of a step does not depend on the number of processes; on CPUs it grows with it.

    Args:
        ranks: the training processes; None: this process alone.

    Raises:
        UserError: the value of an option is not allowed, or two options contradict each other.
    """
    _check(settings)
    ranks = ranks or Ranks()
    if settings.processes not in (None, ranks.world_size):
        raise UserError(
            f"--processes {settings.processes}, but there are {ranks.world_size}: only the command `fusebert pretrain` "
            "starts them; under torchrun give --nproc-per-node"
        )
    device = choose_device(settings.device, ranks)
    on_gpu = device.type == "cuda"
    model = settings.model if settings.model != "auto" else GPU_MODEL if on_gpu else CPU_MODEL
    precision = settings.precision if settings.precision != "auto" else default_precision(device)
    check_precision(precision, device)
    compute_dtype = COMPUTE_DTYPES[precision]
    tokens = settings.tokens_per_batch
    if tokens is None:
        tokens = _gpu_tokens(settings, model, compute_dtype, device) if on_gpu else CPU_TOKENS_PER_BATCH
        cpu_tokens = tokens if settings.processes else tokens * ranks.world_size
        given = settings.batch_tokens and common_divisor(settings.batch_tokens)
        wanted = given or (GPU_BATCH_TOKENS if on_gpu else cpu_tokens)
        tokens = max(min(tokens, wanted // ranks.world_size // 8 * 8), -(-longest(settings.seqlen) // 8) * 8)
    if tokens < (seqlen := longest(settings.seqlen)):
        raise UserError(
            f"--tokens-per-batch {tokens} must be at least --seqlen {seqlen}: a segment must fit in a batch"
        )
    if tokens % 8:
        raise UserError(f"--tokens-per-batch must be a multiple of 8, for the matrix units; got {tokens}")
    batch_tokens, at_once = settings.batch_tokens, tokens * ranks.world_size
    if batch_tokens is None:
        batch_tokens = max(1, GPU_BATCH_TOKENS // at_once) * at_once if on_gpu else at_once
    for size, _ in step_sizes(batch_tokens):
        if size % at_once:
            nearest = max(1, round(size / at_once)) * at_once
            each = "" if ranks.alone else f" times {ranks.world_size} processes"
            raise UserError(
                f"--batch-tokens {size} must be a multiple of --tokens-per-batch {tokens}{each}: {nearest} is the "
                "nearest"
            )
    workers = settings.workers
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 2) // ranks.local_world_size - 1)) if on_gpu else 0
    return Plan(
        model=model,
        device=device,
        precision=precision,
        compute_dtype=compute_dtype,
        tokens_per_batch=tokens,
        batch_tokens=batch_tokens,
        lr=settings.lr if settings.lr is not None else _learning_rate(settings, model),
        workers=workers,
        log_every=settings.log_every or (50 if on_gpu else 10),
    )


def with_processes(settings: PretrainSettings) -> PretrainSettings:
    """``settings`` with the number of training processes on this CPU, and the threads of each.

    As they are on GPUs and under torchrun, which starts the processes there. Does not start threads.

    Raises:
        UserError: the value of an option is not allowed.
    """
    _check(settings)
    if dist.is_torchelastic_launched() or choose_device(settings.device, Ranks()).type == "cuda":
        return settings
    if settings.processes is None and settings.threads is not None:
        return dataclasses.replace(settings, processes=1)
    if sys.platform != "linux":
        return settings
    cores = torch.get_num_threads()
    count = settings.processes or _processes_that_pay(settings, cores)
    return dataclasses.replace(settings, processes=count, threads=settings.threads or max(1, cores // count))


def _processes_that_pay(settings: PretrainSettings, cores: int) -> int:
    """As many as share a step evenly, each with SEGMENTS_PER_PROCESS or more; 1 for wide models."""
    tokens = settings.tokens_per_batch
    batch = common_divisor(settings.batch_tokens) if settings.batch_tokens else tokens or CPU_TOKENS_PER_BATCH
    if _hidden_size(settings) > WIDEST_FOR_PROCESSES:
        return 1

    def suits(count: int) -> bool:
        if tokens is not None:
            return batch % (tokens * count) == 0
        return batch % (8 * count) == 0 and batch // count >= SEGMENTS_PER_PROCESS * longest(settings.seqlen)

    return max((count for count in range(1, cores + 1) if suits(count)), default=1)


def _hidden_size(settings: PretrainSettings) -> int:
    if settings.init_from is None:
        return int(sizes(settings, CPU_MODEL if settings.model == "auto" else settings.model)["hidden_size"])
    try:
        return int(json.loads((settings.init_from / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # `from_hf` will say what is wrong with it


def sizes(settings: PretrainSettings, model: str) -> dict[str, Any]:
    """Fields of `BertConfig`: those of the preset ``model`` with the sizes of ``settings``, or those in ``--config``.

    Raises:
        UserError: --config cannot be read, is not of a BERT, or lacks a size.
    """
    if settings.config is not None:
        return _config_file(settings.config)
    preset = BertConfig.preset(model, vocab_size=2)
    fields = {theirs: getattr(preset, theirs) for theirs in SIZES.values()}
    if settings.hidden_size is not None:
        fields["num_attention_heads"] = max(1, settings.hidden_size // 64)
        fields["intermediate_size"] = 4 * settings.hidden_size
    given = {theirs: getattr(settings, ours) for ours, theirs in SIZES.items()}
    return {**fields, **{name: value for name, value in given.items() if value is not None}}


def _config_file(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("model_type", "bert") != "bert":
        raise UserError(f"--config {path} is not the config.json of a BERT: model_type must be 'bert'")
    check_settings(content, f"--config {path}")
    fields = {field.name for field in dataclasses.fields(BertConfig)} - {"vocab_size", "pad_token_id"}
    found = {name: value for name, value in content.items() if name in fields}
    for name in SIZES.values():
        value = found.setdefault(name, 512) if name == "max_position_embeddings" else found.get(name)
        if not isinstance(value, int):
            raise UserError(f"--config {path}: {name} must be a positive integer; got {value!r}")
    return found


def _learning_rate(settings: PretrainSettings, model: str) -> float:
    """That of the preset; of the narrowest preset that is as wide, where sizes are given."""
    if settings.init_from is not None:
        return LEARNING_RATES["base"]
    width = sizes(settings, model)["hidden_size"]
    if width == PRESETS[model][1]:
        return LEARNING_RATES[model]
    return next((LEARNING_RATES[name] for name, (_, hidden, *_) in PRESETS.items() if hidden >= width), 1e-4)


def _check(settings: PretrainSettings) -> None:
    if settings.model not in ("auto", *PRESETS):
        raise UserError(f"--model {settings.model!r} is not known: choose one of auto, {', '.join(PRESETS)}")
    if settings.init_from is not None and settings.model != "auto":
        raise UserError(
            "--model and --init-from contradict each other: config.json in the folder of --init-from defines the model"
        )
    by_hand = [_option(name) for name in SIZES if getattr(settings, name) is not None]
    for name in ("init_from", "config"):
        others = [*by_hand, *(["--config"] if settings.config is not None and name == "init_from" else [])]
        others += ["--model"] if settings.model != "auto" and name == "config" else []
        if getattr(settings, name) is not None and others:
            raise UserError(f"{_option(name)} defines the model: leave out {', '.join(others)}")
    if (settings.steps is None) == (settings.minutes is None):
        given = "neither was given" if settings.steps is None else "both were given"
        raise UserError(f"say how long to train: --steps 100000 or --minutes 5, one of the two; {given}")
    for field in dataclasses.fields(settings):
        value, most = getattr(settings, field.name), LARGEST.get(field.name, LARGEST_INTEGER)
        if isinstance(value, int) and value > most:
            advice = ": give --batch-tokens for a larger step" if field.name == "tokens_per_batch" else ""
            raise UserError(f"{_option(field.name)} must be at most {most}; got {value}{advice}")
    positive = ("steps", "minutes", "tokens_per_batch", "lr", "clip", "muon_scale")
    for name in (
        *positive,
        *SIZES,
        "keep",
        "patience",
        "eval_every",
        "save_every",
        "log_every",
        "threads",
        "processes",
    ):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{_option(name)} must be positive; got {value}")
    for name in ("weight_decay", "workers", "seed", "z_loss"):
        value = getattr(settings, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{_option(name)} must be 0 or more; got {value}")
    for name in ("warmup", "dropout"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"{_option(name)} must be in [0, 1); got {getattr(settings, name)}")
    if settings.ema is not None and not 0.0 < settings.ema < 1.0:
        raise UserError(f"--ema must be between 0 and 1; got {settings.ema}")
    if settings.ema is not None and settings.parallel == "fsdp":
        raise UserError("--ema is not possible with --parallel fsdp: give --parallel ddp")
    if settings.sop and not settings.nsp:
        raise UserError("--sop predicts the order of sentence pairs: leave out --no-nsp")
    if settings.parallel == "fsdp" and (settings.precision == "fp16" or settings.optimizer != "adamw"):
        raise UserError(
            "--parallel fsdp shards every tensor, but --precision fp16, --optimizer lamb and --optimizer muon need "
            "whole ones: give --parallel ddp"
        )
    if not 0.0 < settings.mlm_probability < 1.0:
        raise UserError(f"--mlm-probability must be between 0 and 1; got {settings.mlm_probability}")
    end = settings.mlm_probability_end
    if end is not None and not 0.0 < end <= settings.mlm_probability:
        raise UserError(
            f"--mlm-probability-end must be above 0 and at most --mlm-probability, {settings.mlm_probability}; "
            f"got {end}"
        )
    if end is not None and settings.whole_word:
        raise UserError("--mlm-probability-end unmasks single tokens: leave out --whole-word")
    if settings.cautious_decay and settings.optimizer == "lamb":
        raise UserError("--cautious-decay is not possible with --optimizer lamb: give adamw or muon")
    if settings.batch_tokens is not None:
        step_sizes(settings.batch_tokens)
    if len(phases(settings.seqlen)) > 1 and (settings.keep_best or settings.patience is not None):
        raise UserError(
            "--keep-best and --patience compare evaluations, and those of --seqlen "
            f"{settings.seqlen} are on segments of different lengths: leave them out"
        )
    allowed_words = {
        "recipe": tuple(RECIPES),
        "precision": ("auto", *PRECISIONS),
        "optimizer": OPTIMIZERS,
        "schedule": tuple(SCHEDULES),
        "parallel": PARALLEL,
    }
    for name, allowed in allowed_words.items():
        if getattr(settings, name) not in allowed:
            raise UserError(
                f"{_option(name)} {getattr(settings, name)!r} is not known: choose one of {', '.join(allowed)}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """The device of this process: the CPU, or the GPU with the index ``ranks.local_rank``.

    Args:
        name: "auto", "cpu" or "cuda".

    Raises:
        UserError: there is no such GPU, or ``name`` has another value.
    """
    if name not in DEVICES:
        raise UserError(f"--device {name!r} is not known: choose one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch finds no CUDA GPU here (torch.cuda.is_available() is False): use --device cpu, or "
            "install a PyTorch built for your GPU"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{ranks.local_world_size} processes on this machine, but only {torch.cuda.device_count()} GPUs: give "
            f"torchrun --nproc-per-node={torch.cuda.device_count()}"
        )
    return torch.device("cuda") if ranks.alone else torch.device("cuda", ranks.local_rank)


def _gpu_tokens(settings: PretrainSettings, model: str, compute_dtype: torch.dtype, device: torch.device) -> int:
    """The largest power of two of tokens with activations that fit in half of the GPU's memory, at most
    GPU_TOKENS_PER_BATCH.

    The backward needs 17·H·L scalars a token (Korthikanti et al. 2022, without attention matrices).
    """
    shape = sizes(settings, model)
    bytes_a_token = 17 * shape["hidden_size"] * shape["num_hidden_layers"] * compute_dtype.itemsize
    fits = int(0.5 * torch.cuda.get_device_properties(device).total_memory / bytes_a_token)
    return min(GPU_TOKENS_PER_BATCH, 1 << max(fits.bit_length() - 1, 7))
