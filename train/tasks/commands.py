"""The subcommands of ``fusebert`` that use a trained model. PyTorch is imported when one runs."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from ..options import command
from ..run.signals import Interrupted, StopSignal, exit_on_sigterm
from .convert import ConvertSettings
from .rows import STDIN
from .settings import (
    EmbedSettings,
    EvaluateSettings,
    FillSettings,
    FinetuneSettings,
    PredictSettings,
    SummarizeSettings,
)


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for name, settings, run in (
        ("finetune", FinetuneSettings, _finetune),
        ("predict", PredictSettings, _predict),
        ("embed", EmbedSettings, _embed),
        ("fill", FillSettings, _fill),
        ("evaluate", EvaluateSettings, _evaluate),
        ("summarize", SummarizeSettings, _summarize),
        ("convert", ConvertSettings, _convert),
    ):
        # typer keeps the line breaks within a docstring's paragraph: join its lines.
        paragraphs = inspect.cleandoc(run.__doc__ or "").split("\n\n")
        help_text = "\n\n".join(" ".join(part.split("\n")) for part in paragraphs)
        app.command(name, help=help_text)(command(settings, run))  # type: ignore[arg-type]


@contextlib.contextmanager
def _running() -> Iterator[None]:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `cli`
    with exit_on_sigterm():
        yield


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(f"fusebert: {line}", err=True)


def write_lines(out: str, records: Iterable[dict[str, Any]]) -> int:
    """Writes one JSON object a line to the file ``out``, whole or not at all, or prints them for "-". Their number."""
    from ...model.atomic import replace_file

    count = 0
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if out != STDIN:
            path = Path(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(stack.enter_context(replace_file(path)), "w", encoding="utf-8"))
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def _finetune(settings: FinetuneSettings) -> None:
    """Train a model to classify texts, to give them a number, to tag their words, to find
    answers in them, or to embed them.

    The training texts are packed by length, without padding. After each epoch the model is scored on the dev texts, and
    OUT/hf is the best one: it loads with the class of Transformers for its task, such as
    AutoModelForSequenceClassification, and with --task embed with sentence-transformers. Ctrl-C saves; the printed
    command continues exactly there.

    Examples:

        fusebert finetune --model runs/first/hf --task classify --train train.tsv --dev dev.tsv --out runs/topics

        fusebert finetune --model bert/ --task classify --label-separator ';' --train a.csv --dev b.csv --out runs/tags

        fusebert finetune --model bert/ --task regress --text-pair other --train a.tsv --dev b.tsv --out sts --seeds 5

        fusebert finetune --model bert/ --task tag --train train.conll --dev dev.conll --out runs/entities

        fusebert finetune --model bert/ --task qa --train train-v2.0.json --dev dev-v2.0.json --out runs/answers

        fusebert finetune --model bert/ --task embed --train pairs.tsv --dev d.tsv --batch-size 512 --out runs/search
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `cli`
    # A signal during the imports ends the process without a traceback.
    with StopSignal() as stop:
        from .finetune import finetune

        typed = [word for word in sys.argv[1:] if word != "--resume"]
        try:
            outcome = finetune(settings, stop, shlex.join(["fusebert", *typed, "--resume"]))
        except Interrupted as stopped:
            typer.echo(f"fusebert: {stopped}", err=True)
            raise typer.Exit(stopped.status) from None
    typer.echo("\n" + "\n".join(outcome.lines()))


def _predict(settings: PredictSettings) -> None:
    """Give each text the class, the number or the tags that a fine-tuned model predicts.

    One JSON object a line, in the order of the texts: label and probabilities, labels and probabilities, or value; with
    a model that tags words: tokens, tags and entities; with one that answers questions: answer, score, start, end.

    Examples:

        fusebert predict --model runs/topics/hf --input texts.txt --out labels.jsonl

        fusebert predict --model distilbert-sst2/ --input reviews.tsv --text review

        echo "Ada Lovelace lives in London." | fusebert predict --model runs/entities/hf --input -
    """
    with _running():
        from .predictors import open_predictor

        predictor = open_predictor(settings)
        _tell(predictor.notes)
        write_lines(settings.out, predictor.records())
        _tell(predictor.warnings())


def _embed(settings: EmbedSettings) -> None:
    """Turn texts into vectors, for search, clustering, or any learner that takes numbers.

    A text of a sentence-transformers folder gets the vector that this library gives it. Texts are packed by length,
    without padding.

    Examples:

        fusebert embed --model runs/first/hf --input texts.txt --out vectors.npy

        fusebert embed --model all-MiniLM-L6-v2/ --input reviews.tsv --text review --out vectors.parquet

        zcat texts.gz | fusebert embed --model runs/first/hf --input - --out vectors.npy --normalize
    """
    with _running():
        from .embed import embed

        _tell(embed(settings))


def _fill(settings: FillSettings) -> None:
    """Guess the words behind the mask tokens of a text.

    Examples:

        fusebert fill --model runs/first/hf "the \\[MASK] sat on the mat"

        fusebert fill --model runs/first/hf --input texts.txt --top 3 --out guesses.jsonl
    """
    with _running():
        from .fill import fill

        results, model = fill(settings)
        _tell(model.notes)
        if settings.sentence is None or settings.out != STDIN:
            write_lines(settings.out, (filled.to_json() for filled in results))
            return
        for filled in results:
            typer.echo(filled.filled)
            for i, guesses in enumerate(filled.masks, 1):
                typer.echo(f"  mask {i}: " + ", ".join(f"{token} {p:.1%}" for token, p in guesses))


def _evaluate(settings: EvaluateSettings) -> None:
    """Measure how well a model predicts text that it was not trained on.

    Masked-LM loss, perplexity and accuracy with 15 % of the tokens masked, as in pretraining; the pseudo-perplexity,
    with each token masked in turn; and next-sentence accuracy if the model has that head.

    Examples:

        fusebert evaluate --model runs/first/hf --data data/pydocs

        fusebert evaluate --model bert-base-uncased/ --text news.txt --pseudo 50 --out figures.json
    """
    with _running():
        from .evaluate_model import evaluate_model, write_json

        result, model = evaluate_model(settings)
        _tell([*model.notes, *filter(None, [model.tokenizer.warning()])])
        write_json(settings, result)
        for line in result.lines():
            typer.echo(line)


def _summarize(settings: SummarizeSettings) -> None:
    """Pick the sentences of a document that say most of the rest.

    Extractive: the sentences nearest to all others in embedding space, in the document's order. A model trained for
    embeddings (a sentence-transformers folder) chooses better than one that is only pretrained.

    Examples:

        fusebert summarize --model all-MiniLM-L6-v2/ --input article.txt

        fusebert summarize --model all-MiniLM-L6-v2/ --input articles.jsonl --text-field body --out s.jsonl
    """
    with _running():
        from .summarize import summarize

        summaries = summarize(settings)
        if settings.out != STDIN:
            write_lines(settings.out, ({"summary": sentences} for sentences in summaries))
            return
        for i, sentences in enumerate(summaries):
            typer.echo(("\n" if i else "") + "\n".join(sentences))


def _convert(settings: ConvertSettings) -> None:
    """Turn a TensorFlow checkpoint of google-research/bert into a Hugging Face folder.

    Many BERTs of a domain exist only so, and Transformers no longer reads them. Pretrained checkpoints, and those of
    run_classifier and run_squad, load with the matching class of Transformers. pip install 'fusebert[tensorflow]'
    reads them.

    Example:

        fusebert convert --tf uncased_L-12_H-768_A-12/bert_model.ckpt --out bert
    """
    with _running():
        from .convert import convert

        _tell(convert(settings))
