"""The section of each kind of result: text, tables, and the places of its plots."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from ..measure.ceilings import Ceilings, Drift
from ..measure.machine import Environment
from ..measure.result import (
    AotResult,
    CalibrationResult,
    CampaignResult,
    EmbedResult,
    FinetuneParityResult,
    FinetuneResult,
    FuseResult,
    KernelsResult,
    OperatorPredictResult,
    ParityResult,
    PassResult,
    PredictResult,
    PretrainReport,
    PretrainResult,
    Profile,
    QualityResult,
    RaceResult,
    Result,
    StepResult,
    StepTime,
    TrainResult,
)
from ..steps.profile import to_do
from .blocks import Block, Figure, Section, Table, Text
from .calibrations import calibration_section, races_section
from .columns import (
    COMPILED,
    GAP,
    LOST,
    NOT_RIGHT,
    PROFILE,
    STAGE,
    STEP,
    SUMMARY,
    TEXTS,
    THREADS,
    AnyContestant,
    Gap,
    NotRight,
    contestants_table,
    finetune_parity_columns,
    fuse_columns,
    kernel_columns,
    milliseconds,
    parity_columns,
    percent,
    quality_columns,
    size,
    string_columns,
    table,
    train_columns,
)
from .predictions import operator_section, prediction_section

CPU_WARNING = (
    "These figures time the CPU path, which runs PyTorch's own operators: they say nothing about the Triton kernels, "
    "nor about any GPU."
)
METHOD = (
    "Verify, then time: before anything is timed, each contestant's result and gradients are compared with a float64 "
    'oracle on fresh random inputs. "error" is the largest relative distance, "× torch" the largest ratio to plain '
    "PyTorch's own distance at that dtype: up to 2 is right, up to 8 is coarse, beyond is wrong and not timed.",
    "Contestants alternate in one process, in a new order each round; inputs rotate beyond the L2 cache; medians are "
    'over the rounds, "spread" is the 10th to the 90th percentile over the median. '
    '"time / ours" is taken within a round, its median with a 95 % bootstrap interval: above 1, ours is faster.',
    '"roofline" is the least time that the bytes and FLOPs of the operation allow at the rates measured on that '
    "machine in the same run (a large copy, a large matrix product), over the time taken. A padded contestant pays "
    "for its padding: only real tokens count. Tokens/s counts real tokens, too.",
)
PROFILED_OPERATORS = 25  # rows of a step's table by operator


@dataclasses.dataclass(frozen=True)
class Source:
    """A result file: its name in the report, which is unique there, its path, and the result."""

    name: str
    path: PurePath
    result: Result


@functools.singledispatch
def section(result: Result, figures: Sequence[Figure] = ()) -> Section:
    """The section of ``result``.

    Args:
        figures: the places of its plots.
    """
    raise TypeError(f"no report of {type(result).__name__}")


def source_section(source: Source, figures: Sequence[Figure]) -> Section:
    """The section of a result file, which names the file, the machine and its ceilings."""
    found = section(source.result, figures)
    environment: Environment | None = getattr(source.result, "environment", None)
    ceilings: Ceilings | None = getattr(source.result, "ceilings", None)
    lines = [f"From {source.path.name}."]
    if environment:
        first, *others = environment.describe().splitlines()
        lines = [f"From {source.path.name}: {first}", *others]
    about = [Text(line) for line in lines]
    about += [Text(CPU_WARNING, warning=True)] if environment and environment.device == "cpu" else []
    about += ceiling_texts(ceilings) if ceilings else []
    return dataclasses.replace(found, blocks=(*about, *found.blocks))


def ceiling_texts(found: Ceilings) -> list[Text]:
    """The measured ceilings."""
    lines = [
        f"measured ceilings: copy {found.copy_bytes_per_s / 1e9:.4g} GB/s (read + written), "
        f"{found.dtype} matmul {found.matmul_flops_per_s / 1e12:.4g} TFLOP/s"
    ]
    linears = found.bert_base_linears
    for name, rates in linears.flops_per_s.items() if linears else ():
        values = ", ".join(f"{which} {rate / 1e12:.0f}" for which, rate in rates.items())
        lines.append(f"BERT-base {name} over {linears and linears.tokens} tokens, TFLOP/s: {values}")
    return [Text(line) for line in lines]


def drift_text(found: Drift) -> Text:
    """The ceilings after the run, beside those before it, which the percentages refer to."""
    share = percent()
    return Text(f"ceilings after the run: copy {share(found.copy)}, matmul {share(found.matmul)} of before")


def remarks(rows: Sequence[AnyContestant]) -> Iterator[Text]:
    """What the table of contestants cannot hold."""
    for row in rows:
        if row.verdict.detail:
            yield Text(f"{row.name}: {row.verdict.status}: {row.verdict.detail}", row.verdict.is_bad)
        if row.time and row.time.timing.host_bound:
            yield Text(f"{row.name}: the host needs as long to issue the calls as the GPU to run them")
        if isinstance(row.time, StepTime) and row.time.micro_batches > 1:
            yield Text(f"{row.name}: in {row.time.micro_batches} micro-batches, because the whole batch does not fit")


# Operators


def pass_section(measured: PassResult, title: str) -> Section:
    """One pass of one case."""
    floor = measured.floor
    shape = ", ".join(f"{name} {value}" for name, value in measured.shape.items())
    least = (
        f"{shape}. At least {milliseconds(floor.floor_ms)} ({floor.limit}-bound: {floor.flops:.3g} FLOPs, "
        f"{size(floor.bytes)})."
    )
    rows = contestants_table(kernel_columns(measured), measured.contestants)
    return Section(title, (Text(least), rows, *remarks(measured.contestants)))


def kernels_summary(results: Sequence[PassResult]) -> Table:
    """A row a pass: ours and the fastest peer that is right."""
    return table(SUMMARY, results, bad=lambda measured: measured.ours is None or measured.ours.verdict.is_bad)


def kernels_gaps(result: KernelsResult) -> list[Text]:
    """The cases that were not measured."""
    found = []
    if result.left_out:
        found.append(Text(f"Left out for want of time: {'; '.join(result.left_out)}."))
    if result.did_not_fit:
        found.append(Text(f"Not measured, for want of memory: {'; '.join(result.did_not_fit)}.", warning=True))
    return found


def _not_right(results: Sequence[PassResult]) -> list[Section]:
    """Contestants that are coarse, wrong or failed, once each."""
    found: dict[tuple[str, ...], NotRight] = {}
    for measured in results:
        for row in measured.contestants:
            if row.verdict.is_bad:
                found[measured.op, measured.case, row.name, row.verdict.status] = NotRight(measured, row)
    rows = table(NOT_RIGHT, found.values(), bad=lambda _: True)
    return [Section("Not right", (rows,))] if found else []


def _missing_peers(results: Sequence[PassResult]) -> list[Section]:
    """Peers that did not run: the reason, and the cases."""
    cases: dict[str, list[str]] = {}  # operator → its cases
    gaps: dict[tuple[str, str, str], tuple[Gap, list[str]]] = {}
    for measured in results:
        if measured.case in cases.setdefault(measured.op, []):
            continue
        cases[measured.op].append(measured.case)
        for missing in measured.missing:
            key = (missing.name, missing.reason, measured.op)
            gaps.setdefault(key, (Gap(missing, measured.op, ""), []))[1].append(measured.case)
    rows = [
        dataclasses.replace(gap, where="every case" if where == cases[gap.op] else "; ".join(where))
        for gap, where in gaps.values()
    ]
    return [Section("Peers that are missing", (table(GAP, rows),))] if rows else []


@section.register
def _(result: KernelsResult, figures: Sequence[Figure] = ()) -> Section:
    blocks: list[Block] = []
    if result.seconds is None:
        blocks.append(Text("This run was cut short. It had measured what follows.", warning=True))
    blocks += kernels_gaps(result)
    blocks.append(kernels_summary(result.results))
    blocks += [*_not_right(result.results), *_missing_peers(result.results), *figures]
    for op in dict.fromkeys(measured.op for measured in result.results):
        cases = [pass_section(x, f"{x.case}, {x.pass_name}") for x in result.results if x.op == op]
        blocks.append(Section(f"{op}: every case", tuple(cases), folded=True))
    return Section(f"Operators, {result.settings.dtype}, {result.environment.device_name}", tuple(blocks))


# Steps and runs


def lengths_words(ragged: bool, seqlen: int) -> str:
    """The lengths of a step's segments."""
    return f"ragged up to {seqlen}" if ragged else f"all {seqlen}"


