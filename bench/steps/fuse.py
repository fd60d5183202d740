"""A Hugging Face encoder with `model.fuse`, against the same encoder without: forward, and forward + backward.

A batch is [B, N] with an attention mask, as a tokenizer makes it: one sequence is N long, the others are drawn so that
the wanted share is filled. All contestants have the same weights. Before it is timed, the fused model's hidden states
on real tokens, and the gradient of its parameters, are compared with the unfused model in float64 on a few sequences.
Timed are `no_grad` calls in evaluation mode, and calls with a backward in training mode, without an optimiser.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model import BertConfig, fuse
from ...train.errors import UserError
from ...train.step.step import autocast
from ..measure.case import OURS, PEER
from ..measure.correctness import FAILED, RIGHT, UNCHECKED, Verdict, allowance, relative_error, status
from ..measure.machine import environment, nvidia_smi
from ..measure.memory import release_memory
from ..measure.result import FuseCase, FuseContestant, FuseResult, FuseTime, write_result
from ..measure.settings import FuseOptions, FuseSettings, settings_of
from ..measure.statistics import Ratio, ratio
from ..measure.timing import Work, interleave
from ..measure.verify import one_line

PASSES = ("forward", "forward+backward")
CHECKED_SEQUENCES, CHECKED_TOKENS = 4, 128
SECONDS = 6.0  # of measuring a pass of a case, however much time there is
PRODUCT_SECONDS = 1.5  # of measuring its products
MINILM = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}

Batch = dict[str, Tensor]  # as a tokenizer makes it


def run(options: FuseOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> FuseResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        options: resolved for the device.
        show: takes each record as it is made: environment, cases, the result.

    Raises:
        UserError: an option is out of range, the model cannot be loaded, or Transformers is not installed.
    """
    begin = time.monotonic()
    sizes = [int(number) for number in _numbers("batches", options.batches, 1, 1 << 20)]
    seqlens = [int(number) for number in _numbers("seqlens", options.seqlens, 1, 1 << 20)]
    shares = _numbers("filled", options.filled, 0.5, 1.0)
    dtype = getattr(torch, options.compute_dtype)
    torch.manual_seed(0)
    plain = _model(options, max(seqlens)).to(device)
    fused = copy.deepcopy(plain)
    report = fuse(fused, unpad=True)
    where = environment(device)
    show(where)
    config = plain.config
    result = FuseResult(
        environment=where,
        settings=settings_of(FuseSettings, options, model=Path(options.model).name),
        architecture=f"{type(plain).__name__}, {config.num_hidden_layers} layers of {config.hidden_size}",
        fused=str(report).splitlines()[0],
    )
    models: list[tuple[str, str, nn.Module, Callable[[Batch], Verdict]]] = [
        ("fusebert", OURS, fused, functools.partial(_verdict, fused, plain, dtype)),
        ("unfused", PEER, plain, lambda batch: Verdict(RIGHT)),
    ]
    if options.compiled:
        detail = "the compiled form of a checked model"
        compiled: Any = torch.compile(plain, dynamic=False)
        models.append(("unfused, torch.compile", PEER, compiled, lambda batch: Verdict(UNCHECKED, detail=detail)))

    cases = []
    for size, seqlen in itertools.product(sizes, seqlens):
        if size * seqlen > options.tokens:
            result.left_out.append(f"B={size} N={seqlen}, larger than --tokens {options.tokens:,}")
        else:
            cases += [(size, seqlen, filled) for filled in (shares if size > 1 else [1.0])]
    for number, (size, seqlen, filled) in enumerate(cases):
        left = math.inf if options.minutes is None else 60 * options.minutes - (time.monotonic() - begin)
        if left <= 0:
            result.left_out += [f"B={b} N={n} {100 * f:.0f} %, for want of time" for b, n, f in cases[number:]]
            break
        seconds = min(SECONDS, left / (len(PASSES) * (len(cases) - number)))
        batch = _batch(size, seqlen, filled, config.vocab_size, device)
        verdicts = {name: _guarded(check, _few(batch)) for name, _, _, check in models}
        for pass_name in PASSES:
            works = {
                name: Work(functools.partial(_call, model, batch, dtype, pass_name))
                for name, _, model, _ in models
                if verdicts[name].may_be_timed
            }
            limits: dict[str, Any] = {"max_rounds": 3, "min_rounds": 2} if options.quick else {}
            timings = interleave(works, device, seconds=0.2 if options.quick else seconds, **limits)
            ours, tokens = timings.get("fusebert"), int(batch["attention_mask"].sum())
            rows = []
            for name, role, _, _ in models:
                timing, found = timings.get(name), None
                if timing is not None:
                    against = ratio(timing.samples_ms, ours.samples_ms) if ours else None
                    found = FuseTime(timing, against, 1e3 * tokens / timing.median_ms)
                rows.append(FuseContestant(name, role, verdicts[name], found))
            slots = batch["attention_mask"].numel()
            found_products = _products(plain, slots, tokens, dtype, device, pass_name, limits)
            case = FuseCase(pass_name, size, seqlen, tokens / slots, tuple(rows), found_products)
            result.cases.append(case)
            show(case)
        if options.out is not None:
            write_result(options.out, result)
        release_memory(device)
    result.seconds = time.monotonic() - begin
    result.nvidia_smi_after = nvidia_smi(device)
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


