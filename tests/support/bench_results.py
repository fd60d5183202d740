"""The content of result files with made-up figures, for tests of what reads them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from fusebert.bench.measure.result import ALL_KINDS, Result
from fusebert.bench.measure.serialise import from_json, to_json
from fusebert.bench.measure.statistics import Timing

COPY, MATMUL = 1e12, 1e14  # bytes/s, FLOP/s


def typed(content: dict[str, Any]) -> Result:
    """The dataclass of a file's content."""
    kind = content.get("kind", "aot")
    return from_json(next(each for each in ALL_KINDS if each.kind == kind), content)


def environment(device: str = "cpu") -> dict[str, Any]:
    found: dict[str, Any] = {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "abcdef123456",
        "source_sha256": "0" * 64,
        "device": device,
        "python": "3.12.0",
        "platform": "Linux",
        "processor": "Made-up CPU",
        "cores": 4,
        "torch_threads": 2,
        "versions": {"torch": "9.9.9", "liger-kernel": None},
    }
    if device == "cuda":
        found["gpu"] = {
            "name": "Made-up GPU",
            "compute_capability": "9.0",
            "multiprocessors": 10,
            "memory_bytes": 80_000_000_000,
            "l2_bytes": 50_000_000,
            "cuda": "12",
            "cudnn": 9,
            "nvidia_smi": {"name": "Made-up GPU", "driver_version": "1.2.3", "clocks.sm": "1500"},
        }
    return found


def verdict(status: str = "right", detail: str = "") -> dict[str, Any]:
    errors = {} if status in ("failed", "unchecked") else {"out": 1e-3, "dq": 2e-3}
    return {"status": status, "errors": errors, "error_versus_torch": 1.5 if errors else None, "detail": detail}


def contestant(name: str, role: str, samples: Any, ours_ms: float = 1.0, *, peak_bytes: int | None = None) -> Any:
    """Timed with ``samples``; None for one that is wrong."""
    if samples is None:
        return {"name": name, "role": role, "verdict": verdict("wrong", "dq is 99.0 times as far as PyTorch")}
    ratio = float(np.median(samples)) / ours_ms
    return {
        "name": name,
        "role": role,
        "verdict": verdict("unchecked" if role == "bound" else "right"),
        "timing": to_json(Timing.of([float(x) for x in samples], [0.1] * len(samples), 3)),
        "ratio_to_ours": {"median": ratio, "low": 0.95 * ratio, "high": 1.05 * ratio},
        "peak_bytes": peak_bytes,
    }


def measured(op: str, case: str, shape: dict[str, Any], contestants: list[Any], **fields: Any) -> dict[str, Any]:
    """A pass of a case; rates follow from the times."""
    flops, size = fields.pop("flops", 1e9), 1e7
    floor_ms = 1e3 * max(flops / MATMUL, size / COPY)
    for each in contestants:
        if "timing" in each:
            seconds = 1e-3 * each["timing"]["median_ms"]
            each |= {
                "flops_per_s": flops / seconds,
                "bytes_per_s": size / seconds,
                "roofline": floor_ms / seconds / 1e3,
            }
    return {
        "op": op,
        "case": case,
        "pass": "forward+backward",
        "dtype": "bfloat16",
        "shape": shape,
        "dropout": 0.0,
        "flops": flops,
        "bytes": size,
        "floor_ms": floor_ms,
        "limit": "matmul" if flops else "memory",
        "contestants": contestants,
        "missing": [{"name": "flash-attn", "reason": "not installed: pip install flash-attn"}],
        **fields,
    }


def attention(n: int, contestants: list[Any], **fields: Any) -> dict[str, Any]:
    shape = {"tokens": 1024, "segments": 1024 // n, "longest": n, "heads": 4, "head_dim": 64, "padding": 0.0}
    return measured("attention", f"N={n}", shape, contestants, **fields)


def kernels(results: list[Any], device: str = "cuda") -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "kernels",
        "environment": environment(device),
        "settings": {"op": None, "dtype": "bfloat16", "quick": False, "minutes": None},
        "ceilings": {"copy_bytes_per_s": COPY, "matmul_flops_per_s": MATMUL, "dtype": "bfloat16"},
        "results": results,
        "left_out": [],
        "seconds": 1.0,
        "nvidia_smi_after": None,
    }


