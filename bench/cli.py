"""``fusebert bench``: the operators and the training step against reference, peers and the machine's own limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..train.errors import UserError

if TYPE_CHECKING:
    import torch

# Typer keeps the line breaks of a command's second paragraph: those below are wrapped for a terminal of 80 columns.
app = typer.Typer(
    name="bench",
    help="Time the operators and the training step against PyTorch, peers and the measured limits of the machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[
    str | None, typer.Option(help="cuda, cuda:1, cpu. Default: the GPU if there is one.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Write environment, settings and every figure here, as JSON.")]
Minutes = Annotated[
    float | None, typer.Option(help="Take about so long: what is most worth knowing comes first.", min=0.05)
]
Quick = Annotated[bool, typer.Option("--quick", help="A smoke test: few cases, little measuring.")]
Dtype = Annotated[
    str | None, typer.Option(help="bf16, fp16 or fp32. Default: bf16 on a GPU, fp32 on a CPU.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(help="tiny, mini, small, base or large. Default: base on a GPU, tiny on a CPU.", show_default=False),
]
Tokens = Annotated[int | None, typer.Option(help="Token slots in a batch. Default: by the device.", show_default=False)]
Seqlen = Annotated[int, typer.Option(help="The longest sequence.")]
Vocab = Annotated[int, typer.Option(help="Words in the vocabulary.")]

TRAINING_DTYPES = ("bf16", "fp32")


def _device(name: str | None) -> torch.device:
    import torch

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


def _dtype(name: str | None, device: torch.device, allowed: tuple[str, ...]) -> torch.dtype:
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    if name not in allowed:
        raise UserError(f"--dtype {name}: choose one of {', '.join(allowed)}")
    return dtypes[name]


def _by_device(device: torch.device, model: str | None, tokens: int | None, *, on_gpu: int) -> tuple[str, int]:
    """(preset, tokens), the device's own where they were not given."""
    on_cuda = device.type == "cuda"
    return model or ("base" if on_cuda else "tiny"), (on_gpu if on_cuda else 1024) if tokens is None else tokens


def _fail_unless(right: bool, problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"WRONG: {problem}", err=True)
    if not right:
        raise typer.Exit(1)


@app.command()
def kernels(
    op: Annotated[
        str | None,
        typer.Option(
            help="attention, layernorm, mlm_loss, bias_gelu, linear_gelu, gelu_linear, embed_layernorm. Default: all.",
            show_default=False,
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(help="Your own shapes for --op, as below. Default: the built-in ones.", show_default=False),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help='Only these peers: "sdpa, flex_attention". Default: all that run.', show_default=False),
    ] = None,
    dtype: Dtype = None,
    quick: Quick = False,
    minutes: Minutes = None,
    out: Out = None,
    device: Device = None,
) -> None:
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
    from .operators import run as suite
    from .report.terminal import show

    where = _device(device)
    if op is not None and op not in suite.OPERATORS:
        raise UserError(f"--op {op}: choose one of {', '.join(suite.OPERATORS)}")
    chosen = _dtype(dtype, where, ("bf16", "fp16", "fp32"))
    if shapes is not None and op is None:
        raise UserError(f"--shapes belongs to one operator: give --op with it, one of {', '.join(suite.OPERATORS)}")
    names = None if peers is None else [name.strip() for name in peers.split(",") if name.strip()]
    try:
        suite.select_cases(op, where, chosen, quick=quick, shapes=shapes, peers=names)
    except ValueError as error:
        raise UserError(f"--peers or --shapes: {error}") from error
    result = suite.run(
        where, chosen, op=op, shapes=shapes, peers=names, quick=quick, minutes=minutes, out=out, show=show
    )
    problems = suite.ours_that_are_not_right(result)
    _fail_unless(not problems, problems)


