"""The sections of whole steps and runs: `bench step`, `bench train`, `bench parity`, and a pretraining run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..measure.case import OURS, PEER
from ..measure.units import interval
from .blocks import Block, Cell, Figure, Section, Table, Text, row, table
from .cells import (
    Source,
    device_words,
    error_cells,
    is_bad,
    memory_cell,
    remarks,
    timing_cells,
    verdict_cell,
    where_measured,
)


def lengths_words(settings: dict[str, Any]) -> str:
    """The lengths of a step's segments."""
    return f"ragged up to {settings['seqlen']}" if settings["ragged"] else f"all {settings['seqlen']}"


def step_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    settings, batch = result["settings"], result["batch"]
    rows = []
    for each in result["contestants"]:
        cells = [Cell(each["name"]), verdict_cell(each), *error_cells(each)]
        if "timing" not in each:
            cells += [Cell("not timed"), *[Cell("")] * 5]
        else:
            cells += [Cell(f"{each['tokens_per_s']:,.0f}", each["tokens_per_s"]), *timing_cells(each)]
            cells += [Cell(f"{100 * each['mfu']:.1f} %", each["mfu"]), memory_cell(each)]
        rows.append(row(cells, each["role"], bad=is_bad(each)))
    header = ("contestant", "verdict", "error", "× torch", "tokens/s", "step", "spread", "time / ours [95 %]", "MFU")
    blocks: list[Block] = [
        *where_measured(result),
        Text(
            f"Forward, backward, clip and AdamW on {batch['tokens']:,.0f} real tokens in {batch['sequences']:,.0f} "
            f"sequences, {batch['masked']:,.0f} of them masked, dropout {settings['dropout']}, vocabulary "
            f"{settings['vocab_size']:,}. Padded to the longest, as Transformers takes it, "
            f"{100 * batch['padding_for_transformers']:.0f} % of the slots would be padding."
        ),
        table((*header, "peak memory"), rows, left=2),
        *remarks(result["contestants"]),
        *(Text(f"{name}: left out for want of time") for name in result["left_out"]),
        *figures,
    ]
    title = f"Training step, {settings['model']}, {settings['compute_dtype']}, lengths {lengths_words(settings)}"
    return Section(f"{title}, {device_words(result)}", tuple(blocks))


def train_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    settings = result["settings"]
    rows, step = [], 0
    for each in result["contestants"]:
        cells = [Cell(each["name"]), verdict_cell(each)]
        if "tokens_per_s" not in each:
            cells += [Cell("not timed"), *[Cell("")] * 6]
        else:
            same, against = each["loss_at_same_step"], each["ratio_to_ours"]
            step = same["step"]
            cells += [
                Cell(f"{each['tokens_per_s']:,.0f}", each["tokens_per_s"]),
                Cell(interval(against), against and against["median"]),
                Cell(f"{each['steps']:,}", each["steps"]),
                Cell(f"{each['tokens']:,}", each["tokens"]),
                *(
                    Cell("not finite") if loss is None else Cell(f"{loss:.4f}", loss)
                    for loss in (same["loss"], each["heldout_loss"])
                ),
                memory_cell(each),
            ]
        rows.append(row(cells, each["role"], bad=is_bad(each)))
    header = ("contestant", "verdict", "tokens/s", "time / ours [95 %]", "steps", "tokens", f"loss by step {step:,}")
    blocks: list[Block] = [
        *where_measured(result),
        Text(
            f"A real run on {settings['data']}, loader and all: {settings['tokens']:,} token slots a step, segments up "
            f"to {settings['seqlen']}, dropout {settings['dropout']}, {settings['minutes']:g} minutes for all, in "
            "turns, from the same weights over the same examples. Losses are masked LM + next sentence, in nats."
        ),
        table((*header, "held-out loss", "peak memory"), rows, left=2),
        *remarks(result["contestants"]),
        *figures,
    ]
    title = f"Training run beside Transformers, {settings['model']}, {settings['compute_dtype']}"
    return Section(f"{title}, {device_words(result)}", tuple(blocks))