def profile_section(profile: Profile) -> Section:
    """Our step by operator, and the operators that the machine's rates would let go faster."""
    rows, total = profile.operators[:PROFILED_OPERATORS], profile.operator_ms
    blocks: list[Block] = [
        Text(
            f"{total:.1f} ms in operators, of {profile.ms:.1f} ms under the profiler. The rest is Python, autograd, "
            "gaps and the profiler itself."
        ),
        table(PROFILE, rows),
    ]
    if others := profile.operators[PROFILED_OPERATORS:]:
        ms = sum(row.ms for row in others)
        blocks.append(Text(f"{len(others)} more operators: {ms:.3f} ms, {100 * ms / total:.1f} %."))
    if lost := to_do(profile):
        blocks.append(Section("Operators below their roofline", (table(LOST, lost),)))
    return Section("Our step by operator", tuple(blocks))


@section.register
def _(result: StepResult, figures: Sequence[Figure] = ()) -> Section:
    settings, batch = result.settings, result.batch
    threads = any(row.time and row.time.threads for row in result.contestants)
    blocks: list[Block] = [
        Text(
            f"Forward, backward, clip and AdamW on {batch.tokens:,.0f} real tokens in {batch.sequences:,.0f} "
            f"sequences, {batch.masked:,.0f} of them masked, dropout {settings.dropout}, vocabulary "
            f"{settings.vocab_size:,}. Padded to the longest, as Transformers takes it, "
            f"{100 * batch.padding_for_transformers:.0f} % of the slots would be padding."
        ),
        contestants_table((*STEP, THREADS) if threads else STEP, result.contestants),
        *remarks(result.contestants),
        *(Text(f"{name}: left out for want of time") for name in result.left_out),
        *figures,
        *([profile_section(result.profile)] if result.profile else []),
    ]
    lengths = lengths_words(settings.ragged, settings.seqlen)
    title = f"Training step, {settings.model}, {settings.compute_dtype}, lengths {lengths}"
    return Section(f"{title}, {result.environment.device_name}", tuple(blocks))


