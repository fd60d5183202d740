"""A folder with a corpus, an untrained tiny model of its vocabulary, and files of texts."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_corpus import ANIMALS, FOODS, PLACES, make_corpus

from fusebert.model.config import BertConfig
from fusebert.model.hf import save_hf
from fusebert.model.pretraining import BertForPreTraining
from fusebert.train import cli
from fusebert.train.corpus.reader import Corpus

TEXTS = [
    f"The {animal} lives in the {place} and eats {food}."
    for animal, place, food in zip(ANIMALS, PLACES, FOODS, strict=True)
]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/, model/ and texts as texts.txt, .tsv, .csv, .jsonl, .parquet."""
    import pyarrow
    import pyarrow.parquet

    place = tmp_path_factory.mktemp("tasks")
    corpus = Corpus.open(make_corpus(place))
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", corpus.vocab_size, pad_token_id=corpus.special.pad))
    save_hf(model, place / "model", corpus.tokenizer_path)
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (place / "texts.tsv").write_text("".join(f"{i}\t{text}\n" for i, text in [("id", "said"), *enumerate(TEXTS)]))
    (place / "texts.csv").write_text("text,n\n" + "".join(f'"{text}",{i}\n' for i, text in enumerate(TEXTS)))
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), place / "texts.parquet")
    return place


@pytest.fixture
def fusebert(monkeypatch: pytest.MonkeyPatch, place: Path) -> Callable[..., int]:
    """Runs ``fusebert WORDS`` in ``place`` and returns its exit status."""
    monkeypatch.chdir(place)

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["fusebert", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call