def parity_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    settings, verdict = result["settings"], result["verdict"]
    which = "mean" if "allowed_mean_drift" in verdict else "largest"
    drift, allowed = verdict[f"{which}_drift"], verdict[f"allowed_{which}_drift"]
    rows = []
    for name, run in result["runs"].items():
        first, last = run["losses"][0], run["losses"][-1]
        cells = [
            Cell(name),
            *(Cell("not finite") if loss is None else Cell(f"{loss:.4f}", loss) for loss in (first, last)),
            Cell(f"{run['tokens_per_s']:,.0f}", run["tokens_per_s"]),
        ]
        ours = name == "fusebert"
        rows.append(row(cells, OURS if ours else PEER, bad=ours and not verdict["right"]))
    distance = "not finite" if drift is None else f"{drift:.2e}"
    blocks: list[Block] = [
        *where_measured(result),
        Text(
            f"Same initial weights, same batches, no dropout: {settings['steps']} steps of {settings['tokens']:,} "
            f"tokens, {settings['layers']} layers of {settings['hidden_size']}, lengths {lengths_words(settings)}."
        ),
        Text(
            f"{'The same run' if verdict['right'] else 'NOT THE SAME RUN'}: {which} distance from the float32 loss "
            f"{distance}, allowed {allowed:.2e}. {result['speed_up']:.2f} times the tokens/s (one timing, "
            "no interval).",
            "" if verdict["right"] else "warning",
        ),
        table(("run", "first loss", "last loss", "tokens/s"), rows),
        *figures,
    ]
    return Section(f"Training beside Transformers, {settings['compute_dtype']}, {device_words(result)}", tuple(blocks))


def pretrain_table(report: dict[str, Any]) -> Table:
    """Held-out figures before and after a run."""
    before, after = report["before"], report["after"]
    entropy = f"{report['unigram_entropy']:.3f}"
    rows = [
        row(
            (
                f"masked-LM loss (nats; unigram entropy of the text: {entropy})",
                f"{before['mlm_loss']:.3f}",
                f"{after['mlm_loss']:.3f}",
            )
        ),
        row(("masked-LM accuracy", f"{100 * before['mlm_accuracy']:.1f} %", f"{100 * after['mlm_accuracy']:.1f} %")),
    ]
    if before["nsp_accuracy"] is not None and after["nsp_accuracy"] is not None:
        accuracies = (f"{100 * x['nsp_accuracy']:.1f} %" for x in (before, after))
        rows.append(row(("next-sentence accuracy", *accuracies)))
    return table(("held-out", "before", "after"), rows)


def _count(n: float) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n:,.0f}"


def pretrain_words(result: dict[str, Any]) -> str:
    """What a run consisted of."""
    report, corpus = result["report"], result["corpus"]
    minutes, seconds = divmod(round(report["seconds"]), 60)
    return (
        f"{report['model']}, {_count(report['parameters'])} parameters, vocabulary {corpus['vocab_size']:,}, "
        f"{report['precision']}, {minutes} min {seconds} s of training on {_count(corpus['train_tokens'])} tokens "
        f"of text: {report['steps']:,} steps, {_count(report['tokens'])} tokens seen, "
        f"{report['tokens_per_second']:,.0f} real tokens/s."
    )


def pretrain_section(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    report = result["report"]
    blocks: list[Block] = [
        *where_measured(result),
        Text(pretrain_words(result)),
        pretrain_table(report),
        Text(f"Loss after, {report['after']['mlm_loss']:.3f}, is {report['verdict']}."),
        *figures,
    ]
    return Section(f"Pretraining run, {report['model']}, {device_words(result)}", tuple(blocks))


__all__ = [
    "lengths_words",
    "parity_section",
    "pretrain_section",
    "pretrain_table",
    "pretrain_words",
    "step_section",
    "train_section",
]