@section.register
def _(result: TrainResult, figures: Sequence[Figure] = ()) -> Section:
    settings = result.settings
    step = next((x.time.loss_at_same_step.step for x in result.contestants if x.time), 0)
    blocks: list[Block] = [
        Text(
            f"A real run on {settings.data}, loader and all: {settings.tokens:,} token slots a step, segments up "
            f"to {settings.seqlen}, dropout {settings.dropout}, {settings.minutes:g} minutes for all, in "
            "turns, from the same weights over the same examples. Losses are masked LM + next sentence, in nats."
        ),
        contestants_table(train_columns(step), result.contestants),
        *remarks(result.contestants),
        *figures,
    ]
    title = f"Training run beside Transformers, {settings.model}, {settings.compute_dtype}"
    return Section(f"{title}, {result.environment.device_name}", tuple(blocks))


def fuse_table(result: FuseResult) -> Table:
    """A row a case."""
    cases = result.cases
    return table(fuse_columns(cases), cases, bad=lambda case: any(x.verdict.is_bad for x in case.contestants))


@section.register
def _(result: FuseResult, figures: Sequence[Figure] = ()) -> Section:
    settings = result.settings
    blocks: list[Block] = [
        Text(
            f"{result.architecture}, dropout {settings.dropout}; {result.fused}. Forward in evaluation mode; forward + "
            "backward in training mode, without an optimiser. Time over ours: above 1, the fused model is faster."
        ),
        *([fuse_table(result)] if result.cases else []),
        *(text for case in result.cases for text in remarks(case.contestants)),
        *([Text(f"Left out: {'; '.join(result.left_out)}.")] if result.left_out else []),
        *figures,
    ]
    title = f"fuse, {settings.model}, {settings.compute_dtype}, {result.environment.device_name}"
    return Section(title, tuple(blocks))