def _numbers(name: str, text: str, least: float, most: float) -> list[float]:
    """The numbers of an option."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number <= most for number in found):
        raise UserError(f"--{name} must be numbers from {least:g} to {most:g}, separated by commas; got {text!r}")
    return found


def _model(options: FuseOptions, longest: int) -> Any:
    """Transformers' encoder: a preset with random weights, or from a folder."""
    try:
        import transformers
    except ImportError as error:
        raise UserError("fusebert bench fuse needs Transformers: pip install transformers") from error
    dropout = {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    if Path(options.model).is_dir():
        model = transformers.AutoModel.from_pretrained(options.model, attn_implementation="sdpa")
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = options.dropout
        return model
    changes: dict[str, Any] = {**dropout, "max_position_embeddings": max(512, longest)}
    name, shape = ("tiny", MINILM) if options.model == "minilm" else (options.model, {})
    try:
        ours = BertConfig.preset(name, 30522, **shape, **changes)
    except ValueError as error:
        raise UserError(f"--model {options.model}: {error}; or give a folder") from error
    config = transformers.BertConfig(**dataclasses.asdict(ours))
    config._attn_implementation = "sdpa"
    return transformers.BertModel(config)


def _batch(size: int, seqlen: int, filled: float, vocab_size: int, device: torch.device) -> Batch:
    """Random tokens. Lengths are spread evenly around their mean, the longest is ``seqlen``."""
    least = max(1.0, (2 * filled - 1) * seqlen)
    lengths = torch.linspace(least, seqlen, size).round().long() if size > 1 else torch.tensor([seqlen])
    lengths = lengths[torch.randperm(size)]
    mask = (torch.arange(seqlen) < lengths[:, None]).long()
    ids = torch.randint(min(1000, vocab_size - 1), vocab_size, (size, seqlen)) * mask
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _few(batch: Batch) -> Batch:
    """Some sequences of ``batch``, short enough for float64."""
    longest = batch["attention_mask"].sum(1).argsort(descending=True)
    few = longest[:: max(1, len(longest) // CHECKED_SEQUENCES)][:CHECKED_SEQUENCES]
    return {name: x[few, :CHECKED_TOKENS] for name, x in batch.items()}


def _call(model: nn.Module, batch: Batch, dtype: torch.dtype, pass_name: str, _: Any) -> None:
    backward = pass_name == PASSES[1]
    if model.training != backward:
        model.train(backward)
    with torch.set_grad_enabled(backward), autocast(batch["input_ids"].device, dtype):
        hidden = model(**batch).last_hidden_state
    if backward:
        hidden.backward(torch.ones_like(hidden))
        for p in model.parameters():
            p.grad = None


def _products(
    model: nn.Module,
    slots: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    pass_name: str,
    limits: dict[str, Any],
) -> Ratio | None:
    """`FuseCase.products`: the linear layers of ``model``'s layers, one by one, on ``slots`` and on ``tokens`` rows."""
    layers = [x for name, x in model.named_modules() if isinstance(x, nn.Linear) and "pooler" not in name]
    if tokens == slots or not layers:
        return None
    backward = pass_name == PASSES[1]
    inputs = {
        (rows, layer.in_features): torch.randn(rows, layer.in_features, device=device, requires_grad=backward)
        for layer in layers
        for rows in (slots, tokens)
    }

    def run(rows: int, _: Any) -> None:
        with torch.set_grad_enabled(backward), autocast(device, dtype):
            for layer in layers:
                out = layer(inputs[rows, layer.in_features])
                if backward:
                    out.backward(out.detach())
        for p in (*model.parameters(), *inputs.values()):
            p.grad = None

    works = {str(rows): Work(functools.partial(run, rows)) for rows in (slots, tokens)}
    timings = interleave(works, device, seconds=PRODUCT_SECONDS if not limits else 0.1, **limits)
    return ratio(timings[str(slots)].samples_ms, timings[str(tokens)].samples_ms)


def _results(model: nn.Module, batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states of the real tokens, and the gradient of all parameters as one vector, without dropout."""
    model.eval()
    with autocast(batch["input_ids"].device, dtype):
        hidden = model(**batch).last_hidden_state[batch["attention_mask"].bool()]
    weights = torch.linspace(-1.0, 1.0, hidden.numel(), device=hidden.device, dtype=hidden.dtype).view_as(hidden)
    parameters = list(model.parameters())
    grads = torch.autograd.grad((hidden * weights).sum(), parameters, allow_unused=True)
    return {"out": hidden.detach(), "gradient": torch.cat([g.flatten() for g in grads if g is not None])}


def _verdict(fused: nn.Module, plain: nn.Module, dtype: torch.dtype, batch: Batch) -> Verdict:
    oracle = _results(copy.deepcopy(plain).double(), batch, torch.float32)
    ours, theirs = (_results(model, batch, dtype) for model in (fused, plain))
    errors = {name: relative_error(ours[name], right) for name, right in oracle.items()}
    ratios = {name: errors[name] / allowance(theirs[name], right) for name, right in oracle.items()}
    worst = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    found = status(ratios[worst])
    detail = "" if found == RIGHT else f"{worst} is {ratios[worst]:.1f} times as far from float64 as unfused"
    return Verdict(found, errors, ratios[worst], detail)


def _guarded(check: Callable[[Batch], Verdict], batch: Batch) -> Verdict:
    try:
        return check(batch)
    except Exception as error:  # the others go on
        return Verdict(FAILED, detail=one_line(error))
