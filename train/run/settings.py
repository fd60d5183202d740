"""The options of ``fusebert pretrain``. This module does not import PyTorch, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from ..errors import UserError
from ..options import Option
from .phases import parse_batch_tokens, parse_seqlen

LENGTH, MODEL, BATCH = "How long", "Model", "Batches and examples"
OPTIMISER, RECORD, MACHINE = "Optimiser", "Evaluation, checkpoints, log", "Machine"


def _repeated(reproduce: Path | None) -> dict[str, Any]:
    """The options of the run ``reproduce``."""
    from .manifest import options_to_repeat

    return {} if reproduce is None else _known(options_to_repeat(reproduce), reproduce)


def _continued(resume: bool, out: Path) -> dict[str, Any]:
    """The options of the run in ``out`` if it is continued."""
    from .manifest import options_to_continue

    return _known(options_to_continue(out), out) if resume else {}


# A recipe is a set of defaults. "bert": Devlin et al. 2018, the defaults themselves. "fast": what the ablations of
# docs/recipes.md support for runs that see their text a few times.
RECIPES: dict[str, dict[str, Any]] = {
    "bert": {},
    "fast": {"optimizer": "muon", "muon_scale": 3.0, "mlm_probability": 0.3, "dropout": 0.0},
}


def _recipe(recipe: str, resume: bool, reproduce: Path | None, out: Path) -> dict[str, Any]:
    """The options of a recipe. A run that is continued or repeated has its own."""
    return {} if reproduce is not None or _continued(resume, out) else RECIPES.get(recipe, {})


def _known(options: dict[str, Any], run: Path) -> dict[str, Any]:
    unknown = options.keys() - {field.name for field in dataclasses.fields(PretrainSettings)}
    if unknown:
        raise UserError(
            f"{run} was made by another version of fusebert, with options unknown here: {', '.join(unknown)}"
        )
    return options


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """The options of ``fusebert pretrain``: each field is one option, and its ``help`` text documents it.

    None and "auto" mean that `plan.resolve` chooses a value for the device.
    """

    data: Annotated[Path, Option("Folder that [bold]fusebert prepare[/bold] made.")]
    out: Annotated[Path, Option("Folder for the run: checkpoints/, hf/ (the model), log.jsonl, loss.png, report.md.")]

    steps: Annotated[int | None, Option("Optimisation steps.", LENGTH, instead_of="minutes")] = None
    minutes: Annotated[
        float | None,
        Option(
            "Wall-clock minutes, evaluation and export included. Warm-up and decay follow the clock.",
            LENGTH,
            instead_of="steps",
        ),
    ] = None
    resume: Annotated[
        bool,
        Option(
            "Continue from the newest checkpoint in --out, exactly where it stopped. Options that are not given again "
            "keep their values. Start if there is none.",
            LENGTH,
            flags="--resume",
            defaults=_continued,
            reads=("out",),
        ),
    ] = False

    reproduce: Annotated[
        Path | None,
        Option(
            "Repeat the run in this folder, with its options and versions of the corpus, and compare the weights. "
            "Writes to a folder beside it, or to --out. To the bit on a CPU.",
            LENGTH,
            metavar="RUN",
            defaults=_repeated,
        ),
    ] = None

    recipe: Annotated[
        str,
        Option(
            "Defaults of the options below. bert: as in the paper. fast: muon, 30 % masked, no dropout, for a third of "
            "the tokens (docs/recipes.md). An option that is given wins.",
            MODEL,
            defaults=_recipe,
            reads=("resume", "reproduce", "out"),
        ),
    ] = "bert"
    model: Annotated[
        str,
        Option(
            "tiny (2 layers, 128 wide), mini (4, 256), small (4, 512), base (12, 768), large (24, 1024); "
            "auto: tiny on a CPU, base on a GPU.",
            MODEL,
        ),
    ] = "auto"
    init_from: Annotated[
        Path | None,
        Option(
            "Start from the weights in this Hugging Face folder (config.json, model.safetensors). Its vocabulary must "
            "be the corpus's.",
            MODEL,
        ),
    ] = None
    config: Annotated[
        Path | None,
        Option(
            "Start from new weights with the sizes in this config.json, as Hugging Face writes it. The vocabulary and "
            "the dropout are this run's.",
            MODEL,
            metavar="FILE.json",
        ),
    ] = None
    layers: Annotated[int | None, Option("Layers, in place of the preset's.", MODEL)] = None
    hidden_size: Annotated[int | None, Option("Width, in place of the preset's.", MODEL)] = None
    heads: Annotated[
        int | None, Option("Attention heads a layer. Default: the preset's; with --hidden-size, one for 64.", MODEL)
    ] = None
    intermediate_size: Annotated[
        int | None,
        Option("Inner width of the feed-forward. Default: the preset's; with --hidden-size, four times that.", MODEL),
    ] = None
    max_positions: Annotated[
        int | None, Option("Positions that the model learns: the most that --seqlen can be.", MODEL, show_default="512")
    ] = None
    dropout: Annotated[float, Option("Dropout probability, of hidden states and of attention.", MODEL)] = 0.1

    seqlen: Annotated[
        int | str,
        Option(
            "Longest segment in tokens, \\[CLS] and \\[SEP]s included. 128:0.9,512 trains on segments of 128 for 0.9 "
            "of the run and on 512 for the rest, as BERT was.",
            BATCH,
            metavar="N|N:SHARE,...,N",
            parser=parse_seqlen,
        ),
    ] = 128
    tokens_per_batch: Annotated[
        int | None,
        Option(
            "Tokens of a micro-batch, packed without padding: as many as fit in memory. "
            "Default: 2048 on a CPU, shared by --processes; up to 65536 on a GPU.",
            BATCH,
        ),
    ] = None
    batch_tokens: Annotated[
        int | str | None,
        Option(
            "Tokens of an optimisation step, over all processes: gradients accumulate over micro-batches. "
            "32768:0.2,131072 takes smaller steps for the first 0.2 of the run. "
            "Default: 2048 on CPUs (under torchrun one micro-batch for each process), 131072 on GPUs.",
            BATCH,
            metavar="N|N:SHARE,...,N",
            parser=parse_batch_tokens,
        ),
    ] = None
    nsp: Annotated[
        bool,
        Option("Sentence pairs with next-sentence prediction (BERT), or full sentences (RoBERTa).", BATCH),
    ] = True
    sop: Annotated[
        bool,
        Option(
            "Predict of a sentence pair whether it is in order or exchanged (ALBERT), in place of the next sentence.",
            BATCH,
            flags="--sop",
        ),
    ] = False
    mlm_probability: Annotated[
        float,
        Option("Share of the tokens that are masked and predicted. Held-out text is always masked at 0.15.", BATCH),
    ] = 0.15
    mlm_probability_end: Annotated[
        float | None,
        Option(
            "Share of the tokens that are masked at the end of the run: it falls from --mlm-probability on a straight "
            "line. Default: the same throughout.",
            BATCH,
        ),
    ] = None
    whole_word: Annotated[bool, Option("Mask all pieces of a word together.", BATCH, flags="--whole-word")] = False

    verify: Annotated[
        bool,
        Option(
            "Compare the files of --data with their hashes before the run. Files that passed are not read again while "
            "their size and date stay the same.",
            BATCH,
        ),
    ] = True

    lr: Annotated[
        float | None,
        Option(
            "Peak learning rate. Default by model: 2e-3 tiny, 1e-3 mini, 5e-4 small, 1e-4 base and large.", OPTIMISER
        ),
    ] = None
    warmup: Annotated[float, Option("Share of the run in which the learning rate rises to its peak.", OPTIMISER)] = 0.1
    schedule: Annotated[
        str,
        Option(
            "Of the learning rate after the warm-up: linear (falls to 0), cosine (falls to 0), wsd (stays, then falls "
            "to 0 in the last fifth of the run), constant.",
            OPTIMISER,
        ),
    ] = "linear"
    weight_decay: Annotated[
        float, Option("Weight decay of the matrices. Biases and LayerNorms do not decay.", OPTIMISER)
    ] = 0.01
    cautious_decay: Annotated[
        bool,
        Option(
            "Weight decay only where it does not act against the optimiser's update (adamw, muon).",
            OPTIMISER,
            flags="--cautious-decay",
        ),
    ] = False
    z_loss: Annotated[
        float,
        Option("Weight of (log of the softmax's denominator)², added to the training loss; 1e-4 in PaLM.", OPTIMISER),
    ] = 0.0
    ema: Annotated[
        float | None,
        Option(
            "Decay of an exponential moving average of the weights, such as 0.99, which is evaluated and exported in "
            "place of them. Default: no average.",
            OPTIMISER,
        ),
    ] = None
    clip: Annotated[
        float, Option("Largest 2-norm of the gradient: a longer gradient is scaled down to it.", OPTIMISER)
    ] = 1.0
    optimizer: Annotated[
        str,
        Option(
            "adamw, lamb for very large batches, or muon, which makes the updates of the layers' matrices orthogonal.",
            OPTIMISER,
        ),
    ] = "adamw"
    muon_scale: Annotated[
        float,
        Option("With muon: learning rate of the layers' matrices as a multiple of --lr.", OPTIMISER),
    ] = 3.0
    seed: Annotated[int, Option("Seed of initialisation, dropout and the order of the data.", OPTIMISER)] = 0

    eval_every: Annotated[
        int | None, Option("Steps between held-out evaluations. Default: ten evaluations in the run.", RECORD)
    ] = None
    save_every: Annotated[
        int | None,
        Option(
            "Steps between checkpoints. Default: a checkpoint every ten minutes.",
            RECORD,
        ),
    ] = None
    keep: Annotated[int, Option("Checkpoints that are kept: the newest ones.", RECORD)] = 2
    keep_best: Annotated[
        bool,
        Option(
            "Save and keep the checkpoint with the lowest held-out loss of all evaluations as well, and export that "
            "one to hf/.",
            RECORD,
            flags="--keep-best",
        ),
    ] = False
    patience: Annotated[
        int | None,
        Option(
            "End the run after so many evaluations in a row without a lower held-out loss. Implies --keep-best.", RECORD
        ),
    ] = None
    log_every: Annotated[
        int | None, Option("Steps between lines of log.jsonl. Default: 10 on a CPU, 50 on a GPU.", RECORD)
    ] = None
    tensorboard: Annotated[
        bool | None,
        Option("Write TensorBoard files to OUT/tensorboard. Default: if TensorBoard is installed.", RECORD),
    ] = None

    device: Annotated[str, Option("auto, cpu or cuda; auto takes a GPU if there is one.", MACHINE)] = "auto"
    precision: Annotated[
        str,
        Option(
            "Of the matrix products: auto (bf16 on a GPU, fp32 on a CPU), bf16, fp16, fp32, tf32 or fp8. Weights are "
            "fp32.",
            MACHINE,
        ),
    ] = "auto"
    graph: Annotated[bool, Option("On a GPU: capture the step as CUDA graphs.", MACHINE)] = True
    compile: Annotated[bool, Option("Run the model under torch.compile.", MACHINE)] = False
    checkpoint_activations: Annotated[
        bool,
        Option(
            "Keep only the input of each layer and recompute the rest in the backward: far less memory, a third more "
            "work.",
            MACHINE,
            flags="--checkpoint-activations",
        ),
    ] = False
    workers: Annotated[
        int | None,
        Option(
            "Processes that make batches, for each training process. 0 makes them in the training process. "
            "Default: 0 on a CPU, up to 8 with a GPU.",
            MACHINE,
        ),
    ] = None
    parallel: Annotated[
        str,
        Option(
            "Under torchrun: ddp keeps the whole model in every process; fsdp shards it, for models that do not fit "
            "on one GPU.",
            MACHINE,
        ),
    ] = "ddp"
    processes: Annotated[
        int | None,
        Option(
            "Training processes on a CPU, which share the micro-batches of a step. Default: one a core for models up "
            "to 256 wide, as long as each has four segments of --seqlen; 1 with --threads. On GPUs torchrun starts "
            "them.",
            MACHINE,
        ),
    ] = None
    threads: Annotated[
        int | None,
        Option("Threads of PyTorch on a CPU, in each process. Default: the cores, shared by the processes.", MACHINE),
    ] = None