@section.register
def _(result: EmbedResult, figures: Sequence[Figure] = ()) -> Section:
    settings = result.settings
    blocks: list[Block] = [
        Text(
            f"{settings.count:,} texts ({settings.texts or 'docstrings of installed packages'}), {result.tokens:,} "
            f"tokens, to vectors, tokenizer included; {result.architecture}. Batches of {settings.batch} texts are "
            f"{100 * result.padding_sorted:.0f} % padding sorted and {100 * result.padding_unsorted:.0f} % unsorted. "
            f"{settings.threads} threads of PyTorch. Error: the largest difference from sentence-transformers in fp32."
        ),
        contestants_table(TEXTS, result.contestants),
        *remarks(result.contestants),
        *figures,
    ]
    title = f"embed, {settings.model}, {settings.compute_dtype}, {result.environment.device_name}"
    return Section(title, tuple(blocks))


@section.register
def _(result: FinetuneResult, figures: Sequence[Figure] = ()) -> Section:
    settings, steps = result.settings, len(next(iter(result.losses.values()), []))
    blocks: list[Block] = [
        Text(
            f"{result.architecture}, classification; steps of {settings.batch} texts "
            f"({settings.texts or 'docstrings of installed packages'}), {result.mean_tokens:.0f} tokens on average, at "
            f"most {settings.seqlen}: batch, forward, backward, clip, AdamW. {settings.threads} threads of PyTorch. "
            f"Error: the largest relative difference of the losses of the first {steps} steps in fp32 without dropout."
        ),
        contestants_table(TEXTS, result.contestants),
        *remarks(result.contestants),
        *figures,
    ]
    title = f"finetune, {settings.model}, {settings.compute_dtype}, {result.environment.device_name}"
    return Section(title, tuple(blocks))


@section.register
def _(result: FinetuneParityResult, figures: Sequence[Figure] = ()) -> Section:
    settings, found = result.settings, result.difference
    within = not result.problems
    blocks: list[Block] = [
        Text(
            f"{result.architecture}, {result.classes} classes; {result.train_texts:,} training texts "
            f"({settings.train or 'sentences of docstrings of the installed packages'}), {result.mean_tokens:.0f} "
            f"tokens on average, {settings.epochs} epochs in steps of {settings.batch}, learning rate {settings.lr:g}. "
            f"Accuracy on {result.dev_texts:,} other texts after the last epoch."
        ),
        Text(
            f"ours − theirs {100 * found.mean:+.2f} points, 95 % interval [{100 * found.low:+.2f}, "
            f"{100 * found.high:+.2f}]: {'within' if within else 'OUTSIDE'} the noise of a seed.",
            warning=not within,
        ),
        finetune_parity_table(result),
        *figures,
    ]
    title = f"finetune beside Transformers, {settings.model}, {settings.compute_dtype}"
    return Section(f"{title}, {result.environment.device_name}", tuple(blocks))


def finetune_parity_table(result: FinetuneParityResult) -> Table:
    """A row for ours and one for Transformers'."""
    return table(
        finetune_parity_columns(result.settings.seeds),
        result.accuracy.items(),
        role=lambda row: "ours" if row[0] == "fusebert" else "peer",
    )


def quality_table(result: QualityResult) -> Table:
    """A row a recipe."""
    return table(quality_columns(result), result.recipes)


