"""Results as text: one table a case and pass, a row a contestant, its error beside its speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measure.case import OURS, PEER, Missing
from ..measure.units import interval, milliseconds, rate, size
from ..steps.profile import AT_ROOFLINE


def columns(rows: list[list[str]], *, left: int = 1) -> list[str]:
    """Rows as aligned lines; the first ``left`` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def ceiling_lines(found: dict[str, Any]) -> list[str]:
    """The measured ceilings."""
    lines = [
        f"measured ceilings: copy {found['copy_bytes_per_s'] / 1e9:.4g} GB/s (read + written), "
        f"{found['dtype']} matmul {found['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s"
    ]
    linears = found.get("bert_base_linears")
    if linears:
        for name, rates in linears["flops_per_s"].items():
            values = ", ".join(f"{which} {rate / 1e12:.0f}" for which, rate in rates.items())
            lines.append(f"  BERT-base {name} over {linears['tokens']} tokens, TFLOP/s: {values}")
    return lines


def drift_line(found: dict[str, float]) -> str:
    """How the ceilings measured after the run compare with those before it, which the percentages are of."""
    return f"ceilings after the run: copy {100 * found['copy']:.0f} %, matmul {100 * found['matmul']:.0f} % of before"


def case_lines(measured: dict[str, Any]) -> list[str]:
    """The table of one pass of one case."""
    limit = measured["limit"]
    shape = ", ".join(f"{name} {value}" for name, value in measured["shape"].items())
    lines = [
        "",
        f"{measured['op']} {measured['case']} {measured['dtype']}, {measured['pass']}: at least "
        f"{milliseconds(measured['floor_ms'])} ({limit}; {measured['flops']:.3g} FLOPs, {size(measured['bytes'])})",
        f"  {shape}",
    ]
    table = [["", "error", "× torch", "median", "spread", "time / ours [95 %]", "rate", "roofline", "peak memory"]]
    remarks = []
    for row in measured["contestants"]:
        verdict, timing = row["verdict"], row.get("timing")
        errors, versus = verdict["errors"].values(), verdict["error_versus_torch"]
        cells = [
            row["name"],
            f"{max(errors):.1e}" if errors else "",
            "" if versus is None else f"{versus:.2f}",
        ]
        if timing is None:
            cells += [verdict["status"].upper(), "", "", "", "", ""]
        else:
            bound = row["role"] == "bound"
            cells += [
                milliseconds(timing["median_ms"]),
                f"{100 * timing['spread']:.1f} %",
                interval(row["ratio_to_ours"]),
                "" if bound else rate(limit, row),
                "" if bound else f"{100 * row['roofline']:.0f} %",
                "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
            ]
            if timing["host_bound"]:
                remarks.append(
                    f"  {row['name']}: the host needs as long to issue it: without a CUDA graph it is the limit"
                )
        if verdict["detail"]:
            remarks.append(f"  {row['name']}: {verdict['status']}: {verdict['detail']}")
        table.append(cells)
    return lines + columns(table) + remarks


