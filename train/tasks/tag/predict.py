"""``fusebert predict`` with a tagger: the tag of each word, and the spans that the tags mark."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ....model.hf.encoders import EncoderFolder
from ....model.hf.save_classifier import reading_of
from ...errors import UserError
from ..embed import blocks
from ..models import Machine
from ..settings import PredictSettings
from .model import make_tagger, predict_words
from .sentences import read_words
from .tags import TagSet, entities
from .windows import WordTokenizer


class TagPredictor:
    """A tagger: sentences → records.

    Attributes:
        notes: what to tell the user about the weights.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """

    def __init__(self, settings: PredictSettings, machine: Machine, folder: EncoderFolder) -> None:
        if settings.text_pair is not None:
            raise UserError(f"--text-pair is not for {settings.model}, which tags the words of one text")
        names = folder.label_names
        (bias_name,) = folder.family.names(folder.config.num_hidden_layers)["tag_out.bias"]
        bias = folder.tensors.get(bias_name)  # [C]
        if bias is None:
            raise UserError(f"{settings.model} has no {bias_name}: fine-tune the model first (fusebert finetune)")
        self._tags = TagSet(tuple(names or [f"LABEL_{i}" for i in range(len(bias))]))
        if bias.shape != (len(self._tags.names),):
            given = f"{bias.numel()} outputs, but id2label has {len(self._tags.names)}"
            raise UserError(f"{settings.model}: the head has {given}")
        self._settings, self._machine = settings, machine
        self._tokenizer = WordTokenizer(
            folder, settings.seqlen, reading_of(folder, "stride") if settings.stride is None else settings.stride
        )
        model, self.notes = make_tagger(folder, len(self._tags.names), trained=True)
        self._model = model.to(machine.device)

    def records(self) -> Iterator[dict[str, Any]]:
        """One record a sentence of ``settings.input``, in its order. Memory is bounded.

        Raises:
            UserError: a row cannot be used.
        """
        settings = self._settings
        with tqdm(unit=" sentences", dynamic_ncols=True, disable=None) as bar:
            for block in blocks(read_words(settings.input, settings.text)):
                sentences = [sentence.words for sentence in block]
                windows = [window for window in self._tokenizer(sentences) if len(window.rows)]
                logits = predict_words(self._model, windows, list(map(len, sentences)), self._machine)
                for words, each in zip(sentences, logits, strict=True):
                    tags = self._tags.decode(each)
                    record: dict[str, Any] = {"tokens": words, "tags": tags}
                    if self._tags.are_spans:
                        record["entities"] = entities([tag or "O" for tag in tags])
                    yield record
                bar.update(len(block))

    def warnings(self) -> list[str]:
        """What to tell the user about the texts."""
        return list(filter(None, [self._tokenizer.warning()]))
