"""A model with a masked-language head, which predicts tokens of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...model.hf.encoders import EncoderFolder
from ...model.hf.folder import read_settings
from ...model.pretraining import BertForPreTraining
from ..errors import UserError
from ..step.step import autocast
from .models import choose_machine, load, open_folder
from .packing import pack_texts, token_budget
from .settings import ModelSettings
from .tokens import CONFIG, EncodedText, TextTokenizer

MASK_TOKENS = ("[MASK]", "<mask>")


class MaskedModel:
    """The model of ``settings``, ready to predict tokens.

    Attributes:
        folder: it came from.
        machine: where it runs.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        mask: (text, id) of the mask token.
        has_pairs: the model has a next-sentence head.
        notes: what to tell the user about the weights.

    Raises:
        UserError, ValueError: the model or an option cannot be used.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self.machine = choose_machine(settings)
        self.folder = open_folder(settings.model)
        self.tokenizer = TextTokenizer(self.folder, settings.seqlen)
        self.mask = _mask_token(self.folder, self.tokenizer)
        model = BertForPreTraining(self.folder.config, self.folder.embedding_size)
        notes = load(model, self.folder, needs=("mlm_dense", "mlm_norm", "mlm_bias"))
        self.has_pairs = not any("seq_relationship" in note or "nsp_classifier" in note for note in notes)
        self.notes = [note for note in notes if not note.startswith("not in the folder")]  # only the next-sentence head
        self.model = model.to(self.machine.device).eval()

    @torch.no_grad()
    def log_probabilities(
        self, texts: Sequence[EncodedText], positions: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, Tensor]]:
        """(Number of a text, float32 [k, V] on the device: log p at its k ``positions``), in the order of the batches.

        Args:
            positions: for each text, int64 [k].
        """
        device = self.machine.device
        for chosen in token_budget([len(text) for text in texts], self.machine.tokens_per_batch):
            batch = pack_texts([texts[i] for i in chosen])
            rows = [int(start) + positions[i] for start, i in zip(batch.cu_seqlens[:-1], chosen, strict=True)]
            batch = batch.to(device, non_blocking=True)
            with autocast(device, self.machine.compute_dtype):
                hidden = self.model.encoder(  # [T, H]
                    batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
                )
                for i, at in zip(chosen, rows, strict=True):
                    logits = self.model.predict_tokens(hidden[torch.from_numpy(at).to(device)])  # [k, V]
                    yield int(i), logits.float().log_softmax(-1)


def _mask_token(folder: EncoderFolder, tokenizer: TextTokenizer) -> tuple[str, int]:
    path = folder.directory / CONFIG
    given = read_settings(path).get("mask_token") if path.is_file() else None
    stated = [given.get("content") if isinstance(given, dict) else given]
    for token in [*stated, *MASK_TOKENS]:
        if isinstance(token, str) and (number := tokenizer.tokenizer.token_to_id(token)) is not None:
            return token, int(number)
    raise UserError(f"the tokenizer in {folder.directory} has no mask token ({' or '.join(MASK_TOKENS)})")