@section.register
def _(result: QualityResult, figures: Sequence[Figure] = ()) -> Section:
    settings = result.settings
    if not result.recipes:
        return Section("Recipes", (Text("This run was cut short before all recipes had run.", warning=True),))
    blocks: list[Block] = [
        Text(
            f"{settings.model} on {settings.data} ({result.corpus.train_tokens:,} training tokens, unigram entropy "
            f"{result.unigram_entropy:.3f}), {result.device}. Mean [least, most] of {len(result.recipes[0].runs)} "
            "seeds. Held-out loss in nats, always at 15 % masked. The target is the last held-out loss of "
            f"{result.recipes[0].name} with the same seed; tokens and time until then, without evaluations, are over "
            "those of that whole run: below 1, the recipe needs less. Equal time: less the values of that run when the "
            "shorter of the two ends."
        ),
        quality_table(result),
        *figures,
    ]
    return Section(f"Recipes, {settings.model}, {result.environment.device_name}", tuple(blocks))


@section.register
def _(result: ParityResult, figures: Sequence[Figure] = ()) -> Section:
    settings, right = result.settings, result.verdict.right
    rows = table(
        parity_columns(settings.steps),
        result.runs.items(),
        bad=lambda run: run[0] == "fusebert" and not right,
        role=lambda run: "ours" if run[0] == "fusebert" else "peer",
    )
    blocks: list[Block] = [
        Text(
            f"Same initial weights, same batches, no dropout: {settings.steps} steps of {settings.tokens:,} "
            f"tokens, {settings.layers} layers of {settings.hidden_size}, lengths "
            f"{lengths_words(settings.ragged, settings.seqlen)}."
        ),
        Text(
            f"{parity_words(result)}: distance from the float32 loss {parity_drift(result)}. {result.speed_up:.2f} "
            "times the tokens/s (one timing, no interval).",
            warning=not right,
        ),
        rows,
        *figures,
    ]
    title = f"Training beside Transformers, {settings.compute_dtype}"
    return Section(f"{title}, {result.environment.device_name}", tuple(blocks))


def parity_words(result: ParityResult) -> str:
    """Whether both trained the same run."""
    return "the same run" if result.verdict.right else "NOT THE SAME RUN"


def parity_drift(result: ParityResult) -> str:
    """The drift that decides, and what is allowed."""
    which, drift, allowed = result.verdict.criterion
    return f"{which} {drift:.2e}, allowed {allowed:.2e}"


def pretrain_table(report: PretrainReport) -> Table:
    """Held-out figures before and after a run."""
    before, after = report.before, report.after
    share = percent(1)

    def row(title: str, read: str, words: object) -> tuple[str, str, str]:
        return title, *(words(getattr(x, read)) for x in (before, after))  # type: ignore[operator,return-value]

    loss = f"masked-LM loss (nats; unigram entropy of the text: {report.unigram_entropy:.3f})"
    rows = [row(loss, "mlm_loss", "{:.3f}".format), row("masked-LM accuracy", "mlm_accuracy", share)]
    if before.nsp_accuracy is not None and after.nsp_accuracy is not None:
        rows.append(row("next-sentence accuracy", "nsp_accuracy", share))
    return table(string_columns("held-out", "before", "after", words=1), rows)


def _count(n: float) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e5 else f"{n:,.0f}"


def pretrain_words(result: PretrainResult) -> str:
    """What a run consisted of."""
    report, corpus = result.report, result.corpus
    minutes, seconds = divmod(round(report.seconds), 60)
    return (
        f"{report.model}, {_count(report.parameters)} parameters, vocabulary {corpus.vocab_size:,}, "
        f"{report.precision}, {minutes} min {seconds} s of training on {_count(corpus.train_tokens)} tokens "
        f"of text: {report.steps:,} steps, {_count(report.tokens)} tokens seen, "
        f"{report.tokens_per_second:,.0f} real tokens/s."
    )


@section.register
def _(result: PretrainResult, figures: Sequence[Figure] = ()) -> Section:
    report = result.report
    blocks: tuple[Block, ...] = (
        Text(pretrain_words(result)),
        pretrain_table(report),
        Text(f"Loss after, {report.after.mlm_loss:.3f}, is {report.verdict}."),
        *figures,
    )
    return Section(f"Pretraining run, {report.model}, {result.environment.device_name}", blocks)


