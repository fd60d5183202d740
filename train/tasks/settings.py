"""The options of the commands that use a trained model. This module does not import PyTorch, so that ``--help`` is
quick."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from ..options import Option

DATA, MACHINE, OPTIMISER, RUN = "Data", "Machine", "Optimiser", "Run"
EMBED = "With --task embed"
MAX_ANSWER_TOKENS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The options of every command that loads a model."""

    model: Annotated[
        Path,
        Option(
            "Folder of the model: a run's [bold]hf/[/bold], or a Hugging Face folder of a BERT, MiniLM, RoBERTa, "
            "XLM-R, CamemBERT, ELECTRA or DistilBERT (config.json, model.safetensors, tokenizer.json)."
        ),
    ]
    seqlen: Annotated[
        int | None,
        Option("Longest text in tokens; longer ones are cut. Default: what the model's folder says.", DATA),
    ] = None
    tokens_per_batch: Annotated[
        int | None,
        Option("Tokens computed at once, packed without padding. Default: 4096 on a CPU, 65536 on a GPU.", MACHINE),
    ] = None
    device: Annotated[str, Option("auto, cpu or cuda; auto takes a GPU if there is one.", MACHINE)] = "auto"
    precision: Annotated[
        str,
        Option("Of the matrix products: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32 or tf32.", MACHINE),
    ] = "auto"
    threads: Annotated[int | None, Option("Threads of PyTorch on a CPU. Default: PyTorch's choice.", MACHINE)] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedSettings(ModelSettings):
    """The options of ``fusebert embed``."""

    input: Annotated[
        str,
        Option("Texts: a .txt (a text a line), .tsv, .csv, .jsonl or .parquet file, or - for standard input.", DATA),
    ]
    out: Annotated[Path, Option("File to write: .npy (float32, a row a text) or .parquet (text, embedding).", DATA)]
    text: Annotated[
        str | None,
        Option("Column of the texts; its number from 1 if the file has no header. Default: text.", DATA),
    ] = None
    pooling: Annotated[
        str,
        Option(
            "mean, cls (the first token), max or pooler; auto: what a sentence-transformers folder says, else mean.",
        ),
    ] = "auto"
    normalize: Annotated[
        bool | None,
        Option(
            "Scale each embedding to length 1. Default: what a sentence-transformers folder says, else not.",
            flags="--normalize/--no-normalize",
        ),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillSettings(ModelSettings):
    """The options of ``fusebert fill``."""

    sentence: Annotated[
        str | None, Option("A text with one or more mask tokens, such as 'the \\[MASK] sat'.", positional=True)
    ] = None
    input: Annotated[
        str | None,
        Option("Texts, in place of one on the command line: a file, or - for standard input.", DATA),
    ] = None
    text: Annotated[str | None, Option("Column of the texts in --input. Default: text.", DATA)] = None
    out: Annotated[str, Option("File for one JSON object a line; - prints.", DATA)] = "-"
    top: Annotated[int, Option("Guesses for each mask.")] = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(ModelSettings):
    """The options of ``fusebert evaluate``."""

    data: Annotated[
        Path | None,
        Option(
            "Folder that [bold]fusebert prepare[/bold] made: its held-out text. Its vocabulary must be the model's.",
            DATA,
        ),
    ] = None
    text: Annotated[
        str | None,
        Option("Or a file of texts (.txt, .tsv, .csv, .jsonl, .parquet; - for standard input).", DATA),
    ] = None
    column: Annotated[str | None, Option("Column of the texts in --text. Default: text.", DATA)] = None
    pseudo: Annotated[
        int,
        Option(
            "Texts for the pseudo-perplexity, from the start of --text. Each of their tokens is masked in turn, so a "
            "text of n tokens costs n texts; 0 leaves it out."
        ),
    ] = 100
    seed: Annotated[int, Option("Seed of the masks.")] = 0
    out: Annotated[Path | None, Option("Also write the figures to this JSON file.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SummarizeSettings(ModelSettings):
    """The options of ``fusebert summarize``."""

    input: Annotated[
        str,
        Option(
            "Documents: a .txt (a blank line ends a document) or .jsonl file, or - for one on standard input.", DATA
        ),
    ]
    text_field: Annotated[str, Option("Field of the text in .jsonl.", DATA)] = "text"
    out: Annotated[str, Option("File for one JSON object a line, or - to print the sentences.", DATA)] = "-"
    sentences: Annotated[int, Option("Sentences of a summary.")] = 3
    pooling: Annotated[str, Option("As in [bold]fusebert embed[/bold].")] = "auto"
    splitter: Annotated[str, Option("How to find sentences: auto, blingfire, or lines (a sentence a line).")] = "auto"


OF_A_SESSION = {"out", "resume", "device", "threads"}  # not taken from a run that is continued


def _continued(resume: bool, out: Path) -> dict[str, Any]:
    """The options of the run in ``out`` if it is continued. `check_place` says what is wrong with a damaged file."""
    from ..run.manifest import FILE

    if not resume:
        return {}
    try:
        options = json.loads((out / FILE).read_text(encoding="utf-8"))["settings"]
        names = {field.name for field in dataclasses.fields(FinetuneSettings)} - OF_A_SESSION
        return {name: value for name, value in options.items() if name in names and value is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneSettings(ModelSettings):
    """The options of ``fusebert finetune``."""

    task: Annotated[
        str,
        Option(
            "classify (one class a text; several with --label-separator), regress (one number a text), tag (one tag a "
            "word: entities, parts of speech), qa (the answer to a question in a text), or embed (one vector a text, "
            "from pairs of texts)."
        ),
    ]
    train: Annotated[
        list[str],
        Option(
            "Texts with labels: a .tsv, .csv, .jsonl or .parquet file; to tag, CoNLL columns (.conll, .tsv, .txt), "
            ".jsonl or .parquet; for qa a .json of SQuAD. Give the option again for more files.",
            DATA,
        ),
    ]
    dev: Annotated[str, Option("Texts with labels that choose the best model and make the report.", DATA)]
    test: Annotated[
        str | None,
        Option("Texts with labels that each seed's best model is scored on once, at the end.", DATA),
    ] = None
    out: Annotated[Path, Option("Folder for the run: hf/ (the best model), report.html, seed-*/log.jsonl.")]
    text: Annotated[
        str | None,
        Option(
            "Column of the texts; its number from 1 if the files have no header. Default: text, or 1; to tag, 1 or "
            "tokens.",
            DATA,
        ),
    ] = None
    text_pair: Annotated[str | None, Option("Column of the second text of a pair. Default: none.", DATA)] = None
    label: Annotated[
        str | None, Option("Column of the labels. Default: label, or 2; to tag, the last one or tags.", DATA)
    ] = None
    negative: Annotated[
        list[str] | None,
        Option(
            "Column of texts that are no match for the first text; may be empty. Give the option again for more "
            "columns.",
            EMBED,
        ),
    ] = None
    score_range: Annotated[
        str | None,
        Option(
            "LOW:HIGH, the range of the scores in --label, such as 0:5. The cosine learns 0 for LOW, 1 for HIGH. "
            "Default: 0:1.",
            EMBED,
        ),
    ] = None
    pooling: Annotated[
        str,
        Option("mean, cls or max; auto: what a sentence-transformers folder says, else mean.", EMBED),
    ] = "auto"
    normalize: Annotated[
        bool | None,
        Option(
            "Scale each vector to length 1. Default: what a sentence-transformers folder says, else yes.",
            EMBED,
            flags="--normalize/--no-normalize",
        ),
    ] = None
    temperature: Annotated[
        float, Option("What cosines are divided by before the softmax: 0.05 is a scale of 20.", EMBED)
    ] = 0.05
    label_separator: Annotated[
        str | None,
        Option("A text may have several classes, separated by this, as in 'sport;news'; or none.", DATA),
    ] = None
    stride: Annotated[
        int | None,
        Option(
            "To tag, and for qa: tokens that two windows of a long text share. Default: 128, or half of a "
            "shorter window.",
            DATA,
        ),
    ] = None
    max_answer_tokens: Annotated[int, Option("The longest answer of --task qa, in tokens.", DATA, min=1)] = (
        MAX_ANSWER_TOKENS
    )

    epochs: Annotated[int, Option("Passes over the training texts.", OPTIMISER, min=1)] = 3
    batch_size: Annotated[int, Option("Texts of a step.", OPTIMISER, min=1)] = 32
    lr: Annotated[float, Option("Peak learning rate.", OPTIMISER)] = 3e-5
    warmup: Annotated[
        float, Option("Share of the steps in which the learning rate rises; then it falls linearly to 0.", OPTIMISER)
    ] = 0.1
    weight_decay: Annotated[float, Option("Of matrices and embeddings.", OPTIMISER, min=0)] = 0.01
    clip: Annotated[float, Option("Largest 2-norm of the gradient.", OPTIMISER)] = 1.0
    layer_decay: Annotated[
        float,
        Option("Learning rate of each layer over that of the layer above it; 1: the same for all.", OPTIMISER),
    ] = 1.0
    freeze_layers: Annotated[
        int, Option("Train neither the embeddings nor the first N layers; 0: train all.", OPTIMISER, min=0)
    ] = 0
    class_weights: Annotated[
        str | None,
        Option(
            "Factors of the classes' losses: balanced (texts / (classes · texts of the class)), or NAME=1.5,NAME=0.5 "
            "for some classes. Default: 1.",
            OPTIMISER,
        ),
    ] = None

    metric: Annotated[
        str,
        Option(
            "On --dev, chooses the best model: accuracy, macro_f1, mcc or loss; micro_f1 with several classes a text; "
            "pearson, spearman or rmse in a regression; f1, precision, recall (of entities) or accuracy for tags; mrr, "
            "recall_at_1 or recall_at_10 of pairs; spearman or pearson of scored pairs. auto: the first of its kind.",
            RUN,
        ),
    ] = "auto"
    patience: Annotated[
        int | None, Option("Stop after this many epochs without a better model. Default: never.", RUN, min=1)
    ] = None
    seeds: Annotated[
        int, Option("Train with so many seeds, one after the other, and report mean and spread.", RUN, min=1)
    ] = 1
    seed: Annotated[int, Option("The first seed: of the head, the order of the texts, and dropout.", RUN, min=0)] = 0
    resume: Annotated[
        bool,
        Option(
            "Continue the run in --out exactly where it stopped; start if there is none. Options that are not given "
            "again keep their values: --out and --resume are enough.",
            RUN,
            flags="--resume",
            defaults=_continued,
            reads=("out",),
        ),
    ] = False
    tensorboard: Annotated[
        bool | None,
        Option("Write TensorBoard files. Default: if it is installed.", RUN, flags="--tensorboard/--no-tensorboard"),
    ] = None
    graph: Annotated[
        bool, Option("On a GPU, capture the step as CUDA graphs.", MACHINE, flags="--graph/--no-graph")
    ] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings(ModelSettings):
    """The options of ``fusebert predict``."""

    input: Annotated[
        str,
        Option(
            "Texts: a .txt (a text a line), .tsv, .csv, .jsonl or .parquet file, or - for standard input. For a model "
            "that tags words also .conll, and lists of words in .jsonl and .parquet. For one that answers questions "
            "a .json of SQuAD, or a .jsonl with question and context.",
            DATA,
        ),
    ]
    out: Annotated[str, Option("File for one JSON object a line; - prints.", DATA)] = "-"
    text: Annotated[
        str | None,
        Option("Column of the texts; its number from 1 if the file has no header. Default: text; tokens, or 1.", DATA),
    ] = None
    text_pair: Annotated[str | None, Option("Column of the second text of a pair. Default: none.", DATA)] = None
    stride: Annotated[
        int | None,
        Option(
            "Tokens that two windows of a long text share, for a model that tags words or answers questions. Default: "
            "as in its training.",
            DATA,
        ),
    ] = None
    max_answer_tokens: Annotated[
        int | None, Option("The longest answer to a question, in tokens. Default: as in the training.", DATA, min=1)
    ] = None
    n_best: Annotated[
        int | None,
        Option("Also give the best N answers to a question, up to 20, with their probabilities.", DATA, min=1),
    ] = None