def step(contestants: list[Any], device: str = "cpu", **settings: Any) -> dict[str, Any]:
    for each in contestants:
        if "timing" in each:
            each |= {"tokens_per_s": 1e6 / each["timing"]["median_ms"], "mfu": 0.5, "micro_batches": 1}
    return {
        "schema": 1,
        "kind": "step",
        "environment": environment(device),
        "settings": {
            "model": "mini",
            "tokens": 1024,
            "seqlen": 128,
            "ragged": False,
            "dropout": 0.1,
            "compiled": False,
            "vocab_size": 30522,
            "compute_dtype": "float32",
            "quick": False,
            "minutes": None,
            **settings,
        },
        "ceilings": {"copy_bytes_per_s": COPY, "matmul_flops_per_s": MATMUL, "dtype": "float32"},
        "batch": {"tokens": 1000.0, "sequences": 8.0, "masked": 150.0, "padding_for_transformers": 0.25, "flops": 1e9},
        "contestants": contestants,
        "left_out": [],
        "seconds": 1.0,
        "nvidia_smi_after": None,
    }


def train(us_per_token: dict[str, Any]) -> dict[str, Any]:
    """Contestants by name, ours first, with the microseconds a token of each turn; None for one that is wrong."""
    ours = float(np.median(next(iter(us_per_token.values()))))
    rows: list[dict[str, Any]] = []
    for name, turns in us_per_token.items():
        role = "peer" if rows else "ours"
        if turns is None:
            rows.append({"name": name, "role": role, "verdict": verdict("wrong", "another held-out loss")})
            continue
        median = float(np.median(turns))
        ratio = median / ours
        rows.append(
            {
                "name": name,
                "role": role,
                "verdict": verdict(),
                "tokens_per_s": 1e6 / median,
                "us_per_token": [float(x) for x in turns],
                "ratio_to_ours": {"median": ratio, "low": 0.95 * ratio, "high": 1.05 * ratio},
                "steps": 2,
                "tokens": 2000,
                "loss_at_same_step": {"step": 2, "loss": 6.5},
                "heldout_loss": 6.25,
                "peak_bytes": None,
                "losses": [7.0, 6.5],
                "curve": [],
            }
        )
    return {
        "schema": 1,
        "kind": "train",
        "environment": environment(),
        "settings": {
            "data": "text",
            "model": "mini",
            "tokens": 1024,
            "seqlen": 128,
            "dropout": 0.1,
            "compiled": False,
            "workers": 0,
            "minutes": 1.0,
            "compute_dtype": "float32",
            "lr": 1e-3,
            "vocab_size": 1000,
        },
        "unigram_entropy": 6.0,
        "contestants": rows,
        "clocks": None,
        "seconds": 60.0,
        "nvidia_smi_after": None,
    }


def parity(*, right: bool = True) -> dict[str, Any]:
    losses = [7.0, 6.5, 6.25, 6.125]
    return {
        "schema": 1,
        "kind": "train_parity",
        "environment": environment(),
        "settings": {
            "layers": 2,
            "hidden_size": 128,
            "vocab_size": 512,
            "compute_dtype": "float32",
            "steps": 4,
            "tokens": 256,
            "seqlen": 64,
            "ragged": True,
            "dropout": 0.0,
        },
        "runs": {
            "fusebert": {"losses": losses, "tokens_per_s": 2000.0},
            "transformers": {"losses": losses, "tokens_per_s": 1000.0},
        },
        "verdict": {"mean_drift": 1e-8, "largest_drift": 2e-8, "right": right, "allowed_largest_drift": 1e-3},
        "speed_up": 2.0,
        "nvidia_smi_after": None,
    }


