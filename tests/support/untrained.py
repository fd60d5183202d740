"""A folder of a model that has learned nothing, with the tokenizer of a small corpus."""

from __future__ import annotations

from pathlib import Path

import torch
from small_corpus import make_corpus

from fusebert.model.config import BertConfig
from fusebert.model.hf import save_hf
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train.corpus.reader import Corpus


def untrained_model(place: Path) -> Path:
    """place/model, a ``tiny`` of the vocabulary of place/corpus. Both are made."""
    corpus = Corpus.open(make_corpus(place))
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", corpus.vocab_size, pad_token_id=corpus.special.pad))
    save_hf(model, place / "model", corpus.tokenizer_path)
    return place / "model"
