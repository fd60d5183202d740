"""Result files → the sections of a report: what was measured, on what, how right it is, how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any

from .cases import OURS, PEER
from .environment import describe
from .report_blocks import Block, Cell, Figure, Row, Section, Table, Text, row, table
from .tables import ceiling_lines
from .units import interval, milliseconds, rate, size
from .verify import RIGHT, UNCHECKED

CPU_WARNING = (
    "These figures time the CPU path, which runs PyTorch's own operators: they say nothing about the Triton kernels, "
    "nor about any GPU."
)
METHOD = (
    "Verify, then time: before anything is timed, each contestant's result and gradients are compared with a float64 "
    'oracle on fresh random inputs. "error" is the largest relative distance, "× torch" the largest ratio to plain '
    "PyTorch's own distance at that dtype: up to 2 is right, up to 8 is coarse and said so, beyond is wrong and not "
    "timed.",
    "Contestants alternate in one process, in a new order each round; inputs rotate beyond the L2 cache; medians are "
    'over the rounds, "spread" is the 10th to the 90th percentile over the median. '
    '"time / ours" is taken within a round, its median with a 95 % bootstrap interval: above 1, ours is faster.',
    '"roofline" is the least time that the bytes and FLOPs of the operation allow at the rates measured on that '
    "machine in the same run (a large copy, a large matrix product), over the time taken. A padded contestant pays "
    "for its padding: only real tokens count. Tokens/s counts real tokens, too.",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A result file: its name in the report, unique there, where it came from, and what is in it."""

    name: str
    path: PurePath
    result: dict[str, Any]


def _verdict(found: dict[str, Any]) -> Cell:
    status = found["verdict"]["status"]
    return Cell(status if status in (RIGHT, UNCHECKED) else status.upper())


def _is_bad(found: dict[str, Any]) -> bool:
    return found["verdict"]["status"] not in (RIGHT, UNCHECKED)


def _error(found: dict[str, Any]) -> list[Cell]:
    """Largest error, and the largest ratio to PyTorch's."""
    errors = [x for x in found["verdict"]["errors"].values() if x is not None]
    versus = found["verdict"]["error_versus_torch"]
    error = Cell(f"{max(errors):.1e}", max(errors)) if errors else Cell("")
    return [error, Cell("") if versus is None else Cell(f"{versus:.2f}", versus)]


def _timing(found: dict[str, Any]) -> list[Cell]:
    """Median, spread, ratio."""
    timing, against = found["timing"], found["ratio_to_ours"]
    return [
        Cell(milliseconds(timing["median_ms"]), timing["median_ms"]),
        Cell(f"{100 * timing['spread']:.1f} %", timing["spread"]),
        Cell(interval(against), against and against["median"]),
    ]


def _memory(found: dict[str, Any]) -> Cell:
    peak = found.get("peak_bytes")
    return Cell("") if peak is None else Cell(size(peak), peak)


def _remarks(rows: Sequence[dict[str, Any]]) -> Iterator[Text]:
    for found in rows:
        if found["verdict"]["detail"]:
            tone = "warning" if _is_bad(found) else ""
            yield Text(f"{found['name']}: {found['verdict']['status']}: {found['verdict']['detail']}", tone)
        if found.get("timing", {}).get("host_bound"):
            yield Text(f"{found['name']}: the host needs as long to issue the calls as the GPU to run them")
        if found.get("micro_batches", 1) > 1:
            yield Text(f"{found['name']}: in {found['micro_batches']} micro-batches: the whole does not fit")


def _where(result: dict[str, Any]) -> list[Text]:
    """The warning that a CPU was timed, and the measured ceilings."""
    found = [Text(CPU_WARNING, "warning")] if result["environment"]["device"] == "cpu" else []
    if "ceilings" in result:
        found += [Text(line.strip()) for line in ceiling_lines(result["ceilings"])]
    return found


def _device_words(result: dict[str, Any]) -> str:
    where = result["environment"]
    return where["gpu"]["name"] if "gpu" in where else "CPU path"


# --- kernels ---------------------------------------------------------------------------------------------------------


def _case_words(measured: dict[str, Any]) -> str:
    return f"{measured['op']} {measured['case']}, {measured['pass']}"


def fastest_peer(measured: dict[str, Any]) -> dict[str, Any] | None:
    """The peer with the least time among those that were timed."""
    timed = [x for x in measured["contestants"] if x["role"] == PEER and "timing" in x]
    return min(timed, key=lambda x: x["timing"]["median_ms"], default=None)