def pretrain() -> dict[str, Any]:
    before = {
        "mlm_loss": 9.0,
        "mlm_accuracy": 0.001,
        "nsp_loss": 0.7,
        "nsp_accuracy": 0.5,
        "num_masked": 9,
        "num_pairs": 2,
    }
    return {
        "schema": 1,
        "kind": "pretrain",
        "environment": environment(),
        "settings": {"model": "tiny"},
        "shape": {},
        "corpus": {"vocab_size": 8192, "train_tokens": 5_000_000},
        "report": {
            "model": "tiny",
            "parameters": 1_600_000,
            "precision": "fp32",
            "steps": 2743,
            "tokens": 5_600_000,
            "seconds": 300.0,
            "tokens_per_second": 19695.4,
            "unigram_entropy": 6.038,
            "before": before,
            "after": {**before, "mlm_loss": 4.689, "mlm_accuracy": 0.273},
            "verdict": "clearly below the unigram entropy, 6.038: the model uses context",
        },
    }


def aot() -> dict[str, Any]:
    kernel = {
        "case": "attention N=64",
        "kernel": "attn_short_forward",
        "warps": 4,
        "stages": 1,
        "registers": 79,
        "spill_bytes": 0,
        "shared_bytes": 24576,
        "blocks_per_multiprocessor": 6,
        "matrix": "8 HGMMA",
        "loads_128": 12,
        "stores_128": 8,
    }
    about = {"date": "2026-01-01", "arch": "sm_90", "triton": "9.9", "torch": "9.9.9"}
    return {
        "about": about,
        "kernels": [kernel, {**copy.deepcopy(kernel), "kernel": "attn_short_backward", "spill_bytes": 8}],
    }


def predict() -> dict[str, Any]:
    """Two launches of one kernel and one of another, which is slower than the roofline allows."""
    resources = dict.fromkeys(("issue", "alu", "fma", "special", "tensor", "shared", "l2"), 1.0)
    kernel = {
        "call": "attention_qkv",
        "kernel": "attn_short_forward",
        "launches": 11,
        "tile": "M=128",
        "warps": 8,
        "registers": 128,
        "spill_bytes": 0,
        "shared_bytes": 49152,
        "blocks": 2,
        "programs": 6144,
        "waves": 23.3,
        "issue_slots": 1000.0,
        "flops": 2e6,
        "hbm_bytes": 3e6,
        "us": {**resources, "hbm": 4.0},
        "roofline_us": 4.0,
    }
    slow = {**copy.deepcopy(kernel), "kernel": "attn_short_backward", "us": {**resources, "issue": 8.0, "hbm": 4.0}}
    step = {
        "tokens": 1e4,
        "products_us": 100.0,
        "others_us": 20.0,
        "kernels_bound_us": 30.0,
        "kernels_sum_us": 60.0,
        "launches": 50,
        "launches_us": 100.0,
        "floor_us": 140.0,
    }
    return {
        "schema": 1,
        "kind": "predict",
        "about": {
            "date": "2026-01-01",
            "commit": None,
            "triton": "9.9",
            "torch": "9.9.9",
            "gpu": {"name": "H100 SXM", "copy_bytes_per_s": 3e12, "matmul_flops_per_s": 8e14},
        },
        "settings": {"gpu": "h100", "model": "base"},
        "kernels": [kernel, {**copy.deepcopy(kernel), "launches": 1}, slow],
        "others": [{"name": "mm 1 × 2 × 3", "calls": 2, "flops": 12.0, "bytes": 24.0, "us": 1.5}],
        "step": step,
    }