# What is not timed


@section.register
def _(result: AotResult, figures: Sequence[Figure] = ()) -> Section:
    about, kernels = result.about, result.kernels
    spilling = sum(kernel.spill_bytes > 0 for kernel in kernels)
    blocks: tuple[Block, ...] = (
        Text(
            f"Compiled for {about.arch} with Triton {about.triton}, PyTorch {about.torch}, {about.date}; "
            "bfloat16 where a case names nothing else. Nothing here was run or timed: these are the compiler's "
            f"figures. {spilling} of {len(kernels)} kernels spill registers."
        ),
        Section("every kernel", (table(COMPILED, kernels, bad=lambda kernel: kernel.spill_bytes > 0),), folded=True),
        *figures,
    )
    return Section(f"Compiled kernels, {about.arch}", blocks)


@section.register
def _(result: PredictResult, figures: Sequence[Figure] = ()) -> Section:
    found = prediction_section(result)
    return dataclasses.replace(found, blocks=(*found.blocks, *figures))


@section.register
def _(result: OperatorPredictResult, figures: Sequence[Figure] = ()) -> Section:
    found = operator_section(result)
    return dataclasses.replace(found, blocks=(*found.blocks, *figures))


@section.register
def _(result: CalibrationResult, figures: Sequence[Figure] = ()) -> Section:
    found = calibration_section(result)
    return dataclasses.replace(found, blocks=(*found.blocks, *figures))


@section.register
def _(result: RaceResult, figures: Sequence[Figure] = ()) -> Section:
    found = races_section(result)
    return dataclasses.replace(found, blocks=(*found.blocks, *figures))


@section.register
def _(result: CampaignResult, figures: Sequence[Figure] = ()) -> Section:
    blocks: tuple[Block, ...] = (
        Text(f"{result.seconds} s in all, commit {result.commit or 'unknown'}."),
        table(STAGE, result.stages, bad=lambda stage: stage.exit_status != 0),
        *(Text(f"not run: {gap}") for gap in result.gaps),
        *figures,
    )
    return Section("Campaign", blocks)


# Method and environment


def method_section() -> Section:
    """How the figures were taken."""
    return Section("Method", tuple(Text(paragraph) for paragraph in METHOD))


def _environment_rows(result: Result, where: Environment) -> Iterator[tuple[str, str]]:
    yield "measured", where.date
    yield "commit", where.commit or "unknown"
    yield "sources' sha256", where.source_sha256[:16]
    yield "processor", f"{where.processor}, {where.cores} cores, {where.torch_threads} PyTorch thread(s)"
    yield "system", f"{where.platform}, Python {where.python}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in where.versions.items() if version)
    if absent := [name for name, version in where.versions.items() if not version]:
        yield "not installed", ", ".join(absent)
    drift, clocks = getattr(result, "ceilings_drift", None), getattr(result, "clocks", None)
    if drift:
        yield "ceilings", drift_text(drift).text
    if (gpu := where.gpu) is None:
        yield "GPU", "none used"
        return
    yield (
        "GPU",
        f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.multiprocessors} multiprocessors, "
        f"{size(gpu.memory_bytes)}, L2 {size(gpu.l2_bytes)}",
    )
    yield "CUDA", f"{gpu.cuda}, cuDNN {gpu.cudnn}"
    for when, smi in (("before", gpu.nvidia_smi), ("after", getattr(result, "nvidia_smi_after", None))):
        if smi:
            yield f"GPU {when}", ", ".join(f"{name} {value}" for name, value in smi.items() if name != "name")
    if clocks:
        yield "GPU meanwhile", clocks.describe()


def environment_section(sources: Sequence[Source]) -> Section:
    """Everything known about where each file was measured."""
    files = []
    for source in sources:
        where: Environment | None = getattr(source.result, "environment", None)
        if where:
            rows = table(string_columns("", "", words=2), list(_environment_rows(source.result, where)))
            files.append(Section(source.path.name, (rows,), folded=True))
    return Section("Environment", tuple(files))