def kernels_summary(result: dict[str, Any]) -> Table:
    """A row a pass: ours and the fastest peer that is right."""
    rows = []
    for measured in result["results"]:
        ours = next((x for x in measured["contestants"] if x["role"] == OURS), None)
        peer = fastest_peer(measured)
        cells = [Cell(_case_words(measured))]
        cells += [_timing(peer)[2], Cell(peer["name"])] if peer else [Cell(""), Cell("none")]
        if ours is None or "timing" not in ours:
            cells += [Cell("NOT TIMED"), Cell("")]
        else:
            cells += [_timing(ours)[0], Cell(f"{100 * ours['roofline']:.0f} %", ours["roofline"])]
        rows.append(row(cells, bad=ours is None or _is_bad(ours)))
    return table(("", "fastest peer / ours [95 %]", "fastest peer", "fusebert", "of roofline"), rows)


def _not_right(result: dict[str, Any]) -> list[Table]:
    """Contestants that are coarse, wrong or failed, once each, and what is wrong with them."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for measured in result["results"]:
        for each in measured["contestants"]:
            if _is_bad(each):
                what = (measured["op"], measured["case"], each["name"], each["verdict"]["status"])
                cells = [*map(Cell, what[:3]), _verdict(each), Cell(each["verdict"]["detail"]), *_error(each)]
                found[what] = row(cells, each["role"], bad=True)
    header = ("operator", "case", "contestant", "verdict", "why", "error", "× torch")
    return [table(header, found.values(), left=5)] if found else []


def _missing(result: dict[str, Any]) -> list[Table]:
    """Peers that did not run: why, and where."""
    cases: dict[str, list[str]] = {}  # operator → its cases
    gaps: dict[tuple[str, str, str], list[str]] = {}  # peer, why, operator → cases
    for measured in result["results"]:
        op, case = measured["op"], measured["case"]
        if case not in cases.setdefault(op, []):
            cases[op].append(case)
            for gap in measured["missing"]:
                gaps.setdefault((gap["name"], gap["reason"], op), []).append(case)
    rows = []
    for (name, reason, op), where in gaps.items():
        rows.append(row((name, op, reason, "every case" if where == cases[op] else "; ".join(where))))
    return [table(("peer", "operator", "why it is not there", "where"), rows, left=4)] if rows else []


def _case_blocks(measured: dict[str, Any]) -> Iterator[Text | Table]:
    shape = ", ".join(f"{name} {value}" for name, value in measured["shape"].items())
    yield Text(
        f"{shape}. At least {milliseconds(measured['floor_ms'])} ({measured['limit']}-bound: "
        f"{measured['flops']:.3g} FLOPs, {size(measured['bytes'])})."
    )
    rows = []
    for each in measured["contestants"]:
        cells = [Cell(each["name"]), _verdict(each), *_error(each)]
        if "timing" not in each:
            cells += [Cell("not timed"), *[Cell("")] * 5]
        else:
            bound, limit = each["role"] == "bound", measured["limit"]
            per_s = each["flops_per_s" if limit == "matmul" else "bytes_per_s"]
            cells += _timing(each)
            cells += (
                [Cell("")] * 2
                if bound
                else [
                    Cell(rate(limit, each), per_s),
                    Cell(f"{100 * each['roofline']:.0f} %", each["roofline"]),
                ]
            )
            cells.append(_memory(each))
        rows.append(row(cells, each["role"], bad=_is_bad(each)))
    header = ("contestant", "verdict", "error", "× torch", "median", "spread", "time / ours [95 %]", "rate", "roofline")
    yield table((*header, "peak memory"), rows, left=2)
    yield from _remarks(measured["contestants"])


def _kernels(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    blocks: list[Block] = [*_where(result)]
    if "seconds" not in result:
        blocks.append(Text("This run was cut short: what it had measured until then follows.", "warning"))
    if result["left_out"]:
        blocks.append(Text(f"Left out for want of time: {'; '.join(result['left_out'])}."))
    if result.get("did_not_fit"):
        blocks.append(Text(f"Not measured, for want of memory: {'; '.join(result['did_not_fit'])}.", "warning"))
    blocks.append(kernels_summary(result))
    wrong, missing = _not_right(result), _missing(result)
    if wrong:
        blocks.append(Section("Not right", tuple(wrong)))
    if missing:
        blocks.append(Section("Peers that are missing", tuple(missing)))
    blocks += figures
    for op in dict.fromkeys(measured["op"] for measured in result["results"]):
        cases = [
            Section(f"{measured['case']}, {measured['pass']}", tuple(_case_blocks(measured)))
            for measured in result["results"]
            if measured["op"] == op
        ]
        blocks.append(Section(f"{op}: every case", tuple(cases), folded=True))
    return Section(f"Operators, {result['settings']['dtype']}, {_device_words(result)}", tuple(blocks))


# --- whole steps and runs --------------------------------------------------------------------------------------------


def lengths_words(settings: dict[str, Any]) -> str:
    """The lengths of a step's segments."""
    return f"ragged up to {settings['seqlen']}" if settings["ragged"] else f"all {settings['seqlen']}"


