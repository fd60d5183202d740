"""``fusebert evaluate``: how well a model predicts held-out text.

The masked-LM figures mask 15 % of the tokens as pretraining does. The pseudo-perplexity (Salazar et al. 2020) masks
each token of a text in turn and leaves all others:

    PPPL = exp(−(1/N) Σ_texts Σ_i log p(w_i | text without w_i)),  N tokens without special ones
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...model.batch import IGNORE, PackedBatch
from ..batches.batch_maker import BatchMaker, fit_shape
from ..batches.dataset import heldout_batches
from ..batches.masking import MLM_PROBABILITY, Masker
from ..corpus.reader import Corpus
from ..errors import UserError
from ..run.evaluate import Evaluation, evaluate
from .masked import MaskedModel
from .packing import pack_texts, token_budget
from .rows import Columns, read_rows
from .settings import EvaluateSettings
from .tokens import EncodedText

DATA_SEQLEN = 128  # of `fusebert pretrain`
DATA_TOKENS = {"cpu": 65_536, "cuda": 1_048_576}  # the most held-out tokens of a corpus
MOST_TEXTS = 100_000  # texts of a file are in memory


@dataclasses.dataclass(frozen=True)
class ModelEvaluation:
    """Figures of a model on a text.

    Attributes:
        masked: masked-LM and next-sentence figures.
        pseudo_perplexity: None if it was left out.
        pseudo_tokens: tokens that it is over.
    """

    masked: Evaluation
    pseudo_perplexity: float | None
    pseudo_tokens: int

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        pseudo = {"pseudo_perplexity": self.pseudo_perplexity, "pseudo_tokens": self.pseudo_tokens}
        return {**self.masked.to_json(), **pseudo}

    def lines(self) -> list[str]:
        """The figures in words."""
        masked = self.masked
        lines = [
            f"masked-LM loss      {masked.mlm_loss:.4f} nats a token ({masked.num_masked:,} masked tokens)",
            f"perplexity          {masked.perplexity:,.2f}",
            f"accuracy            {masked.mlm_accuracy:.2%}",
        ]
        if masked.nsp_accuracy is not None:
            lines.append(f"next sentence       {masked.nsp_accuracy:.2%} of {masked.num_pairs:,} pairs")
        if self.pseudo_perplexity is not None:
            lines.append(f"pseudo-perplexity   {self.pseudo_perplexity:,.2f} ({self.pseudo_tokens:,} tokens)")
        return lines


def evaluate_model(settings: EvaluateSettings) -> tuple[ModelEvaluation, MaskedModel]:
    """Runs ``fusebert evaluate``.

    Raises:
        UserError, ValueError: an option, the model, the corpus or a text cannot be used.
    """
    if (settings.data is None) == (settings.text is None):
        raise UserError("give a corpus with --data or a file of texts with --text: one of the two")
    if settings.pseudo < 0 or settings.seed < 0:
        raise UserError("--pseudo and --seed must be 0 or more")
    model = MaskedModel(settings)
    if settings.data is not None:
        batches = _corpus_batches(model, settings)
        texts = _originals(batches, settings.pseudo)
    else:
        encoded = _encoded(model, settings)
        batches = masked_batches(model, encoded, settings.seed)
        texts = encoded[: settings.pseudo]
    result = evaluate(model.model, batches, model.machine.compute_dtype)
    perplexity, tokens = pseudo_perplexity(model, texts) if texts else (None, 0)
    return ModelEvaluation(result, perplexity, tokens), model


def _corpus_batches(model: MaskedModel, settings: EvaluateSettings) -> list[PackedBatch]:
    from tokenizers import Tokenizer

    assert settings.data is not None
    corpus = Corpus.open(settings.data)
    theirs = Tokenizer.from_file(str(corpus.tokenizer_path)).get_vocab()
    if theirs != model.tokenizer.tokenizer.get_vocab():
        raise UserError(
            f"the corpus {settings.data} has another vocabulary than {settings.model}: prepare it with that model's "
            "tokenizer (fusebert prepare --tokenizer), or give the text with --text"
        )
    seqlen = min(settings.seqlen or DATA_SEQLEN, model.folder.config.max_position_embeddings)
    tokens = max(model.machine.tokens_per_batch // 8 * 8, -(-seqlen // 8) * 8)
    shape = fit_shape(corpus.split("heldout"), tokens, seqlen, nsp=model.has_pairs)
    maker = BatchMaker(corpus, "heldout", shape, nsp=model.has_pairs)
    return heldout_batches(maker, tokens=DATA_TOKENS[model.machine.device.type], seed=settings.seed)


def _originals(batches: Sequence[PackedBatch], count: int) -> list[EncodedText]:
    """The first ``count`` segments of ``batches``, without masks."""
    texts: list[EncodedText] = []
    for batch in batches:
        ids = batch.input_ids.clone()
        labelled = batch.masked_labels != IGNORE
        ids[batch.masked_positions[labelled]] = batch.masked_labels[labelled]
        bounds = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(bounds):
            if len(texts) == count:
                return texts
            if start < end <= batch.num_tokens:
                texts.append(EncodedText(ids[start:end].numpy(), batch.token_type_ids[start:end].numpy()))
    return texts


def _encoded(model: MaskedModel, settings: EvaluateSettings) -> list[EncodedText]:
    assert settings.text is not None
    texts = []
    for row in read_rows(settings.text, Columns(text=settings.column)):
        if row.text.strip():
            texts.append(row.text)
        if len(texts) > MOST_TEXTS:
            raise UserError(f"{settings.text} has over {MOST_TEXTS:,} texts: give a sample of them")
    if not texts:
        raise UserError(f"{settings.text} has no texts")
    return model.tokenizer(texts)


def special_ids(model: MaskedModel) -> tuple[int, ...]:
    """Ids of the tokens that are never masked."""
    added = model.tokenizer.tokenizer.get_added_tokens_decoder()
    return tuple(sorted({number for number, token in added.items() if token.special} | {model.mask[1]}))


def masked_batches(model: MaskedModel, texts: Sequence[EncodedText], seed: int) -> list[PackedBatch]:
    """Packed batches of ``texts``, masked as in pretraining; the same for the same seed."""
    masker = Masker(special_ids(model), model.mask[1], model.folder.config.vocab_size, MLM_PROBABILITY)
    rng = np.random.default_rng(seed)
    batches = []
    for chosen in token_budget([len(text) for text in texts], model.machine.tokens_per_batch):
        packed = pack_texts([texts[i] for i in chosen])
        ids = packed.input_ids.numpy()
        segments = np.repeat(np.arange(len(chosen)), np.diff(packed.cu_seqlens.numpy()))
        positions, labels = masker(ids, segments, rng)
        batches.append(
            PackedBatch(
                input_ids=torch.from_numpy(ids),
                token_type_ids=packed.token_type_ids,
                position_ids=packed.position_ids,
                cu_seqlens=packed.cu_seqlens,
                masked_positions=torch.from_numpy(positions),
                masked_labels=torch.from_numpy(labels),
                nsp_labels=torch.full((len(chosen),), IGNORE),
                max_seqlen=packed.max_seqlen,
                num_tokens=packed.num_tokens,
                num_masked=len(positions),
                num_pairs=0,
            )
        )
    return batches


def pseudo_perplexity(model: MaskedModel, texts: Sequence[EncodedText]) -> tuple[float | None, int]:
    """(Pseudo-perplexity, number of tokens) of ``texts``; (None, 0) if they have none but special tokens."""
    special = special_ids(model)
    total, count = 0.0, 0
    for text in tqdm(texts, unit=" texts", dynamic_ncols=True, disable=None):
        positions = np.flatnonzero(~np.isin(text.ids, special))
        copies = []
        for position in positions:
            ids = text.ids.copy()
            ids[position] = model.mask[1]
            copies.append(EncodedText(ids, text.types))
        for i, log_probabilities in model.log_probabilities(copies, [positions[[i]] for i in range(len(positions))]):
            total += float(log_probabilities[0, text.ids[positions[i]]])
        count += len(positions)
    return (math.exp(min(-total / count, 700.0)), count) if count else (None, 0)


def write_json(settings: EvaluateSettings, result: ModelEvaluation) -> None:
    """Writes the figures to ``settings.out``, if it is given."""
    from ...model.atomic import replace_file

    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(settings.out) as partial:
            partial.write_text(json.dumps(result.to_json(), indent=1) + "\n", encoding="utf-8")
