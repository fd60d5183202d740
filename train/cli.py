"""The ``fusebert`` command: prepare, pretrain, the tasks, and the subcommands that other packages register.

A package registers a subcommand as an entry point ``name = package.module:app`` of the group ``fusebert.commands``,
where ``app`` is a `typer.Typer`. ``fusebert bench`` is one. Heavy modules are imported when a subcommand runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from .corpus.settings import PrepareSettings
from .errors import UserError, in_words
from .options import command
from .run.export import ExportSettings
from .run.settings import PretrainSettings
from .run.signals import exit_on_sigterm
from .tasks.commands import add_commands

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
        "[bold]fusebert pretrain[/bold] --data data/pydocs --out runs/first --minutes 5    token ids → model\n\n"
        "[bold]fusebert finetune[/bold] --model runs/first/hf --task classify ...    model → classifier\n\n"
        "[bold]fusebert embed[/bold] --model runs/first/hf --input texts.txt --out vectors.npy    model → vectors"
    ),
)


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


def _prepare(settings: PrepareSettings) -> None:
    """Turn text into a corpus to pretrain on: learn a vocabulary, split sentences, write token ids.

    Memory stays bounded however large the text is, and the folder appears only when the corpus is complete.

    Examples:

        fusebert prepare --corpus pydocs --out data/pydocs --vocab-size 8192

        fusebert prepare wiki/ 'news/*.jsonl.zst' --text-field body --out data/mine

        zcat books.gz | fusebert prepare - --out data/books --tokenizer bert-base-uncased/tokenizer.json
    """
    from .corpus.prepare import prepare
    from .corpus.report import as_json, print_report

    started = time.perf_counter()
    with exit_on_sigterm(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        made = prepare(settings, show_progress=True)
    for warning in caught:
        typer.echo(f"fusebert: warning: {warning.message}", err=True)
    seconds = time.perf_counter() - started
    if settings.json:
        typer.echo(json.dumps(as_json(made, seconds), indent=1))
    else:
        print_report(made, seconds)


app.command("prepare")(command(PrepareSettings, _prepare))


# Paragraphs are joined here because typer keeps the line breaks within a docstring's paragraph.
PRETRAIN_HELP = "\n\n".join(
    [
        "Pretrain a BERT on a prepared corpus: masked language model and next-sentence prediction.",
        "Ctrl-C finishes the step, saves a checkpoint and prints the command that continues the run. A second Ctrl-C "
        "stops at once. SIGTERM and SIGUSR1, which Slurm sends before it pre-empts a job, do the same with exit status "
        "0.",
        "At the end OUT/hf loads with transformers.BertForPreTraining.from_pretrained. A report compares the held-out "
        "loss with the corpus's unigram entropy, the loss of a model that uses token frequencies but no context.",
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


def _pretrain(settings: PretrainSettings) -> None:
    # PyTorch reads this when it loads. OpenMP threads that spin while they wait cost a factor of ten if another process
    # uses the same cores (measured on 2 busy cores, tiny: 200 to 600 tokens/s, against 4,000 with sleeping threads).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from .run.signals import Interrupted, StopSignal

    # A signal during these imports ends the process without a traceback.
    with StopSignal(silent=_in_a_job()):
        from .run.local_ranks import start_ranks
        from .run.manifest import compare
        from .run.plan import with_processes
        from .run.pretrain import pretrain
        from .step.distributed import first_to_fail

    typed = [word for word in sys.argv[1:] if word != "--resume"]
    resume_command = shlex.join([*_launcher(), *typed, "--resume"])
    settings = with_processes(settings)

    def train() -> None:
        try:
            report = pretrain(settings, resume_command)
        except Interrupted as stopped:
            if first_to_fail():
                print(f"fusebert: {stopped}", file=sys.stderr)
            raise typer.Exit(stopped.status) from None
        if report is not None:
            print("\n" + report.as_text(), end="")
            if settings.reproduce is not None:
                print(compare(settings.reproduce, settings.out))

    if _in_a_job() or settings.processes in (None, 1):
        train()
    else:
        raise typer.Exit(start_ranks(settings.processes, lambda: _with_exit_status(train)))


app.command("pretrain", help=PRETRAIN_HELP)(command(PretrainSettings, _pretrain))


def _export(settings: ExportSettings) -> None:
    """Write a checkpoint as a Hugging Face folder: any step of a run, while it trains or after it was stopped.

    Examples:

        fusebert export runs/first --out models/first

        fusebert export runs/first/checkpoints/step-00000400 --out models/first-400
    """
    from .run.export import export

    with exit_on_sigterm():
        path, step = export(settings)
    typer.echo(f"step {step:,} ({path}) is in {settings.out}: transformers.BertForPreTraining.from_pretrained reads it")


app.command("export")(command(ExportSettings, _export))


add_commands(app)


def _add_registered_commands() -> None:
    """Adds the subcommands of the entry-point group. One that fails to load becomes a command that says why."""
    for entry in importlib.metadata.entry_points(group="fusebert.commands"):
        try:
            app.add_typer(entry.load(), name=entry.name)
        except Exception as error:  # whatever another package raises must not break our commands
            _add_unavailable(entry.name, error)


def _add_unavailable(name: str, error: Exception) -> None:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    reason = f"it needs {missing}: pip install 'fusebert[{name}]'" if missing else f"{type(error).__name__}: {error}"

    def unavailable() -> None:
        raise ImportError(f"fusebert {name} could not be loaded: {reason}")

    any_words = {"allow_extra_args": True, "ignore_unknown_options": True}
    help_text = "Not available: " + reason.replace("[", "\\[")
    app.command(name, help=help_text, context_settings=any_words)(unavailable)


_add_registered_commands()


def _launcher() -> list[str]:
    """The words that start ``fusebert`` again in the same way; "..." stands for torchrun's options about machines."""
    if not _in_a_job():
        return ["fusebert"]
    words = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", "-m", "fusebert.train"]
    machines = int(os.environ["GROUP_WORLD_SIZE"])
    return words if machines == 1 else [words[0], f"--nnodes={machines}", "...", *words[1:]]