@app.command()
def step(
    model: Model = None,
    seqlen: Seqlen = 128,
    tokens: Tokens = None,
    ragged: Annotated[
        bool, typer.Option("--ragged/--equal", help="Lengths vary up to --seqlen, or all are --seqlen.")
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Also race the models under torch.compile (minutes to compile)."),
    ] = False,
    dropout: Annotated[float, typer.Option(help="Dropout probability of hidden states and attention.")] = 0.1,
    vocab_size: Vocab = 30522,
    data: Annotated[
        Path | None,
        typer.Option(help="A prepared corpus: its examples, lengths and vocabulary in place of random ones."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast over fp32 weights) or fp32.", show_default=False)
    ] = None,
    quick: Quick = False,
    minutes: Minutes = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """One training step (forward, backward, clip, AdamW) against Transformers' BertForPreTraining on the same examples.

    The examples are random, with BERT's masking; ragged lengths are log-
    normal around 0.45 of --seqlen. Ours runs them packed; Transformers gets
    them padded to the longest, as its users do. Tokens/s counts real tokens
    only. A contestant whose gradients are not right (see "fusebert bench
    kernels --help") is not timed. Then a table of our step by operator, and
    the list of those that the machine would let go faster.
    """
    from .report.terminal import show
    from .steps import step as suite

    where = _device(device)
    chosen = _dtype(dtype, where, TRAINING_DTYPES)
    model, tokens = _by_device(where, model, tokens, on_gpu=65536)
    settings = suite.Settings(model, tokens, seqlen, ragged, dropout, compiled, vocab_size, data)
    result = suite.run(settings, where, chosen, quick=quick, minutes=minutes, out=out, show=show)
    problems = suite.ours_that_are_not_right(result)
    _fail_unless(not problems, problems)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="A corpus that `fusebert prepare` made.")],
    minutes: Annotated[
        float, typer.Option(help="Of training, all contestants together; compiling comes on top.", min=0.01)
    ] = 3.0,
    model: Model = None,
    seqlen: Seqlen = 128,
    tokens: Tokens = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Also Transformers under torch.compile.")
    ] = False,
    dropout: Annotated[float, typer.Option(help="Dropout probability of hidden states and attention.")] = 0.1,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that make our batches. Default: up to 8, on a CPU 0.", min=0, show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast over fp32 weights) or fp32.", show_default=False)
    ] = None,
    out: Out = None,
    device: Device = None,
) -> None:
    """A real training run, loader and all, beside Transformers' on the same examples: tokens/s and the loss.

    The same weights, examples, order and learning rates. Ours packs, and
    pays for its loader; Transformers gets its batches padded ahead of time.
    They take turns; tokens/s counts real tokens only. At the same step the
    losses must agree but for the dropout masks. Ends with status 1 if ours
    gives another held-out loss than Transformers before training.
    """
    import os

    from .report.terminal import show
    from .steps import train as suite

    where = _device(device)
    chosen = _dtype(dtype, where, TRAINING_DTYPES)
    model, tokens = _by_device(where, model, tokens, on_gpu=65536)
    if workers is None:
        workers = min(8, max(1, (os.cpu_count() or 2) - 1)) if where.type == "cuda" else 0
    settings = suite.Settings(data, model, tokens, seqlen, dropout, compiled, workers, minutes)
    result = suite.run(settings, where, chosen, out=out, show=show)
    problems = suite.ours_that_are_not_right(result)
    _fail_unless(not problems, problems)


@app.command()
def parity(
    model: Model = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    seqlen: Seqlen = 128,
    tokens: Tokens = None,
    vocab_size: Vocab = 30522,
    dtype: Annotated[
        str | None, typer.Option(help="bf16 (autocast over fp32 weights) or fp32.", show_default=False)
    ] = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the loss curves here, as PNG.")] = None,
    device: Device = None,
) -> None:
    """Train ours and Transformers' from the same weights on the same batches; compare loss curves and tokens/s.

    No dropout, ragged lengths. In fp32 the losses must agree to 1e-3 at every
    step. In bf16 ours must stay as near to Transformers' fp32 run as twice
    the distance of Transformers' own bf16 run. Ends with status 1 otherwise.
    """
    from ..model import BertConfig
    from .report.terminal import show
    from .steps import parity as train_parity

    where = _device(device)
    chosen = _dtype(dtype, where, TRAINING_DTYPES)
    model, tokens = _by_device(where, model, tokens, on_gpu=8192)
    config = BertConfig.preset(model, vocab_size, max_position_embeddings=max(512, seqlen))
    result = train_parity.run(config, where, chosen, steps=steps, tokens=tokens, seqlen=seqlen, out=out, show=show)
    if plot is not None:
        train_parity.plot(result, plot)
    right = result.verdict.right
    _fail_unless(right, [] if right else ["our training run departs from Transformers'"])


@app.command()
def tune(
    arch: Annotated[
        int | None, typer.Option(help="Compute capability, 90 for 9.0. Default: this GPU's, or 90.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 (which stands for fp16 too) or fp32.")] = "bf16",
) -> None:
    """Derive attention's launch table anew: by the clock on that GPU, elsewhere by the compiler alone.

    Prints the entries for TABLES and MASKED in kernels/attn/config.py.
    Takes minutes.
    """
    import torch

    from ..kernels import backend
    from .compiled import tune as suite
    from .compiled.aot import LIMITS

    arch = backend.architecture() if arch is None else arch
    if arch not in LIMITS:
        raise UserError(f"--arch {arch}: choose one of {', '.join(map(str, LIMITS))}")
    chosen = _dtype(dtype, torch.device("cpu"), TRAINING_DTYPES)
    table, masked = suite.derive(arch, chosen, lambda line: typer.echo(line, err=True))
    typer.echo(suite.as_code(arch, chosen, table))
    typer.echo(suite.as_code(arch, chosen, masked))


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
    old: Annotated[Path, typer.Argument(help="Result file of kernels, step or train: what was.")],
    new: Annotated[Path, typer.Argument(help="The same measured again: what is.")],
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
    with status 2.
    """
    from .report import compare as gate

    _fail_unless(gate.run(old, new, threshold=threshold, say=typer.echo), [])


def main(args: list[str] | None = None) -> Any:
    """The commands above without the rest of fusebert's: ``python -m fusebert.bench.cli kernels``."""
    try:
        return app(args)
    except (UserError, ValueError) as error:
        typer.echo(f"fusebert: error: {error}", err=True)
        sys.exit(2)


__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