def summary_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line a pass: ours, and how much longer the fastest peer that is right takes."""
    table = [["", "fusebert", "roofline", "fastest peer", "time / ours [95 %]"]]
    for measured in results:
        timed = [row for row in measured["contestants"] if "timing" in row]
        ours = next((row for row in timed if row["role"] == OURS), None)
        peers = [row for row in timed if row["role"] == PEER]
        best = min(peers, key=lambda row: row["timing"]["median_ms"], default=None)
        name = f"{measured['op']} {measured['case']} {measured['dtype']} {measured['pass']}"
        table.append(
            [
                name,
                milliseconds(ours["timing"]["median_ms"]) if ours else "NOT TIMED",
                f"{100 * ours['roofline']:.0f} %" if ours else "",
                best["name"] if best else "",
                interval(best["ratio_to_ours"]) if best else "",
            ]
        )
    return ["", "summary", *columns(table)]


def missing_lines(missing: Sequence[Missing]) -> list[str]:
    """The peers that are not in a case, and why."""
    return [f"  {gap.name}: {gap.reason}" for gap in missing]


def step_lines(result: dict[str, Any]) -> list[str]:
    """The table of a training step."""
    settings, batch = result["settings"], result["batch"]
    lines = [
        "",
        f"training step, {settings['model']}, {settings['compute_dtype']}, "
        f"{'ragged lengths up to' if settings['ragged'] else 'equal lengths of'} {settings['seqlen']}, "
        f"dropout {settings['dropout']}: {batch['tokens']:.0f} real tokens in {batch['sequences']:.0f} sequences, "
        f"{batch['masked']:.0f} masked; padding would be {100 * batch['padding_for_transformers']:.0f} % of the slots",
    ]
    table = [["", "error", "× torch", "tokens/s", "step", "spread", "time / ours [95 %]", "MFU", "peak memory"]]
    remarks = []
    for row in result["contestants"]:
        verdict, timing = row["verdict"], row.get("timing")
        error, versus = verdict["errors"].get("gradient"), verdict["error_versus_torch"]
        cells = [row["name"], "" if error is None else f"{error:.1e}", "" if versus is None else f"{versus:.2f}"]
        if timing is None:
            cells += [verdict["status"].upper(), "", "", "", "", ""]
        else:
            cells += [
                f"{row['tokens_per_s']:,.0f}",
                milliseconds(timing["median_ms"]),
                f"{100 * timing['spread']:.1f} %",
                interval(row["ratio_to_ours"]),
                f"{100 * row['mfu']:.1f} %",
                "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
            ]
            if timing["host_bound"]:
                remarks.append(f"  {row['name']}: limited by the host, which needs as long to issue the step")
            if row["micro_batches"] > 1:
                remarks.append(f"  {row['name']}: in {row['micro_batches']} micro-batches: the whole does not fit")
        if verdict["detail"]:
            remarks.append(f"  {row['name']}: {verdict['status']}: {verdict['detail']}")
        table.append(cells)
    remarks += [f"  {name}: left out for want of time" for name in result["left_out"]]
    return lines + columns(table) + remarks


def parity_lines(result: dict[str, Any]) -> list[str]:
    """Loss curves side by side, and whether ours follows."""
    settings, runs, verdict = result["settings"], result["runs"], result["verdict"]
    steps = settings["steps"]
    shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1})
    table = [["loss at step", *(str(i + 1) for i in shown), "tokens/s"]]
    for name, run in runs.items():
        table.append([name, *(f"{run['losses'][i]:.4f}" for i in shown), f"{run['tokens_per_s']:,.0f}"])
    allowed = verdict.get("allowed_mean_drift", verdict.get("allowed_largest_drift"))
    which = "mean" if "allowed_mean_drift" in verdict else "largest"
    return [
        "",
        f"{steps} training steps, {settings['layers']} layers of {settings['hidden_size']}, "
        f"{settings['compute_dtype']}, {settings['tokens']} tokens a step, ragged lengths up to {settings['seqlen']}, "
        "no dropout",
        *columns(table),
        f"  {'the same run' if verdict['right'] else 'NOT THE SAME RUN'}: {which} distance from the float32 loss "
        f"{verdict[f'{which}_drift']:.2e}, allowed {allowed:.2e}; {result['speed_up']:.2f} times the tokens/s",
    ]


def train_lines(result: dict[str, Any]) -> list[str]:
    """The table of a training run."""
    settings = result["settings"]
    timed = [row for row in result["contestants"] if "tokens_per_s" in row]
    at = timed[0]["loss_at_same_step"]["step"] if timed else 0
    table = [
        ["", "tokens/s", "time / ours [95 %]", "steps", "tokens", f"loss by step {at}", "held-out loss", "peak memory"]
    ]
    remarks = []
    for row in result["contestants"]:
        verdict = row["verdict"]
        cells = [row["name"]]
        if row not in timed:
            cells += [verdict["status"].upper(), *[""] * 6]
        else:
            cells += [
                f"{row['tokens_per_s']:,.0f}",
                interval(row["ratio_to_ours"]),
                f"{row['steps']:,}",
                f"{row['tokens']:,}",
                f"{row['loss_at_same_step']['loss']:.4f}",
                f"{row['heldout_loss']:.4f}",
                "" if row["peak_bytes"] is None else size(row["peak_bytes"]),
            ]
        if verdict["detail"]:
            remarks.append(f"  {row['name']}: {verdict['status']}: {verdict['detail']}")
        table.append(cells)
    return [
        "",
        f"training {settings['model']} on {settings['data']}, {settings['compute_dtype']}, {settings['tokens']} token "
        f"slots a step, segments up to {settings['seqlen']}, dropout {settings['dropout']}, "
        f"{settings['minutes']:g} minutes in all; losses are MLM + NSP",
        *columns(table),
        *remarks,
    ]


def profile_lines(profiled: dict[str, Any], *, most: int = 25) -> list[str]:
    """The table, and the list of what is not at its roofline."""
    rows, total = profiled["operators"], profiled["operator_ms"]
    table = [["operator", "calls", "time", "share", "GFLOP", "MB", "limit", "roofline"]]
    for row in rows[:most]:
        table.append(
            [
                row["name"],
                f"{row['calls']:.0f}",
                f"{row['ms']:.3f} ms",
                f"{100 * row['share']:.1f} %",
                f"{row['flops'] / 1e9:.3g}" if row["flops"] else "",
                f"{row['bytes'] / 1e6:.3g}",
                row["limit"],
                "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
            ]
        )
    rest = rows[most:]
    if rest:
        share = sum(row["ms"] for row in rest)
        table.append([f"{len(rest)} more", "", f"{share:.3f} ms", f"{100 * share / total:.1f} %", "", "", "", ""])
    lines = [
        "",
        f"our step by operator: {total:.1f} ms of {profiled['ms']:.1f} ms under the profiler; the rest is Python, "
        "autograd, gaps and the profiler itself",
        *columns(table),
    ]
    lost = [
        {**row, "lost_ms": row["ms"] - row["floor_ms"]}
        for row in rows
        if row["roofline"] is not None and row["roofline"] < AT_ROOFLINE
    ]
    lost = sorted((row for row in lost if row["lost_ms"] >= 0.01 * total), key=lambda row: -row["lost_ms"])
    if lost:
        table = [["not at its roofline", "lost", "roofline"]]
        table += [[row["name"], f"{row['lost_ms']:.3f} ms", f"{100 * row['roofline']:.0f} %"] for row in lost]
        lines += ["", *columns(table)]
    return lines
