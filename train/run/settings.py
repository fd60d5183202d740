"""What a pretraining run was asked to do, and the defaults for what it was not told, chosen for the device."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import torch

from ...model.config import PRESETS, BertConfig
from ..errors import UserError
from ..step.distributed import Ranks
from ..step.optim import OPTIMIZERS
from ..step.precision import COMPUTE_DTYPES, PRECISIONS, check_precision, default_precision
from ..step.sharding import PARALLEL

DEVICES = ("auto", "cpu", "cuda")
# Devlin et al. 2018 for base and large; the small ones by measurement: short runs want the highest rate that is stable.
LEARNING_RATES = {"tiny": 2e-3, "mini": 1e-3, "small": 5e-4, "base": 1e-4, "large": 1e-4}
CPU_MODEL, GPU_MODEL = "tiny", "base"
CPU_TOKENS_PER_BATCH = 2048  # many small steps: on a CPU a bigger batch is hardly faster
GPU_TOKENS_PER_BATCH = 65536  # at most; fewer where the memory is small
GPU_BATCH_TOKENS = 131072  # BERT's 256 sequences of 512 tokens


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The options of `fusebert pretrain`, one for one; None and "auto" are "choose for
    me": `resolve` chooses.

    Attributes:
        data, out: the prepared corpus, and the run's folder.
        model: a preset's name, or "auto".
        init_from: a Hugging Face folder whose weights to start from, in place of a preset.
        steps, minutes: how long to train, one of the two. minutes is wall-clock time of the whole run.
        seqlen: longest segment in tokens, [CLS] and [SEP] included.
        tokens_per_batch: T, tokens of a micro-batch. batch_tokens: tokens of an optimisation step, on all ranks: a
            multiple of T times their number.
        lr: peak learning rate. warmup: share of the run in which it rises.
        weight_decay, clip, dropout: AdamW's decay; bound of the gradient's norm; both dropout probabilities.
        optimizer: "adamw" or "lamb".
        precision: "auto" or one of `precision.PRECISIONS`. device: "auto", "cpu" or "cuda".
        graph: on a GPU, capture the step as CUDA graphs. compile: run the model under torch.compile.
        checkpoint_activations: keep a layer's input alone for the backward.
        seed: of the initialisation, dropout and data order.
        nsp: sentence pairs with next-sentence prediction, or full sentences. whole_word: mask whole words.
        mlm_probability: share of the tokens to predict.
        eval_every, save_every, log_every: steps between evaluations, checkpoints, log lines; left open they are ten
            evaluations in the run, a checkpoint every ten minutes, and a line every 10 steps (50 on a GPU).
        workers: processes that make batches, for each rank; 0 makes them in this one. threads: PyTorch's, on a CPU.
        parallel: "ddp" or "fsdp", where there are several ranks, see `sharding`.
        resume: go on from the newest checkpoint in ``out``, if there is one.
        tensorboard: write TensorBoard files; None writes them when it is installed.
    """

    data: Path
    out: Path
    model: str = "auto"
    init_from: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    seqlen: int = 128
    tokens_per_batch: int | None = None
    batch_tokens: int | None = None
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    optimizer: str = "adamw"
    dropout: float = 0.1
    precision: str = "auto"
    device: str = "auto"
    graph: bool = True
    compile: bool = False
    checkpoint_activations: bool = False
    seed: int = 0
    nsp: bool = True
    whole_word: bool = False
    mlm_probability: float = 0.15
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    workers: int | None = None
    threads: int | None = None
    parallel: str = "ddp"
    resume: bool = False
    tensorboard: bool | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was chosen where `PretrainSettings` left it open.

    Attributes:
        model: a preset's name; with ``init_from`` it is not used.
        device: where this rank runs. precision: one of `precision.PRECISIONS`. compute_dtype: its products' dtype.
        tokens_per_batch: T. accumulation: micro-batches of T tokens in an optimisation step, for each rank.
        batch_tokens: tokens of an optimisation step, on all ranks.
        lr: peak learning rate. workers: processes that make batches. log_every: steps between log lines.
    """

    model: str
    device: torch.device
    precision: str
    compute_dtype: torch.dtype
    tokens_per_batch: int
    accumulation: int
    batch_tokens: int
    lr: float
    workers: int
    log_every: int


def resolve(settings: PretrainSettings, ranks: Ranks | None = None) -> Plan:
    """Checks ``settings`` and chooses what they leave open, for the processes ``ranks``.

    The size of a step does not follow their number on GPUs, where there is work for many in it.

    Raises:
        UserError: an option's value is not allowed, or two contradict each other; the message names the option.
    """
    _check(settings)
    ranks = ranks or Ranks()
    device = choose_device(settings.device, ranks)
    on_gpu = device.type == "cuda"
    model = settings.model if settings.model != "auto" else GPU_MODEL if on_gpu else CPU_MODEL
    precision = settings.precision if settings.precision != "auto" else default_precision(device)
    check_precision(precision, device)
    compute_dtype = COMPUTE_DTYPES[precision]
    tokens = settings.tokens_per_batch
    if tokens is None:
        tokens = _gpu_tokens(model, compute_dtype, device) if on_gpu else CPU_TOKENS_PER_BATCH
        wanted = settings.batch_tokens or (GPU_BATCH_TOKENS if on_gpu else tokens * ranks.world_size)
        tokens = max(min(tokens, wanted // ranks.world_size // 8 * 8), -(-settings.seqlen // 8) * 8)
    if tokens < settings.seqlen:
        raise UserError(
            f"--tokens-per-batch {tokens} must be at least --seqlen {settings.seqlen}: a segment has to fit in a batch"
        )
    if tokens % 8:
        raise UserError(f"--tokens-per-batch must be a multiple of 8, for the matrix units; got {tokens}")
    batch_tokens, at_once = settings.batch_tokens, tokens * ranks.world_size
    if batch_tokens is None:
        batch_tokens = max(1, GPU_BATCH_TOKENS // at_once) * at_once if on_gpu else at_once
    if batch_tokens % at_once:
        nearest = max(1, round(batch_tokens / at_once)) * at_once
        each = "" if ranks.alone else f" times {ranks.world_size} processes"
        raise UserError(
            f"--batch-tokens {batch_tokens} must be a multiple of --tokens-per-batch {tokens}{each}: {nearest} is the "
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
        accumulation=batch_tokens // at_once,
        batch_tokens=batch_tokens,
        lr=settings.lr if settings.lr is not None else LEARNING_RATES["base" if settings.init_from else model],
        workers=workers,
        log_every=settings.log_every or (50 if on_gpu else 10),
    )


def _check(settings: PretrainSettings) -> None:
    if settings.model not in ("auto", *PRESETS):
        raise UserError(f"--model {settings.model!r} is not known: choose one of auto, {', '.join(PRESETS)}")
    if settings.init_from is not None and settings.model != "auto":
        raise UserError(
            "--model and --init-from contradict each other: the folder's config.json says what the model is"
        )
    if (settings.steps is None) == (settings.minutes is None):
        given = "neither was given" if settings.steps is None else "both were given"
        raise UserError(f"say how long to train: --steps 100000 or --minutes 5, one of the two; {given}")
    positive = ("steps", "minutes", "seqlen", "tokens_per_batch", "batch_tokens", "lr", "clip")
    for name in (*positive, "eval_every", "save_every", "log_every", "threads"):
        value = getattr(settings, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"{_option(name)} must be positive; got {value}")
    for name in ("weight_decay", "workers", "seed"):
        value = getattr(settings, name)
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{_option(name)} must be 0 or more; got {value}")
    for name in ("warmup", "dropout"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"{_option(name)} must be in [0, 1); got {getattr(settings, name)}")
    if settings.parallel == "fsdp" and (settings.precision == "fp16" or settings.optimizer == "lamb"):
        raise UserError(
            "--parallel fsdp splits every tensor over the ranks: --precision fp16 and --optimizer lamb, which look at "
            "whole ones, need --parallel ddp"
        )
    if not 0.0 < settings.mlm_probability < 1.0:
        raise UserError(f"--mlm-probability must be between 0 and 1; got {settings.mlm_probability}")
    if settings.seqlen < 8:
        raise UserError(f"--seqlen must be at least 8, room for a pair of sentences; got {settings.seqlen}")
    allowed_words = {"precision": ("auto", *PRECISIONS), "optimizer": OPTIMIZERS, "parallel": PARALLEL}
    for name, allowed in allowed_words.items():
        if getattr(settings, name) not in allowed:
            raise UserError(
                f"{_option(name)} {getattr(settings, name)!r} is not known: choose one of {', '.join(allowed)}"
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def choose_device(name: str, ranks: Ranks) -> torch.device:
    """Where this process runs: on the CPU, or on the GPU that has its number on this machine.

    Raises:
        UserError: there is no such GPU, or ``name`` is not auto, cpu or cuda.
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
            f"{ranks.local_world_size} processes on this machine, which has {torch.cuda.device_count()} GPUs: give "
            f"torchrun --nproc-per-node={torch.cuda.device_count()}"
        )
    return torch.device("cuda") if ranks.alone else torch.device("cuda", ranks.local_rank)


def _gpu_tokens(model: str, compute_dtype: torch.dtype, device: torch.device) -> int:
    """The largest power of two of tokens whose activations fit in half of the GPU's memory, GPU_TOKENS_PER_BATCH at
    most. 17·H·L scalars are kept for the backward a token (Korthikanti et al. 2022, without attention matrices)."""
    config = BertConfig.preset(model, vocab_size=2)
    bytes_a_token = 17 * config.hidden_size * config.num_hidden_layers * compute_dtype.itemsize
    fits = int(0.5 * torch.cuda.get_device_properties(device).total_memory / bytes_a_token)
    return min(GPU_TOKENS_PER_BATCH, 1 << max(fits.bit_length() - 1, 7))


__all__ = ["LEARNING_RATES", "Plan", "PretrainSettings", "choose_device", "resolve"]