def calibrate() -> dict[str, Any]:
    """The kernels of `predict` with their times; one failed."""
    found = predict()
    first, _, slow = found["kernels"]
    timing = to_json(Timing.of([0.006, 0.006, 0.0064], [0.001] * 3, 9))
    over = [{"median": m, "low": 0.9 * m, "high": 1.1 * m} for m in (1.5, 0.75)]
    return {
        "schema": 1,
        "kind": "calibrate",
        "environment": environment("cuda"),
        "about": found["about"],
        "settings": found["settings"],
        "ceilings": {"copy_bytes_per_s": 2.5e12, "matmul_flops_per_s": 7e14, "dtype": "bfloat16"},
        "kernels": [
            {"prediction": first, "timing": timing, "over_bound": over[0], "over_sum": over[1]},
            {"prediction": slow, "timing": None, "over_bound": None, "over_sum": None, "failed": "no memory"},
        ],
        "left_out": ["layernorm: layernorm_forward"],
        "seconds": 9.0,
    }


def race() -> dict[str, Any]:
    """A kernel, and a candidate that is faster than predicted."""
    first, _, slow = predict()["kernels"]
    rows = [("launched", slow, 0.012, 1.0), ("M=128 N=128 warps=4 stages=1", first, 0.006, 0.5)]
    contestants = [
        {
            "config": config,
            "prediction": prediction,
            "timing": to_json(Timing.of([ms] * 3, [0.001] * 3, 9)),
            "ratio_to_launched": {"median": times, "low": 0.9 * times, "high": 1.1 * times},
        }
        for config, prediction, ms, times in rows
    ]
    return {
        "schema": 1,
        "kind": "race",
        "environment": environment("cuda"),
        "gpu": "H100 SXM",
        "dtype": "bfloat16",
        "tokens": 65536,
        "races": [{"kernel": "attn_short_backward", "shape": "N=128", "per_step": 12, "contestants": contestants}],
        "left_out": ["layernorm_forward H=768"],
        "seconds": 9.0,
    }


def campaign() -> dict[str, Any]:
    stages = [
        {"stage": "tests", "exit_status": 0, "seconds": 9},
        {"stage": "kernels", "exit_status": 124, "seconds": 60},
    ]
    return {"commit": "abcdef123456", "seconds": 70, "stages": stages}


def every_operator(
    device: str = "cuda", *, lengths: tuple[int, ...] = (64, 128), vocabularies: tuple[int, ...] = (1000, 2000)
) -> dict[str, Any]:
    """A result of kernels with attention, mlm_loss and layernorm; one peer is wrong, one is missing."""
    peak = 10**9 if device == "cuda" else None
    results = []
    for n in lengths:
        contestants = [
            contestant("fusebert attention_varlen", "ours", [1.0] * 7, peak_bytes=peak),
            contestant("sdpa flash", "peer", [2.0] * 7, peak_bytes=peak),
            contestant("sdpa cudnn", "peer", None),
        ]
        results.append(attention(n, contestants))
    for vocabulary in vocabularies:
        contestants = [
            contestant("fusebert", "ours", [1.0] * 7, peak_bytes=peak),
            contestant("its matrix products", "bound", [0.5] * 7, peak_bytes=peak),
            contestant("torch eager", "peer", [0.75] * 7, peak_bytes=peak and 3 * peak),
        ]
        shape = {"masked": 100, "hidden_size": 64, "vocab_size": vocabulary}
        results.append(measured("mlm_loss", f"V={vocabulary}", shape, contestants))
    contestants = [contestant("fusebert", "ours", [1.0] * 7), contestant("torch eager", "peer", [3.0] * 7)]
    results.append(measured("layernorm", "H=64", {"tokens": 10, "hidden_size": 64}, contestants, flops=0))
    result = kernels(results, device)
    result["ceilings_drift"] = {"copy": 0.99, "matmul": 0.97}
    if device == "cuda":
        clock = {"min": 900.0, "median": 1400.0, "max": 1500.0}
        result["clocks"] = {"samples": 9, "throttled": 0.25} | dict.fromkeys(
            ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"), clock
        )
    return result


def some_step() -> dict[str, Any]:
    """A result of step with a peer that is wrong."""
    return step(
        [
            contestant("fusebert", "ours", [1.0] * 5),
            contestant("transformers", "peer", [2.5] * 5),
            contestant("transformers, bf16 weights", "peer", None),
        ]
    )
