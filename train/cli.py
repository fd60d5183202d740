"""The ``fusebert`` command: prepare, pretrain, bench. Nothing heavy is imported until a subcommand runs."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..bench.cli import app as bench_app
from . import cli_prepare
from .errors import UserError

app = typer.Typer(
    name="fusebert",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Pretrain BERT encoders fast: text in, a model that loads in Hugging Face Transformers out.\n\n"
        "[bold]fusebert prepare[/bold] --corpus pydocs --out data/pydocs    text → tokenizer and token ids\n\n"
        "[bold]fusebert pretrain[/bold] --data data/pydocs --out runs/first --minutes 5    token ids → model"
    ),
)
app.command("prepare")(cli_prepare.command)
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fusebert {importlib.metadata.version('fusebert')}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None: ...


MODEL, LENGTH, BATCH = "Model", "How long", "Batches and examples"
OPTIMISER, RECORD, MACHINE = "Optimiser", "Evaluation, checkpoints, log", "Machine"


# Joined, because the line breaks of a docstring would be kept.
PRETRAIN_HELP = "\n\n".join(
    [
        "Pretrain a BERT on a prepared corpus: masked language model and next-sentence prediction.",
        "Ctrl-C finishes the step, saves and says how to go on; a second Ctrl-C stops at once.",
        "At the end OUT/hf loads with transformers.BertForPreTraining.from_pretrained, and a report compares the "
        "held-out loss with the corpus's unigram entropy: the loss of a model that knows the frequency of tokens and "
        "nothing of context.",
        "Five minutes on a laptop:",
        "    fusebert pretrain --data data/pydocs --out runs/first --minutes 5",
        "BERT-base on a GPU:",
        "    fusebert pretrain --data data/wiki --out runs/base --model base --steps 100000",
        "The same step in half of the memory:",
        "    fusebert pretrain ... --tokens-per-batch 32768 --batch-tokens 131072",
        "The same steps on eight GPUs (docs/scale-out.md):",
        "    torchrun --nproc-per-node=8 -m fusebert.train pretrain ...",
    ]
)


@app.command("pretrain", help=PRETRAIN_HELP)
def pretrain_command(
    data: Annotated[Path, typer.Option(help="Folder that [bold]fusebert prepare[/bold] made.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the run: checkpoints/, hf/ (the model), log.jsonl, loss.png, report.md.")
    ],
    steps: Annotated[int | None, typer.Option(help="Optimisation steps.", rich_help_panel=LENGTH)] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Wall-clock minutes, evaluation and export included: warm-up and decay follow the clock.",
            rich_help_panel=LENGTH,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint in --out, exactly where it stopped; start when there is none.",
            rich_help_panel=LENGTH,
        ),
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="tiny (2 layers, 128 wide), mini (4, 256), small (4, 512), base (12, 768), large (24, 1024); "
            "auto: tiny on a CPU, base on a GPU.",
            rich_help_panel=MODEL,
        ),
    ] = "auto",
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Start from this Hugging Face folder's weights (config.json, model.safetensors); its vocabulary must "
            "be the corpus's.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout probability.", rich_help_panel=MODEL)] = 0.1,
    seqlen: Annotated[
        int, typer.Option(help="Longest segment in tokens, \\[CLS] and \\[SEP]s included.", rich_help_panel=BATCH)
    ] = 128,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a micro-batch, packed without padding: as many as memory takes. "
            "Default: 2048 on a CPU, up to 65536 on a GPU.",
            rich_help_panel=BATCH,
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of an optimisation step, of all processes; gradients accumulate over micro-batches to reach "
            "it. Default: one micro-batch for each process on CPUs, 131072 on GPUs.",
            rich_help_panel=BATCH,
        ),
    ] = None,
    nsp: Annotated[
        bool,
        typer.Option(
            "--nsp/--no-nsp",
            help="Sentence pairs with next-sentence prediction (BERT), or full sentences (RoBERTa).",
            rich_help_panel=BATCH,
        ),
    ] = True,
    mlm_probability: Annotated[
        float, typer.Option(help="Share of the tokens that are masked and predicted.", rich_help_panel=BATCH)
    ] = 0.15,
    whole_word: Annotated[
        bool, typer.Option("--whole-word", help="Mask all pieces of a word together.", rich_help_panel=BATCH)
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Default by model: 2e-3 tiny, 1e-3 mini, 5e-4 small, 1e-4 base and large.",
            rich_help_panel=OPTIMISER,
        ),
    ] = None,
    warmup: Annotated[
        float,
        typer.Option(help="Share of the run in which the rate rises; then it falls to 0.", rich_help_panel=OPTIMISER),
    ] = 0.1,
    weight_decay: Annotated[
        float, typer.Option(help="Of the matrices; biases and LayerNorms are spared.", rich_help_panel=OPTIMISER)
    ] = 0.01,
    clip: Annotated[
        float, typer.Option(help="Largest 2-norm of the gradient; scaled down beyond it.", rich_help_panel=OPTIMISER)
    ] = 1.0,
    optimizer: Annotated[
        str, typer.Option(help="adamw, or lamb for very large batches.", rich_help_panel=OPTIMISER)
    ] = "adamw",
    seed: Annotated[
        int, typer.Option(help="Of initialisation, dropout and the order of the data.", rich_help_panel=OPTIMISER)
    ] = 0,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between held-out evaluations. Default: ten in the run.", rich_help_panel=RECORD),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints; the newest two are kept. Default: every ten minutes.",
            rich_help_panel=RECORD,
        ),
    ] = None,
    log_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between lines of log.jsonl. Default: 10 on a CPU, 50 on a GPU.", rich_help_panel=RECORD
        ),
    ] = None,
    tensorboard: Annotated[
        bool | None,
        typer.Option(
            "--tensorboard/--no-tensorboard",
            help="TensorBoard files in OUT/tensorboard. Default: when it is installed.",
            rich_help_panel=RECORD,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda; auto takes a GPU when there is one.", rich_help_panel=MACHINE)
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="Of the matrix products: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32, tf32 or fp8. Weights "
            "are fp32.",
            rich_help_panel=MACHINE,
        ),
    ] = "auto",
    graph: Annotated[
        bool,
        typer.Option("--graph/--no-graph", help="On a GPU: the step as CUDA graphs.", rich_help_panel=MACHINE),
    ] = True,
    compile: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="The model under torch.compile.", rich_help_panel=MACHINE),
    ] = False,
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations",
            help="Keep a layer's input alone and compute the rest again: far less memory, a third more work.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that make batches, for each that trains. Default: none on a CPU (training makes them), up "
            "to 8 with a GPU.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    parallel: Annotated[
        str,
        typer.Option(
            help="Under torchrun: ddp keeps the model in every process, fsdp a share of it, for models that are too "
            "large for a GPU.",
            rich_help_panel=MACHINE,
        ),
    ] = "ddp",
    threads: Annotated[
        int | None, typer.Option(help="PyTorch's threads on a CPU. Default: PyTorch's own.", rich_help_panel=MACHINE)
    ] = None,
) -> None:
    """Runs `pretrain.pretrain` with what was typed."""
    # Read when PyTorch is loaded. Where another process wants the same cores, OpenMP threads that spin while they wait
    # are a tenfold loss (measured, 2 busy cores, tiny: 200 to 600 tokens/s against 4,000); asleep they cost nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .run.pretrain import Interrupted, pretrain
    from .run.settings import PretrainSettings
    from .step.distributed import first_to_fail

    typed = [word for word in sys.argv[1:] if word != "--resume"]
    settings = PretrainSettings(
        data=data,
        out=out,
        model=model,
        init_from=init_from,
        steps=steps,
        minutes=minutes,
        resume=resume,
        dropout=dropout,
        seqlen=seqlen,
        tokens_per_batch=tokens_per_batch,
        batch_tokens=batch_tokens,
        nsp=nsp,
        mlm_probability=mlm_probability,
        whole_word=whole_word,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        optimizer=optimizer,
        seed=seed,
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        tensorboard=tensorboard,
        device=device,
        precision=precision,
        graph=graph,
        compile=compile,
        checkpoint_activations=checkpoint_activations,
        workers=workers,
        threads=threads,
        parallel=parallel,
    )
    try:
        report = pretrain(settings, resume_command=shlex.join([*_launcher(), *typed, "--resume"]))
    except Interrupted as stopped:
        if first_to_fail():
            print(f"fusebert: {stopped}", file=sys.stderr)
        raise typer.Exit(130) from None
    if report is not None:
        print("\n" + report.as_text(), end="")


def _launcher() -> list[str]:
    """What ``fusebert`` was started with: words of torchrun's perhaps, but for those about several machines."""
    if not _launched_by_torchrun():
        return ["fusebert"]
    words = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", "-m", "fusebert.train"]
    machines = int(os.environ["GROUP_WORLD_SIZE"])
    return words if machines == 1 else [words[0], f"--nnodes={machines}", "...", *words[1:]]


def _launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def main() -> None:
    """The command line's entry point. What the user can correct is one line on stderr, without a traceback: status 2
    for what was typed or given, 1 for what the system refused (no space left, a package that is not installed)."""
    try:
        status = app(standalone_mode=False)
    except (UserError, ValueError) as error:
        _fail(str(error), 2)
    except OSError as error:
        reason = error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)
    except ImportError as error:  # ours say what to install; Python's own names the module
        _fail(f"{error}: pip install 'fusebert[train]'" if error.name else str(error), 1)
    except Exception as error:
        # A wrong option: typer's own class for it is not public, and moved between versions.
        if not hasattr(error, "format_message"):
            if _launched_by_torchrun():
                _exit_unless_first()
            raise
        _fail(f"{error.format_message()} (fusebert --help lists what there is)", getattr(error, "exit_code", 2))
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    if _launched_by_torchrun():
        _exit_unless_first()
        message = f"rank {os.environ['RANK']}: {message}" if os.environ["RANK"] != "0" else message
    print(f"fusebert: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _exit_unless_first() -> None:
    """Of the processes of a torchrun job, which fail together, one tells why."""
    from .step.distributed import first_to_fail

    if not first_to_fail():
        sys.exit(1)


if __name__ == "__main__":
    main()
