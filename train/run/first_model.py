"""The model that a run starts from: a preset, sizes by hand, a config.json, or the weights of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from ...model.config import BertConfig
from ...model.hf.format import CONFIG_FILE
from ...model.hf.load import from_hf
from ...model.pretraining import BertForPreTraining
from ..corpus.reader import Corpus
from ..errors import UserError
from ..step.finite import blown_up
from ..text.tokenizer import load_tokenizer, normalisation
from .phases import longest
from .plan import SIZES, Plan, sizes
from .settings import PretrainSettings


def make_model(
    settings: PretrainSettings, plan: Plan, corpus: Corpus, saved: dict[str, Any] | None = None
) -> BertForPreTraining:
    """A new model from the preset or the sizes given, or the one in ``settings.init_from``, with the dropout of
    ``settings``.

    Args:
        saved: the configuration of a run that started with ``settings.init_from`` or ``settings.config`` and is
            continued: its checkpoint has the weights, so that the folder or file is not read.

    Raises:
        UserError: the sizes do not fit together, the vocabulary is not the corpus's, a weight is not finite, or
            ``--seqlen`` is too long.
    """
    dropout: dict[str, Any] = {
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
    }
    if saved is not None:
        model = BertForPreTraining(BertConfig(**{**saved, **dropout}))
    elif settings.init_from is None:
        try:
            config = BertConfig(
                corpus.vocab_size, **{**sizes(settings, plan.model), "pad_token_id": corpus.special.pad, **dropout}
            )
        except ValueError as error:
            where = f"--config {settings.config}" if settings.config else "--hidden-size and the other sizes"
            raise UserError(f"{where}: {error}") from error
        model = BertForPreTraining(config)
    else:
        _check_folder(settings.init_from)
        source = from_hf(settings.init_from)
        _check_vocabulary(settings.init_from, source.config.vocab_size, corpus)
        bad = blown_up(source.state_dict())
        if bad is not None:
            raise UserError(
                f"--init-from {settings.init_from}: {bad} is not finite, or too large to compute with: give another "
                "model"
            )
        rows = max(source.config.vocab_size, corpus.vocab_size)
        model = BertForPreTraining(dataclasses.replace(source.config, vocab_size=rows, **dropout))
        _load_rows(model, source)
    seqlen, positions = longest(settings.seqlen), model.config.max_position_embeddings
    if seqlen > positions:
        advice = "" if settings.init_from or settings.config else "; --max-positions raises them"
        raise UserError(f"--seqlen {seqlen} is more than the model's {positions} positions{advice}")
    return model


def _load_rows(model: BertForPreTraining, source: BertForPreTraining) -> None:
    """Copies the weights of ``source``. Rows of tokens that it lacks keep their initial values."""
    weights = source.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value[: len(weights[name])].copy_(weights[name])


def name_of_model(settings: PretrainSettings, plan: Plan) -> str:
    """What the model is, in words."""
    if settings.init_from or settings.config:
        return str(settings.init_from or settings.config)
    if all(getattr(settings, name) is None for name in SIZES):
        return plan.model
    chosen = sizes(settings, plan.model)
    return f"BERT ({chosen['num_hidden_layers']} layers, {chosen['hidden_size']} wide)"


def _check_folder(folder: Path) -> None:
    """Raises UserError for a run or a checkpoint: the folder to give is another."""
    if (folder / CONFIG_FILE).is_file():
        return
    for run in (folder, folder.parent.parent):
        if (run / "checkpoints").is_dir():
            what = "a run" if run is folder else "a checkpoint"
            advice = f"fusebert export {folder} --out DIR writes one"
            if (run / "hf" / CONFIG_FILE).is_file():
                advice = f"give {run / 'hf'}, the run's model" + ("" if run is folder else f", or DIR: {advice}")
            raise UserError(f"--init-from {folder} is the folder of {what}, not of a model: {advice}")


def _check_vocabulary(folder: Path, rows: int, corpus: Corpus) -> None:
    """Raises UserError unless the folder's tokens have the same ids in the corpus, which may have more; warns if it
    normalises text in another way.

    Args:
        rows: of the model's embeddings. More than tokens, as in models that pad their vocabulary, is fine.
    """
    advice = "prepare the corpus with that model's tokenizer (fusebert prepare --tokenizer)"
    path = next((path for name in ("tokenizer.json", "vocab.txt") if (path := folder / name).is_file()), None)
    if path is None:
        if rows != corpus.vocab_size:
            raise UserError(
                f"--init-from {folder} has a vocabulary of {rows} tokens, the corpus {corpus.directory} one of "
                f"{corpus.vocab_size}: {advice}"
            )
        return
    theirs, ours = load_tokenizer(path), load_tokenizer(corpus.tokenizer_path)
    if not theirs.get_vocab().items() <= ours.get_vocab().items():
        size = "of the same size" if rows == corpus.vocab_size else f"of {rows} tokens"
        raise UserError(
            f"--init-from {folder} has another vocabulary than the corpus {corpus.directory}, {size}: {advice}"
        )
    before, now = normalisation(theirs), normalisation(ours)
    if before != now:
        listed = ", ".join(f"{name}: {before[name]} there, {now[name]} in the corpus" for name in now)
        unknown = corpus.manifest.get("report", {}).get("splits", {}).get("train", {}).get("unknown_share")
        share = "" if unknown is None else f"; {unknown:.2%} of the corpus's tokens are [UNK]"
        warnings.warn(f"--init-from {folder} normalises text in another way ({listed}){share}: {advice}", stacklevel=3)
