"""``fusebert convert``: a TensorFlow checkpoint of google-research/bert as a Hugging Face folder.

Many BERTs of a domain exist only so, and Transformers no longer reads them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UserError
from ..options import Option

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, VOCABULARY, INDEX = "bert_config.json", "vocab.txt", ".index"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """The options of ``fusebert convert``."""

    tf: Annotated[
        Path,
        Option("The checkpoint: bert_model.ckpt without endings, or the folder that holds it."),
    ]
    out: Annotated[Path, Option("Folder to write, in Hugging Face's format.")]
    config: Annotated[Path | None, Option("The sizes. Default: bert_config.json beside the checkpoint.")] = None
    vocab: Annotated[Path | None, Option("The vocabulary. Default: vocab.txt beside the checkpoint.")] = None
    lowercase: Annotated[
        bool | None,
        Option(
            "Whether the model reads lower-cased text, without accents. Default: unless the vocabulary has capitals.",
            flags="--lowercase/--cased",
        ),
    ] = None


def convert(settings: ConvertSettings) -> list[str]:
    """Writes ``settings.out``, and returns what to tell the user.

    Raises:
        UserError, ValueError: a file is missing or damaged, or the model is not a BERT of these sizes.
        ModuleNotFoundError: TensorFlow is not installed.
        OSError: for example no space left.
    """
    from ...model.hf.folder import read_settings
    from ...model.hf.format import CONFIG_FILE, json_bytes
    from ...model.hf.load import checked, read_config
    from ...model.hf.save import config_content, write_folder
    from ...model.hf.tf_checkpoint import read_checkpoint
    from ...model.hf.tokenizer_files import tokenizer_files
    from ..text.tokenizer import load_tokenizer, normalisation

    checkpoint = find_checkpoint(settings.tf)
    config_path = settings.config or checkpoint.with_name(CONFIG)
    vocabulary = settings.vocab or checkpoint.with_name(VOCABULARY)
    for path, option in ((config_path, "--config"), (vocabulary, "--vocab")):
        if not path.is_file():
            raise UserError(f"{path} does not exist: give the file with {option}")
    tokenizer = load_tokenizer(vocabulary, settings.lowercase)
    config = read_config({"model_type": "bert", **read_settings(config_path)}, str(config_path))
    tensors = read_checkpoint(checkpoint)
    task = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("classifier.", "qa_outputs."))}
    tensors, absent = checked(tensors, config, str(checkpoint))
    content = config_content(config, _architecture(task, absent))
    if "classifier.weight" in task:
        count = len(task["classifier.weight"])
        content["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        content["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(str(path))
        files = tokenizer_files(path, config)
    write_folder(settings.out, {**tensors, **task}, {**files, CONFIG_FILE: json_bytes(content)})
    millions = sum(tensor.numel() for tensor in [*tensors.values(), *task.values()]) / 1e6
    reads = "lower-cased" if normalisation(tokenizer)["lowercase"] else "cased"
    return [
        f"{settings.out}: {content['architectures'][0]}, {millions:.1f} M parameters, {config.num_hidden_layers} "
        f"layers of width {config.hidden_size}; text is read {reads} (--lowercase/--cased)",
        *(f"the checkpoint has no {head}" for head in absent),
    ]


def find_checkpoint(place: Path) -> Path:
    """The path of a checkpoint without its endings: ``place`` itself, or the only one in the folder ``place``.

    Raises:
        UserError: there is none, or several.
    """
    if place.is_dir():
        found = sorted(place.glob(f"*{INDEX}"))
        if len(found) != 1:
            names = ", ".join(str(path.with_suffix("")) for path in found[:8])
            what = f"several checkpoints: give one of {names}" if found else f"no checkpoint (NAME{INDEX})"
            raise UserError(f"--tf {place} holds {what}")
        return found[0].with_suffix("")
    path = place.with_suffix("") if place.suffix == INDEX else place
    if not path.with_name(path.name + INDEX).is_file():
        raise UserError(f"--tf {place}: there is no {path.name}{INDEX}; give the checkpoint without its endings")
    return path


def _architecture(task: dict[str, Tensor], absent: list[str]) -> str:
    """The class of Transformers that the weights are of.

    Raises:
        UserError: no class has them all.
    """
    from ...model.hf.load import HEADS

    masked, pooler, next_sentence = (head not in absent for head in HEADS)
    if task:
        if masked or next_sentence or len({name.partition(".")[0] for name in task}) > 1:
            raise UserError("the checkpoint has the heads of several tasks: no model of Transformers has them all")
        if "classifier.weight" in task and not pooler:
            raise UserError("the checkpoint has a classifier and no pooler: no model of Transformers is like that")
        return "BertForSequenceClassification" if "classifier.weight" in task else "BertForQuestionAnswering"
    if masked and next_sentence and pooler:
        return "BertForPreTraining"
    if next_sentence:
        raise UserError("the checkpoint has a next-sentence head, but not all else that pretraining has")
    return "BertForMaskedLM" if masked else "BertModel"
