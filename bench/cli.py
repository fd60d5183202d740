"""``fusebert bench``: the operators and the training step against reference, peers and the machine's own limits.

The options are the fields of the classes in `measure.settings`. Heavy modules are imported when a command runs.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..train.errors import UserError
from ..train.options import command
from .measure.settings import (
    CalibrateOptions,
    EmbedBenchOptions,
    FinetuneBenchOptions,
    FinetuneParityOptions,
    FuseOptions,
    KernelsOptions,
    ParityOptions,
    PredictOptions,
    QualityOptions,
    RunOptions,
    StepOptions,
    TrainOptions,
    TuneOptions,
    resolve,
)

if TYPE_CHECKING:
    import torch

    from .measure.result import Result

# Typer keeps the line breaks of a command's second paragraph: those below are wrapped for a terminal of 80 columns.
app = typer.Typer(
    name="bench",
    help="Time the operators and the training step against PyTorch, peers and the measured limits of the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _device(options: RunOptions) -> torch.device:
    import torch

    name = options.device
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such device; give cuda, cuda:N or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: only CUDA GPUs and the CPU are timed")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA GPU(s) here; give --device cpu"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _fail_on_problems(result: Result) -> None:
    for problem in result.problems:
        typer.echo(f"WRONG: {problem}", err=True)
    if result.problems:
        raise typer.Exit(1)


def kernels(options: KernelsOptions) -> None:
    """Each operator, forward and backward, against PyTorch and every peer that is installed.

    A table for each shape. "error" is the largest relative distance of a
    result or gradient from the float64 oracle, "× torch" the largest ratio to
    plain PyTorch's own: up to 2 is right, up to 8 is coarse, beyond is wrong
    and not timed. "time / ours" above 1: ours is faster; with its 95 %
    interval. "roofline": the least time that the bytes and FLOPs of the
    operation allow at this machine's measured rates, over the time taken. A
    peer that is not installed is named with the command that installs it.
    Ends with status 1 if one of our own operators is not right.

    \b
    --peers: names as the tables have them, or their first words, separated by
    commas: "sdpa" is every SDPA backend.
    --shapes: keys with values, separated by commas; shapes, by semicolons:
      --op attention --shapes "N=128; N=512,D=128,lengths=half,p=0.1"
    A key left out has its default. The keys:
      attention        N the longest segment, T tokens, H heads, D size of a
                       head, p dropout, lengths equal, real or half (half of
                       a padded batch is padding; real: bench/operators/segments.py)
      layernorm        T rows, H elements of a row, p dropout
      mlm_loss         M rows, H elements of a row, V words
      bias_gelu        T rows, I elements of a row
      linear_gelu      T rows, H elements of a row, I of a result's row, gelu
                       erf or tanh
      gelu_linear      T rows, I elements of a row, H of a result's row, gelu
                       erf or tanh
      embed_layernorm  T tokens, H elements of a row, V words, p dropout
    """
    from .operators.run import run
    from .report.terminal import show

    device = _device(options)
    _fail_on_problems(run(resolve(options, device.type == "cuda"), device, show=show))


def step(options: StepOptions) -> None:
    """One training step (forward, backward, clip, AdamW) against Transformers' BertForPreTraining on the same examples.

    The examples are random, with BERT's masking; ragged lengths are log-
    normal around 0.45 of --seqlen. Ours runs them packed; Transformers gets
    them padded to the longest, as its users do. Tokens/s counts real tokens
    only. A contestant with a wrong gradient (see "fusebert bench kernels
    --help") is not timed. Then a table of our step by operator, and the list
    of operators that are slower than the machine allows.
    """
    from .report.terminal import show
    from .steps.step import run

    device = _device(options)
    _fail_on_problems(run(resolve(options, device.type == "cuda"), device, show=show))


def train(options: TrainOptions) -> None:
    """A real training run, loader and all, beside Transformers' on the same examples: tokens/s and the loss.

    The same weights, examples, order and learning rates. Our time includes
    the loader; Transformers gets its batches padded ahead of time. They take
    turns; tokens/s counts real tokens only. At the same step the
    losses must agree but for the dropout masks. Ends with status 1 if ours
    gives another held-out loss than Transformers before training.
    """
    from .report.terminal import show
    from .steps.train import run

    device = _device(options)
    on_gpu = device.type == "cuda"
    if options.workers is None:
        workers = min(8, max(1, (os.cpu_count() or 2) - 1)) if on_gpu else 0
        options = dataclasses.replace(options, workers=workers)
    _fail_on_problems(run(resolve(options, on_gpu), device, show=show))


def fuse(options: FuseOptions) -> None:
    """A Hugging Face encoder fused with unpad=True, against the same encoder unfused (SDPA), eager and compiled.

    For each number of sequences, longest length and share of padding:
    forward in evaluation mode, and forward + backward in training mode.
    "unfused / ours" above 1: the fused model is faster; with its 95 %
    interval. Before it is timed, the fused model is compared with the
    unfused one in float64. Ends with status 1 if it is not right.

    \b
      fusebert bench fuse
      fusebert bench fuse --model models/mine --seqlens 128 --batches 32
    """
    from .report.terminal import show
    from .steps.fuse import run

    device = _device(options)
    resolved = resolve(options, device.type == "cuda", tokens_on_cpu=4096)
    _fail_on_problems(run(resolved, device, show=show))


def embed(options: EmbedBenchOptions) -> None:
    """Texts to vectors: `fusebert embed`'s path against sentence-transformers, with sorted and with unsorted batches.

    The same folder, texts and precision, tokenizer included, in one process;
    contestants take turns. "time / ours" above 1: ours is faster; with its
    95 % interval. Tokens/s counts real tokens only. Before anything is timed,
    our vectors must be sentence-transformers' to 1e-5. Ends with status 1 if
    they are not.

    \b
      fusebert bench embed
      fusebert bench embed --model models/mine --texts reviews.tsv --text body
    """
    from .report.terminal import show
    from .steps.embed import run

    device = _device(options)
    _fail_on_problems(run(resolve(options, device.type == "cuda"), device, show=show))


def finetune(options: FinetuneBenchOptions) -> None:
    """A fine-tuning step of a classifier against Transformers', padded to the batch's longest text and to max_length.

    The same weights, texts, order and optimiser; contestants take turns.
    Transformers' is a plain loop of what its Trainer does in a step. "time /
    ours" above 1: ours is faster; with its 95 % interval. Tokens/s counts
    real tokens only. Before anything is timed, the losses of the first 20
    steps without dropout must agree to 1e-4. Ends with status 1 if they do
    not.

    \b
      fusebert bench finetune
      fusebert bench finetune --model models/mine --texts reviews.tsv --text body
    """
    from .report.terminal import show
    from .steps.finetune import run

    device = _device(options)
    _fail_on_problems(run(resolve(options, device.type == "cuda"), device, show=show))


def finetune_parity(options: FinetuneParityOptions) -> None:
    """Fine-tune a classifier by us and by Transformers with several seeds; compare the accuracies on other texts.

    The same weights, head, texts, order, optimiser and learning rates;
    dropout draws its own masks in each. Mean and standard deviation over the
    seeds, and the mean difference with its 95 % interval (paired t). Ends
    with status 1 if 0 is outside of the interval.

    \b
      fusebert bench finetune-parity
      fusebert bench finetune-parity --model models/mine --train train.tsv --dev dev.tsv
    """
    from .report.terminal import show
    from .steps.finetune_parity import run

    device = _device(options)
    _fail_on_problems(run(resolve(options, device.type == "cuda"), device, show=show))


def quality(options: QualityOptions) -> None:
    """Training recipes against each other: tokens and seconds until a held-out loss, over several seeds.

    Each run is `fusebert pretrain` in a process of its own; recipes take
    turns. The target is the final loss of the first recipe with the same
    seed. Held-out loss is always measured with 15 % masked, whatever the
    recipe masks.

    \b
      fusebert bench quality --data data/pydocs --recipes "bert; fast"
      fusebert bench quality --data data/pydocs --steps 600 --seeds 5 \\
        --recipes "bert; bert, optimizer=muon; fast; fast, steps=200"
      fusebert bench quality --data data/pydocs --seeds 9 --out q.json --resume
    """
    from .report.terminal import show
    from .steps.quality import run

    run(options, _device(options), show=show)


def parity(options: ParityOptions) -> None:
    """Train ours and Transformers' from the same weights on the same batches; compare loss curves and tokens/s.

    No dropout, ragged lengths. In fp32 the losses must agree to 1e-3 at every
    step. In bf16 our distance from Transformers' fp32 run may be at most twice
    that of Transformers' bf16 run. Ends with status 1 otherwise.
    """
    from .report.run_plots import parity_plots
    from .report.terminal import show
    from .report.theme import LIGHT, render
    from .steps.parity import run

    device = _device(options)
    result = run(resolve(options, device.type == "cuda", tokens_on_gpu=8192), device, show=show)
    if options.plot is not None:
        (losses,) = parity_plots(result)
        try:
            image = render(losses, LIGHT)
        except ModuleNotFoundError as error:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from error
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_bytes(image)
    _fail_on_problems(result)


def tune(options: TuneOptions) -> None:
    """Derive attention's launch table anew: by measurement on that GPU, elsewhere by the compiler alone.

    Prints the entries for TABLES and MASKED in kernels/attn/config.py.
    Takes minutes. --kernels rows races the configuration that is launched
    today against the candidates of the short attention kernels, LayerNorm and
    the embeddings: predicted times and, on a GPU, measured ones, with the 95 %
    interval of the ratio. The largest expected gain comes first: the predicted
    sum of what is launched less a candidate's, times launches a step.
    """
    import torch

    from ..kernels import backend
    from .compiled import candidates
    from .compiled import tune as suite
    from .compiled.aot import LIMITS
    from .report.terminal import show

    if options.kernels not in ("attention", "rows"):
        raise UserError(f"--kernels {options.kernels}: choose one of attention, rows")
    arch = backend.architecture() if options.arch is None else options.arch
    if arch not in LIMITS:
        raise UserError(f"--arch {arch}: choose one of {', '.join(map(str, LIMITS))}")
    dtype = getattr(torch, resolve(options, False, dtypes=("bf16", "fp32")).dtype)
    if options.kernels == "rows":
        _fail_on_problems(candidates.race(options, arch, dtype, show))
        return
    if options.out is not None or options.minutes is not None:
        raise UserError("--out and --minutes go with --kernels rows")
    table, masked = suite.derive(arch, dtype, lambda line: typer.echo(line, err=True))
    typer.echo(suite.as_code(arch, dtype, table))
    typer.echo(suite.as_code(arch, dtype, masked))


def predict(options: PredictOptions) -> None:
    """A training step or an operator on a GPU that need not be here, predicted from the compiled code, not timed.

    For each launch of ours: issue slots, arithmetic pipes,
    special functions, matrix instructions, shared memory, L2 and HBM, each
    as the microseconds it takes if nothing else did. "bound": the largest,
    if all overlap; "sum": if none do. Matrix products and PyTorch's own
    operators are taken at fixed rates (bench/measure/gpus.py). Then the
    step's tokens/s by both. Takes about a minute on a CPU.
    `fusebert bench compare` takes two of its files.

    \b
      fusebert bench predict --gpu h200
      fusebert bench predict --gpu h100 --model large --seqlen 512 --ragged
    With --op, one operator, forward and backward, beside its floor: the least
    time for its FLOPs and bytes at the GPU's rates. --shapes is written as for
    bench kernels; "fusebert bench kernels --help" lists the keys. Attention of
    B segments of N tokens has T = B x N, H heads of size D, dropout p:
      fusebert bench predict --op attention --shapes "N=512,T=65536,H=12,D=64"
      fusebert bench predict --op layernorm --shapes "H=768; H=1024" --gpu b200
    """
    from .report.terminal import show

    if options.op is None and options.shapes is not None:
        raise UserError("--shapes belongs to one operator: give --op with it")
    if options.op is not None:
        from .operators.predict import run as run_operator

        run_operator(options, show=show)
        return
    from .steps.predict import run

    run(options, show=show)


def calibrate(options: CalibrateOptions) -> None:
    """Each kernel of a predicted step on this GPU: predicted bound and sum, measured time, and their ratios.

    As fusebert bench predict; then each launch is run on the GPU with the
    shapes, strides and integers that it has in the step, on random numbers.
    The kernels that take most of a step come first. "measured / bound" and
    "measured / sum" with their 95 % intervals. Predicting takes about a
    minute of CPU, measuring half a second a kernel.

    \b
      fusebert bench calibrate --model base --seqlen 128 --out calibrate.json
    """
    from .report.terminal import show
    from .steps.calibrate import run

    _fail_on_problems(run(options, _device(options), show=show))


app.command("kernels")(command(KernelsOptions, kernels))
app.command("step")(command(StepOptions, step))
app.command("train")(command(TrainOptions, train))
app.command("fuse")(command(FuseOptions, fuse))
app.command("embed")(command(EmbedBenchOptions, embed))
app.command("finetune")(command(FinetuneBenchOptions, finetune))
app.command("finetune-parity")(command(FinetuneParityOptions, finetune_parity))
app.command("quality")(command(QualityOptions, quality))
app.command("parity")(command(ParityOptions, parity))
app.command("tune")(command(TuneOptions, tune))
app.command("predict")(command(PredictOptions, predict))
app.command("calibrate")(command(CalibrateOptions, calibrate))


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that the other commands wrote with --out.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the plots.")],
) -> None:
    """Turn result files into one page that can be mailed, the same as Markdown, and a PNG for every plot.

    The page loads nothing from elsewhere. Plots need matplotlib; without it
    there are tables alone.
    """
    from .report.write import write_report

    write_report(results, out, say=typer.echo)


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Result file of kernels, step, train or predict: what was.")],
    new: Annotated[Path, typer.Argument(help="The same made again: what is.")],
    threshold: Annotated[
        float, typer.Option(help="Slower by no more than this share of the time is let pass.", min=0.0)
    ] = 0.03,
) -> None:
    """Is anything of ours slower than it was? Ends with status 1 if so.

    Each pass of each case: new time / old time with its interval, from the
    stored samples; 95 % for all rows together. Where PyTorch and the peers
    are the same versions, what slowed them down as well is the machine, and
    is divided out. Slower: the whole interval lies above 1 + threshold. A
    contestant of ours that was right and is not any more also ends with
    status 1; files that can not be compared (another GPU, no case in common)
    with status 2. Of two predictions, each kernel's issue slots, bound, sum
    and spills are compared, without an interval.
    """
    from .report import compare as gate

    if not gate.run(old, new, threshold=threshold, say=typer.echo):
        raise typer.Exit(1)


def main(args: list[str] | None = None) -> Any:
    """The commands above without the rest of fusebert's: ``python -m fusebert.bench.cli kernels``."""
    try:
        return app(args)
    except (UserError, ValueError) as error:
        typer.echo(f"fusebert: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