def _in_a_job() -> bool:
    """Whether this is one of several processes, started by torchrun or by `local_ranks.start_ranks`."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main() -> None:
    """Entry point of the command line."""
    _with_exit_status(lambda: app(standalone_mode=False))


def _with_exit_status(run: Callable[[], object]) -> NoReturn:
    """Calls ``run`` and exits.

    An error that the user can correct is printed as one line on stderr, without a traceback. The exit status is 2 for
    wrong input and 1 for errors of the system, such as a full disk or a package that is not installed.
    """
    try:
        status = run()
    except (KeyboardInterrupt, typer.Abort):  # outside of the blocks that handle Ctrl-C
        sys.exit(128 + signal.SIGINT)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
    except (UserError, ValueError) as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(in_words(error), 1)
    except ImportError as error:  # fusebert's own say what to install; Python's have the module in error.name
        _fail(f"{error}: pip install 'fusebert[train]'" if error.name else str(error), 1)
    except Exception as error:
        # A usage error. typer's class for it is not public and differs between versions.
        if not hasattr(error, "format_message"):
            if _in_a_job():
                _exit_unless_first()
            raise
        message, number = error.format_message(), getattr(error, "exit_code", 2)
        if not message:  # a command without arguments has printed its help
            sys.exit(number)
        _fail(f"{message} (fusebert --help lists commands and options)", number)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    if _in_a_job():
        _exit_unless_first()
        message = f"rank {os.environ['RANK']}: {message}" if os.environ["RANK"] != "0" else message
    print(f"fusebert: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _exit_unless_first() -> None:
    """Exits without a message unless this is the first process of the torchrun job to fail."""
    from .step.distributed import first_to_fail

    if not first_to_fail():
        sys.exit(1)


if __name__ == "__main__":
    main()
