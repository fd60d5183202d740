"""Passages to examples, and examples to the tensors of packed batches."""

from __future__ import annotations

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch
from ..corpus.reader import Corpus, Split
from .examples import Examples, full_sentences, sentence_pairs
from .masking import MLM_PROBABILITY, Masker, num_to_mask
from .pack import pack_examples, shuffled_queue
from .passages import Passages, ranges
from .shape import BatchShape

PASSAGE_SEQLENS = 8  # examples per passage, at most: fewer shuffle better, more break documents less often


def fit_shape(
    split: Split,
    tokens: int,
    seqlen: int,
    *,
    nsp: bool = True,
    sop: bool = False,
    mlm_probability: float = MLM_PROBABILITY,
) -> BatchShape:
    """The shape for ``tokens`` and ``seqlen`` with the S and M that packing the text of ``split`` takes.

    Packs 64 batches of a sample without bounds on S and M. S is the most segments seen plus 2 %, M the most masked
    tokens, rounded up to 8. (Packing respects both; a tight bound costs a little slack now and then.) The same split
    and arguments give the same shape.

    Args:
        split: of a `Corpus`.
        tokens: T.
        seqlen: the longest segment.
        nsp, sop, mlm_probability: as in `BatchMaker`.

    Raises:
        ValueError: tokens or seqlen is out of range, or the split is empty.
    """
    unbounded = BatchShape(tokens, segments=1 << 40, masked=1 << 40, seqlen=seqlen)
    passages = Passages(split, PASSAGE_SEQLENS * seqlen)
    rng = np.random.default_rng(0)
    text = passages.read(passages.sample(1 << 21, rng), separator=None if nsp else 0)
    no_piece = np.zeros(int(text.tokens.max()) + 1, dtype=bool)
    examples = sentence_pairs(text, seqlen, rng, no_piece, sop=sop) if nsp else full_sentences(text, seqlen, no_piece)
    lengths = examples.lengths
    masks = num_to_mask(examples.a_length + examples.b_length, mlm_probability)
    batches = pack_examples(lengths, masks, shuffled_queue(lengths, 66 * tokens, rng), unbounded, 64)
    segments = max(len(b) + unbounded.slack_segments(int(lengths[b].sum())) for b in batches)
    masked = max(int(masks[b].sum()) for b in batches)
    masked = max(masked, int(num_to_mask(np.array(seqlen - 2), mlm_probability)))  # the longest example must fit
    return BatchShape(tokens, segments + segments // 50 + 1, -(-masked // 8) * 8, seqlen)


class BatchMaker:
    """Makes examples of the passages of a split, and packed batches of the examples.

    Args:
        corpus: prepared text.
        split_name: "train" or "heldout".
        shape: of every batch; `fit_shape` finds it.
        nsp: make sentence pairs with labels (half IsNext, half NotNext); False: full sentences without labels.
        sop: labels of sentence order in place of those (half in order, half exchanged).
        mlm_probability: share of the tokens to predict, in (0, 1).
        whole_word: mask whole words, not single tokens.

    Attributes:
        shape, split_name, nsp: as given.
        passages: the split's passages.

    Raises:
        ValueError: an argument is out of range, or the split is empty.
    """

    def __init__(
        self,
        corpus: Corpus,
        split_name: str,
        shape: BatchShape,
        *,
        nsp: bool = True,
        sop: bool = False,
        mlm_probability: float = MLM_PROBABILITY,
        whole_word: bool = False,
    ) -> None:
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be between 0 and 1; got {mlm_probability!r}")
        largest = int(num_to_mask(np.array(shape.seqlen - 2), mlm_probability))
        if shape.masked < largest:
            raise ValueError(
                f"masked must be at least {largest}, the masked tokens of one example of {shape.seqlen} tokens; got "
                f"{shape.masked}: use fit_shape"
            )
        self.shape = shape
        self.split_name = split_name
        self.nsp = nsp
        self._sop = sop
        self.passages = Passages(corpus.split(split_name), PASSAGE_SEQLENS * shape.seqlen)
        self._mlm_probability = mlm_probability
        self._special = corpus.special
        self._continues_word = corpus.continues_word
        self._masker = Masker(
            corpus.never_predicted,
            corpus.special.mask,
            corpus.vocab_size,
            mlm_probability,
            corpus.continues_word if whole_word else None,
        )

    def examples(self, passages: np.ndarray, rng: np.random.Generator) -> Examples:
        """The examples of the given passages (numbers), in their order."""
        if self.nsp:
            text = self.passages.read(passages)
            return sentence_pairs(text, self.shape.seqlen, rng, self._continues_word, sop=self._sop)
        text = self.passages.read(passages, separator=self._special.sep)
        return full_sentences(text, self.shape.seqlen, self._continues_word)

    def pack(self, examples: Examples, queue: np.ndarray, num_batches: int | None = None) -> list[np.ndarray]:
        """`pack_examples` for these examples, with the number of tokens that will be masked in each."""
        masks = num_to_mask(examples.count(self._masker.maskable), self._mlm_probability)
        return pack_examples(examples.lengths, masks, queue, self.shape, num_batches)

    def batches(self, examples: Examples, packed: list[np.ndarray], rng: np.random.Generator) -> list[PackedBatch]:
        """Lays out and masks the batches that `pack` chose. Each field of all batches is one block of memory.

        Args:
            examples: of `examples`.
            packed: K arrays, the numbers of each batch's examples.
            rng: decides the masks.
        """
        K, T, S = len(packed), self.shape.tokens, self.shape.segments
        cu_seqlens, nsp_labels, num_tokens = self._segments(examples, packed)
        segment_of = np.repeat(np.arange(K * S), np.diff(cu_seqlens, axis=1).ravel())  # [K·T], all batches end to end
        segment_start = (cu_seqlens[:, :-1] + T * np.arange(K)[:, None]).ravel()  # [K·S]
        position_ids = np.arange(K * T) - segment_start[segment_of]

        is_example = np.arange(S) < np.array([len(chosen) for chosen in packed])[:, None]  # [K, S]
        start = segment_start[is_example.ravel()]
        input_ids, token_type_ids = self._tokens(examples, np.concatenate(packed), start, K * T)
        positions, labels = self._masker(input_ids, segment_of, rng)
        masked_positions, masked_labels, num_masked = self._masked_slots(positions, labels, K)

        num_pairs = np.count_nonzero(nsp_labels != IGNORE, axis=1)
        fields = {
            "input_ids": input_ids.reshape(K, T),
            "token_type_ids": token_type_ids.reshape(K, T),
            "position_ids": position_ids.reshape(K, T),
            "cu_seqlens": cu_seqlens,
            "masked_positions": masked_positions,
            "masked_labels": masked_labels,
            "nsp_labels": nsp_labels,
        }
        blocks = {name: torch.from_numpy(block) for name, block in fields.items()}
        return [
            PackedBatch(
                **{name: block[k] for name, block in blocks.items()},
                max_seqlen=self.shape.seqlen,
                num_tokens=int(num_tokens[k]),
                num_masked=int(num_masked[k]),
                num_pairs=int(num_pairs[k]),
            )
            for k in range(K)
        ]

    def _segments(self, examples: Examples, packed: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """cu_seqlens, int32 [K, S + 1]; nsp_labels, int64 [K, S]; num_tokens, int64 [K].

        A batch's segments are its examples, then the slack in pieces of at most seqlen, then empty ones.
        """
        shape = self.shape
        K, S = len(packed), shape.segments
        segment_lengths = np.zeros((K, S), dtype=np.int64)
        nsp_labels = np.full((K, S), IGNORE, dtype=np.int64)
        num_tokens = np.zeros(K, dtype=np.int64)
        for k, chosen in enumerate(packed):
            lengths = examples.lengths[chosen]
            num_tokens[k] = lengths.sum()
            slack = shape.tokens - int(num_tokens[k])
            pieces = shape.slack_segments(int(num_tokens[k]))
            segment_lengths[k, : len(chosen)] = lengths
            segment_lengths[k, len(chosen) : len(chosen) + pieces] = shape.seqlen
            if pieces:
                segment_lengths[k, len(chosen) + pieces - 1] = slack - (pieces - 1) * shape.seqlen
            nsp_labels[k, : len(chosen)] = examples.labels[chosen]
        cu_seqlens = np.zeros((K, S + 1), dtype=np.int32)
        np.cumsum(segment_lengths, axis=1, out=cu_seqlens[:, 1:])
        return cu_seqlens, nsp_labels, num_tokens

    def _tokens(
        self, examples: Examples, chosen: np.ndarray, start: np.ndarray, total: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and token_type_ids, int64 [total]: the ``chosen`` examples at ``start``, padding elsewhere."""
        special = self._special
        a_length, b_length = examples.a_length[chosen], examples.b_length[chosen]
        has_b = b_length > 0
        input_ids = np.full(total, special.pad, dtype=np.int64)
        token_type_ids = np.zeros(total, dtype=np.int64)
        input_ids[start] = special.cls
        input_ids[ranges(start + 1, a_length)] = examples.tokens[ranges(examples.a_start[chosen], a_length)]
        input_ids[start + 1 + a_length] = special.sep
        b_start = start + 2 + a_length
        input_ids[ranges(b_start, b_length)] = examples.tokens[ranges(examples.b_start[chosen], b_length)]
        input_ids[(b_start + b_length)[has_b]] = special.sep
        token_type_ids[ranges(b_start, b_length + has_b)] = 1
        return input_ids, token_type_ids

    def _masked_slots(
        self, positions: np.ndarray, labels: np.ndarray, K: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """masked_positions and masked_labels, int64 [K, M], and num_masked, int64 [K].

        ``positions`` and ``labels`` are those of all batches end to end.
        """
        T, M = self.shape.tokens, self.shape.masked
        batch_of = positions // T
        num_masked = np.bincount(batch_of, minlength=K)
        slot = np.arange(len(positions)) - (np.cumsum(num_masked) - num_masked)[batch_of]
        masked_positions = np.zeros((K, M), dtype=np.int64)
        masked_labels = np.full((K, M), IGNORE, dtype=np.int64)
        masked_positions[batch_of, slot] = positions - T * batch_of
        masked_labels[batch_of, slot] = labels
        return masked_positions, masked_labels, num_masked
