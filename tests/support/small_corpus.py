"""A corpus that a tiny model learns in seconds: each document is about one animal, in sentences of fixed form."""

from __future__ import annotations

import random
from pathlib import Path

from fusebert.train.corpus.prepare import prepare
from fusebert.train.corpus.settings import PrepareSettings

ANIMALS = ["fox", "owl", "hare", "crab", "wolf", "toad", "lynx", "mole", "seal", "wren"]
PLACES = ["forest", "tower", "meadow", "harbour", "valley", "swamp", "mountain", "garden", "island", "hedge"]
FOODS = ["berries", "mice", "clover", "mussels", "deer", "flies", "rabbits", "worms", "herring", "seeds"]


def write_text(path: Path, documents: int = 400, seed: int = 0) -> Path:
    """A .txt file, a blank line between documents."""
    rng = random.Random(seed)
    texts = []
    for _ in range(documents):
        i = rng.randrange(len(ANIMALS))
        animal, place, food = ANIMALS[i], PLACES[i], FOODS[i]
        sentences = [
            f"The {animal} lives in the {place}.",
            f"In the {place} it finds {food} every day.",
            f"Nobody else likes {food} as much as the {animal}.",
            f"When winter comes the {animal} leaves the {place} and dreams of {food}.",
        ]
        rng.shuffle(sentences)
        texts.append(" ".join(sentences))
    path.write_text("\n\n".join(f"{n} years ago. {text}" for n, text in enumerate(texts)), encoding="utf-8")
    return path


def make_corpus(directory: Path, seed: int = 0, vocab_size: int = 240) -> Path:
    """The text of ``seed``, prepared in ``directory``/corpus."""
    return prepare_text(write_text(directory / "text.txt", seed=seed), directory / "corpus", vocab_size)


def prepare_text(text: Path, out: Path, vocab_size: int = 240) -> Path:
    """A corpus in ``out``, with a tenth of the documents held out."""
    prepare(PrepareSettings(out, [str(text)], vocab_size=vocab_size, heldout=0.1, workers=1))
    return out
