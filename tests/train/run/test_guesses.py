"""The report's examples: masked words in every script."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest
from languages import LANGUAGES

from fusebert.model import BertConfig, BertForPreTraining
from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.settings import PrepareSettings
from fusebert.train.run.guesses import guess_masked_words


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocab_type", ["wordpiece", "bpe"])
def test_every_script_has_examples(tmp_path: Path, vocab_type: str) -> None:
    missing, scripts = [], set()
    for language in LANGUAGES:
        # All sentences in one line, which is long enough; without their ends, which are no words.
        words = ["".join(c for c in each if unicodedata.category(c)[0] in "LMZ") for each in language.sentences]
        orders = itertools.islice(itertools.cycle(itertools.permutations(words)), 20)
        place = tmp_path / language.name
        place.with_suffix(".txt").write_text("\n\n".join(map(" ".join, orders)))
        options = {"vocab_size": 2000, "vocab_type": vocab_type, "heldout": 0.3, "workers": 1, "sentences": "lines"}
        settings = PrepareSettings(place, [str(place.with_suffix(".txt"))], **options)
        corpus = prepare(settings)
        shard = corpus.split("heldout").shards[0]
        if shard.num_tokens < 8 * shard.num_sentences:
            continue  # few words in a script without spaces: too short to be shown
        scripts.add(language.script)
        model = BertForPreTraining(BertConfig.preset("tiny", corpus.vocab_size))
        guesses = guess_masked_words(model, corpus, 64, count=1)
        if not guesses:
            missing.append(language.name)
            continue
        assert "[MASK]" in guesses[0].sentence
        assert guesses[0].truth.strip("#")
    assert not missing
    assert len(scripts) >= 15