def _step(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    settings, batch = result["settings"], result["batch"]
    rows = []
    for each in result["contestants"]:
        cells = [Cell(each["name"]), _verdict(each), *_error(each)]
        if "timing" not in each:
            cells += [Cell("not timed"), *[Cell("")] * 5]
        else:
            cells += [Cell(f"{each['tokens_per_s']:,.0f}", each["tokens_per_s"]), *_timing(each)]
            cells += [Cell(f"{100 * each['mfu']:.1f} %", each["mfu"]), _memory(each)]
        rows.append(row(cells, each["role"], bad=_is_bad(each)))
    header = ("contestant", "verdict", "error", "× torch", "tokens/s", "step", "spread", "time / ours [95 %]", "MFU")
    blocks: list[Block] = [
        *_where(result),
        Text(
            f"Forward, backward, clip and AdamW on {batch['tokens']:,.0f} real tokens in {batch['sequences']:,.0f} "
            f"sequences, {batch['masked']:,.0f} of them masked, dropout {settings['dropout']}, vocabulary "
            f"{settings['vocab_size']:,}. Padded to the longest, as Transformers takes it, "
            f"{100 * batch['padding_for_transformers']:.0f} % of the slots would be padding."
        ),
        table((*header, "peak memory"), rows, left=2),
        *_remarks(result["contestants"]),
        *(Text(f"{name}: left out for want of time") for name in result["left_out"]),
        *figures,
    ]
    title = f"Training step, {settings['model']}, {settings['compute_dtype']}, lengths {lengths_words(settings)}"
    return Section(f"{title}, {_device_words(result)}", tuple(blocks))


def _train(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    settings = result["settings"]
    rows, step = [], 0
    for each in result["contestants"]:
        cells = [Cell(each["name"]), _verdict(each)]
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
                _memory(each),
            ]
        rows.append(row(cells, each["role"], bad=_is_bad(each)))
    header = ("contestant", "verdict", "tokens/s", "time / ours [95 %]", "steps", "tokens", f"loss by step {step:,}")
    blocks: list[Block] = [
        *_where(result),
        Text(
            f"A real run on {settings['data']}, loader and all: {settings['tokens']:,} token slots a step, segments up "
            f"to {settings['seqlen']}, dropout {settings['dropout']}, {settings['minutes']:g} minutes for all, in "
            "turns, from the same weights over the same examples. Losses are masked LM + next sentence, in nats."
        ),
        table((*header, "held-out loss", "peak memory"), rows, left=2),
        *_remarks(result["contestants"]),
        *figures,
    ]
    title = f"Training run beside Transformers, {settings['model']}, {settings['compute_dtype']}"
    return Section(f"{title}, {_device_words(result)}", tuple(blocks))


def _parity(source: Source, figures: Sequence[Figure]) -> Section:
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
        *_where(result),
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
    return Section(f"Training beside Transformers, {settings['compute_dtype']}, {_device_words(result)}", tuple(blocks))


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


def _pretrain(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    report = result["report"]
    blocks: list[Block] = [
        *_where(result),
        Text(pretrain_words(result)),
        pretrain_table(report),
        Text(f"Loss after, {report['after']['mlm_loss']:.3f}, is {report['verdict']}."),
        *figures,
    ]
    return Section(f"Pretraining run, {report['model']}, {_device_words(result)}", tuple(blocks))


# --- what is not timed -----------------------------------------------------------------------------------------------


def _aot(source: Source, figures: Sequence[Figure]) -> Section:
    about, kernels = source.result["about"], source.result["kernels"]
    spilling = sum(found["spill_bytes"] > 0 for found in kernels)
    columns = ("warps", "stages", "registers", "spill_bytes", "shared_bytes", "blocks_per_multiprocessor")
    rows = []
    for found in kernels:
        figures_of = [Cell(f"{found[name]:,}", found[name]) for name in columns]
        cells = [Cell(found["case"]), Cell(found["kernel"]), *figures_of, Cell(found["matrix"] or "")]
        cells += [Cell(str(found[name]), found[name]) for name in ("loads_128", "stores_128")]
        rows.append(row(cells, bad=found["spill_bytes"] > 0))
    header = ("case", "kernel", "warps", "stages", "registers", "spills (B)", "shared (B)", "blocks/SM", "matrix")
    resources = table((*header, "128-bit loads", "128-bit stores"), rows, left=2)
    blocks: tuple[Block, ...] = (
        Text(
            f"Compiled for {about['arch']} with Triton {about['triton']}, PyTorch {about['torch']}, {about['date']}; "
            "bfloat16 where a case names nothing else. Nothing here was run or timed: these are the compiler's "
            f"figures. {spilling} of {len(kernels)} kernels spill registers."
        ),
        Section("every kernel", (resources,), folded=True),
        *figures,
    )
    return Section(f"Compiled kernels, {about['arch']}", blocks)


def _campaign(source: Source, figures: Sequence[Figure]) -> Section:
    result = source.result
    rows = []
    for stage in result["stages"]:
        status = stage["exit_status"]
        words = "passed" if status == 0 else "OUT OF TIME" if status in (124, 137) else f"FAILED ({status})"
        seconds = Cell(f"{stage['seconds']} s", stage["seconds"])
        rows.append(row((stage["stage"], words, seconds), bad=status != 0))
    text = Text(f"{result['seconds']} s in all, commit {result['commit'] or 'unknown'}.")
    return Section("Campaign", (text, table(("stage", "result", "time"), rows, left=2), *figures))


SECTIONS: dict[str, Callable[[Source, Sequence[Figure]], Section]] = {
    "kernels": _kernels,
    "step": _step,
    "train": _train,
    "train_parity": _parity,
    "pretrain": _pretrain,
    "aot": _aot,
    "campaign": _campaign,
}


def section(source: Source, figures: Sequence[Figure]) -> Section:
    """The section of a result file, under what its file is called.

    Args:
        figures: those of its plots that there will be.

    Raises:
        KeyError, TypeError, IndexError: something is missing in the file.
    """
    found = SECTIONS[source.result["kind"]](source, figures)
    where = source.result.get("environment")
    lines = [Text(f"From {source.path.name}.")]
    if where:
        lines = [Text(f"From {source.path.name}: {line}" if not i else line) for i, line in enumerate(_caption(where))]
    return dataclasses.replace(found, blocks=(*lines, *found.blocks))


def _caption(where: dict[str, Any]) -> list[str]:
    return describe(where).splitlines()


def _environment_rows(source: Source) -> Iterator[tuple[str, str]]:
    where = source.result["environment"]
    yield "measured", where["date"]
    yield "commit", where["commit"] or "unknown"
    yield "sources' sha256", where["source_sha256"][:16]
    yield "processor", f"{where['processor']}, {where['cores']} cores, {where['torch_threads']} PyTorch thread(s)"
    yield "system", f"{where['platform']}, Python {where['python']}"
    versions = where["versions"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    absent = [name for name, version in versions.items() if not version]
    if absent:
        yield "not installed", ", ".join(absent)
    drift = source.result.get("ceilings_drift")
    if drift:
        after = ", ".join(f"{name} {100 * share:.0f} %" for name, share in drift.items())
        yield "ceilings after the run", f"{after} of those before it"
    gpu = where.get("gpu")
    if gpu is None:
        yield "GPU", "none used"
        return
    yield (
        "GPU",
        (
            f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['multiprocessors']} multiprocessors, "
            f"{size(gpu['memory_bytes'])}, L2 {size(gpu['l2_bytes'])}"
        ),
    )
    yield "CUDA", f"{gpu['cuda']}, cuDNN {gpu['cudnn']}"
    for when, smi in (("before", gpu["nvidia_smi"]), ("after", source.result.get("nvidia_smi_after"))):
        if smi:
            yield f"GPU {when}", ", ".join(f"{name} {value}" for name, value in smi.items() if name != "name")
    clocks = source.result.get("clocks")
    if clocks:
        ranges = {name: values for name, values in clocks.items() if isinstance(values, dict)}
        seen = [f"{name} {x['min']:g} to {x['max']:g}, median {x['median']:g}" for name, x in ranges.items()]
        yield "GPU meanwhile", f"{'; '.join(seen)}; held down in {100 * clocks['throttled']:.0f} % of the samples"


def environment_section(sources: Sequence[Source]) -> Section:
    """Everything known about where each file was measured."""
    files = []
    for source in sources:
        if "environment" in source.result:
            rows = [row(pair) for pair in _environment_rows(source)]
            files.append(Section(source.path.name, (table(("", ""), rows, left=2),), folded=True))
    return Section("Environment", tuple(files))


def method_section() -> Section:
    """How the figures were taken."""
    return Section("Method", tuple(Text(paragraph) for paragraph in METHOD))


__all__ = [
    "CPU_WARNING",
    "SECTIONS",
    "Source",
    "environment_section",
    "fastest_peer",
    "kernels_summary",
    "lengths_words",
    "method_section",
    "pretrain_table",
    "pretrain_words",
    "section",
]
