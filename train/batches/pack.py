"""Examples to packed batches of constant shape, as an endless dataset of chunks.

An epoch shuffles the passages of a split and deals them out, by tokens, to chunks; a chunk becomes `batches_per_chunk`
batches. Everything random about chunk i is drawn from (seed, i), so any process can make any chunk, at any time.

Packing is offline in a chunk: its examples queue up in random order; a batch takes the first of them that fit, gives
back the last one or two, and takes instead the two waiting ones that fill it best. On text the slack is under 0.01 %
at seqlen 128, and 0.5 % where all examples are long (16384 tokens, full sentences of 512). What a chunk's own examples
leave of its batches is filled with some of them again, under other masks (2 % and the rounding to whole batches).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch.utils.data import Dataset

from ...model.batch import IGNORE, PackedBatch
from ..corpus.reader import Corpus, Split
from .examples import MIN_SEQLEN, Examples, full_sentences, sentence_pairs
from .masking import Masker, num_to_mask
from .passages import Passages, ranges

PASSAGE_SEQLENS = 8  # a passage holds up to this many examples: fewer shuffle better, more break documents less often
CHUNK_TOKENS = 1 << 18  # of packed batches: hundreds of examples to match and pack, a few MB in memory
CHUNK_BATCHES = (4, 32)  # and yet at least, at most so many batches
WINDOW = 96  # waiting examples among which the two are sought that fill a batch best
SPARE = 0.02  # batches in an epoch beyond those its text needs, so that a chunk a little larger loses nothing
# Pairs i < j of a window whose index 0 is nobody: (0, j) is j alone, and (0, 0), allowed too, is no one.
_PAIRS = np.triu(np.ones((WINDOW + 1, WINDOW + 1), dtype=bool), 1)
_PAIRS[0, 0] = True
_PASSAGE_ORDER, _CHUNK = 0, 1  # what a random stream is for


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The constant shape of a run's batches.

    Attributes:
        tokens: T, a multiple of 8, at least ``seqlen``.
        segments: S, examples and slack segments at most, at least T / seqlen.
        masked: M, a multiple of 8.
        seqlen: the longest segment, [CLS] and [SEP]s included, at least 5.

    Raises:
        ValueError: a field is not what is said above.
    """

    tokens: int
    segments: int
    masked: int
    seqlen: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a positive integer; got {value!r}")
        if self.seqlen < MIN_SEQLEN:
            raise ValueError(f"seqlen must be at least {MIN_SEQLEN}, [CLS] a [SEP] b [SEP]; got {self.seqlen}")
        if self.tokens < self.seqlen:
            raise ValueError(f"tokens must be at least seqlen, {self.seqlen}: an example must fit; got {self.tokens}")
        for name in ("tokens", "masked"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} must be a multiple of 8, for the matrix units; got {getattr(self, name)}")
        if self.segments < -(-self.tokens // self.seqlen):
            raise ValueError(
                f"segments must be at least {-(-self.tokens // self.seqlen)}, tokens / seqlen; got {self.segments}: "
                "use BatchShape.fit"
            )

    @classmethod
    def fit(
        cls, split: Split, tokens: int, seqlen: int, *, nsp: bool = True, mlm_probability: float = 0.15
    ) -> BatchShape:
        """The shape for ``tokens`` and ``seqlen`` with the S and M that packing the text of ``split`` takes.

        Packs 64 batches of a sample without bounds: S is the most segments seen and 2 % more, M the most masked
        tokens, rounded up to 8. (Packing keeps to both; a tight bound costs a little slack now and then.) The same
        split and arguments give the same shape.

        Raises:
            ValueError: tokens or seqlen is not allowed, or the split is empty.
        """
        unbounded = cls(tokens, segments=1 << 40, masked=1 << 40, seqlen=seqlen)
        passages = Passages(split, PASSAGE_SEQLENS * seqlen)
        rng = np.random.default_rng(0)
        text = passages.read(_sample(passages, 1 << 21, rng), separator=None if nsp else 0)
        no_piece = np.zeros(int(text.tokens.max()) + 1, dtype=bool)
        examples = sentence_pairs(text, seqlen, rng, no_piece) if nsp else full_sentences(text, seqlen, no_piece)
        lengths = examples.lengths
        masks = num_to_mask(examples.a_length + examples.b_length, mlm_probability)
        batches = pack(lengths, masks, _queue(lengths, 66 * tokens, rng), unbounded, 64)
        segments = max(len(b) + -(-(tokens - int(lengths[b].sum())) // seqlen) for b in batches)
        masked = max(int(masks[b].sum()) for b in batches)
        masked = max(masked, int(num_to_mask(np.array(seqlen - 2), mlm_probability)))  # the longest example, unseen
        return cls(tokens, segments + segments // 50 + 1, -(-masked // 8) * 8, seqlen)


def pack(
    lengths: np.ndarray, masks: np.ndarray, queue: np.ndarray, shape: BatchShape, num_batches: int | None = None
) -> list[np.ndarray]:
    """Which examples go into which batch.

    Args:
        lengths, masks: int64 [E], tokens and masked tokens of each example.
        queue: int64 [Q], numbers of examples in the order they are to be taken, some more than once perhaps.
        shape: bounds T, S (with the slack's segments) and M.
        num_batches: stop after so many, for which the queue must be long enough; None: empty the queue.

    Returns:
        For each batch the numbers of its examples. The last one is not full when the queue is emptied.

    Raises:
        ValueError: an example doesn't fit even into an empty batch.
    """
    batches: list[np.ndarray] = []
    running = np.concatenate(([0], np.cumsum(lengths[queue])))
    reach = shape.tokens + WINDOW * int(lengths[queue].mean()) if len(queue) else 0
    waiting, taken = queue[:0], 0
    while (len(waiting) or taken < len(queue)) and len(batches) != num_batches:
        # Tokens enough to choose from: those of a batch and of the window.
        missing = max(0, reach - int(lengths[waiting].sum()))
        end = min(len(queue), int(np.searchsorted(running, running[taken] + missing)))
        waiting, taken = np.concatenate((waiting, queue[taken:end])), end
        chosen = _choose(lengths[waiting], masks[waiting], shape)
        batches.append(waiting[chosen])
        waiting = np.delete(waiting, chosen)
    return batches


def _choose(lengths: np.ndarray, masks: np.ndarray, shape: BatchShape) -> np.ndarray:
    """Indices of waiting examples that fill a batch: the oldest ones, and the best two to end with."""

    def segments(examples: np.ndarray | int, used: np.ndarray) -> np.ndarray:
        return examples + -(-(shape.tokens - used) // shape.seqlen)  # the slack takes segments too

    used, masked = np.cumsum(lengths), np.cumsum(masks)
    fits = (used <= shape.tokens) & (masked <= shape.masked)
    fits &= segments(np.arange(1, len(lengths) + 1), used) <= shape.segments
    if fits.all():
        return np.arange(len(lengths))
    prefix = int(np.argmin(fits))
    if prefix == 0:
        raise ValueError(
            f"an example of {lengths[0]} tokens, {masks[0]} masked, doesn't fit into an empty batch of {shape}: "
            "use BatchShape.fit"
        )
    best, ending = -1, (0, np.zeros(0, dtype=np.int64))
    for kept in (prefix - 1, prefix - 2, prefix):
        if kept < 1:  # the oldest is always taken, or it might wait for ever
            continue
        window = np.concatenate(([0], lengths[kept : kept + WINDOW]))
        window_masks = np.concatenate(([0], masks[kept : kept + WINDOW]))
        total = used[kept - 1] + window[:, None] + window
        total_masked = masked[kept - 1] + window_masks[:, None] + window_masks
        someone = (window > 0).astype(np.int64)
        allowed = (total <= shape.tokens) & (total_masked <= shape.masked)
        allowed &= segments(kept + someone[:, None] + someone, total) <= shape.segments
        allowed &= _PAIRS[: len(window), : len(window)]
        total = np.where(allowed, total, -1)
        where = int(total.argmax())
        if total.flat[where] > best:
            pair = np.unique(np.unravel_index(where, total.shape))
            best, ending = int(total.flat[where]), (kept, kept - 1 + pair[pair > 0])
        if best == shape.tokens:
            break
    kept, pair = ending
    return np.concatenate((np.arange(kept), pair))


def _sample(passages: Passages, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Passages drawn at random without repetition, of about ``tokens`` tokens or all."""
    share = min(1.0, tokens / passages.num_tokens)
    return rng.choice(len(passages), size=math.ceil(share * len(passages)), replace=False)


def _queue(lengths: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Every example in random order, over and over, until they have at least ``tokens`` tokens."""
    rounds = max(1, -(-tokens // int(lengths.sum())))
    return np.concatenate([rng.permutation(len(lengths)) for _ in range(rounds)])


class BatchMaker:
    """Makes examples of passages, and packed batches of examples; arguments as in `PackedExamples`."""

    def __init__(
        self,
        corpus: Corpus,
        split_name: str,
        shape: BatchShape,
        *,
        nsp: bool = True,
        mlm_probability: float = 0.15,
        whole_word: bool = False,
    ) -> None:
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be between 0 and 1; got {mlm_probability!r}")
        largest = int(num_to_mask(np.array(shape.seqlen - 2), mlm_probability))
        if shape.masked < largest:
            raise ValueError(
                f"masked must be at least {largest}, what one example of {shape.seqlen} tokens takes; got "
                f"{shape.masked}: use BatchShape.fit"
            )
        self.shape = shape
        self.passages = Passages(corpus.split(split_name), PASSAGE_SEQLENS * shape.seqlen)
        self._nsp = nsp
        self._mlm_probability = mlm_probability
        self._special = corpus.special
        self._continues_word = corpus.continues_word
        self._masker = Masker(
            corpus.special,
            corpus.special.mask,
            corpus.vocab_size,
            mlm_probability,
            corpus.continues_word if whole_word else None,
        )

    def examples(self, passages: np.ndarray, rng: np.random.Generator) -> Examples:
        """The examples of the given passages (numbers), in their order."""
        if self._nsp:
            return sentence_pairs(self.passages.read(passages), self.shape.seqlen, rng, self._continues_word)
        text = self.passages.read(passages, separator=self._special.sep)
        return full_sentences(text, self.shape.seqlen, self._continues_word)

    def pack(self, examples: Examples, queue: np.ndarray, num_batches: int | None = None) -> list[np.ndarray]:
        """`pack` for these examples, with the number of tokens that will be masked in each."""
        masks = num_to_mask(examples.count(self._masker.maskable), self._mlm_probability)
        return pack(examples.lengths, masks, queue, self.shape, num_batches)

    def batches(self, examples: Examples, packed: list[np.ndarray], rng: np.random.Generator) -> list[PackedBatch]:
        """The batches that `pack` chose, masked. Their tensors share memory, a block for each field."""
        shape, special = self.shape, self._special
        K, T, S, M = len(packed), shape.tokens, shape.segments, shape.masked

        # Segments: the examples of each batch, then the slack in pieces of at most seqlen, then empty ones.
        segment_lengths = np.zeros((K, S), dtype=np.int64)
        nsp_labels = np.full((K, S), IGNORE, dtype=np.int64)
        num_tokens = np.zeros(K, dtype=np.int64)
        for k, chosen in enumerate(packed):
            lengths = examples.lengths[chosen]
            num_tokens[k] = lengths.sum()
            slack = T - int(num_tokens[k])
            pieces = -(-slack // shape.seqlen)
            segment_lengths[k, : len(chosen)] = lengths
            segment_lengths[k, len(chosen) : len(chosen) + pieces] = shape.seqlen
            if pieces:
                segment_lengths[k, len(chosen) + pieces - 1] = slack - (pieces - 1) * shape.seqlen
            nsp_labels[k, : len(chosen)] = examples.labels[chosen]
        cu_seqlens = np.zeros((K, S + 1), dtype=np.int32)
        np.cumsum(segment_lengths, axis=1, out=cu_seqlens[:, 1:])
        segment_of = np.repeat(np.arange(K * S), segment_lengths.ravel())  # (K·T,)
        segment_start = (cu_seqlens[:, :-1] + T * np.arange(K)[:, None]).ravel()  # (K·S,), of all batches end to end
        position_ids = np.arange(K * T) - segment_start[segment_of]

        # Tokens, of all batches end to end.
        is_example = np.arange(S) < np.array([len(chosen) for chosen in packed])[:, None]
        start = segment_start[is_example.ravel()]
        chosen = np.concatenate(packed)
        a_length, b_length = examples.a_length[chosen], examples.b_length[chosen]
        has_b = b_length > 0
        input_ids = np.full(K * T, special.pad, dtype=np.int64)
        token_type_ids = np.zeros(K * T, dtype=np.int64)
        input_ids[start] = special.cls
        input_ids[ranges(start + 1, a_length)] = examples.tokens[ranges(examples.a_start[chosen], a_length)]
        input_ids[start + 1 + a_length] = special.sep
        b_out = start + 2 + a_length
        input_ids[ranges(b_out, b_length)] = examples.tokens[ranges(examples.b_start[chosen], b_length)]
        input_ids[(b_out + b_length)[has_b]] = special.sep
        token_type_ids[ranges(b_out, b_length + has_b)] = 1

        positions, labels = self._masker(input_ids, segment_of, rng)
        batch_of = positions // T
        num_masked = np.bincount(batch_of, minlength=K)
        slot = np.arange(len(positions)) - (np.cumsum(num_masked) - num_masked)[batch_of]
        masked_positions = np.zeros((K, M), dtype=np.int64)
        masked_labels = np.full((K, M), IGNORE, dtype=np.int64)
        masked_positions[batch_of, slot] = positions - T * batch_of
        masked_labels[batch_of, slot] = labels

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
                max_seqlen=shape.seqlen,
                num_tokens=int(num_tokens[k]),
                num_masked=int(num_masked[k]),
                num_pairs=int(num_pairs[k]),
            )
            for k in range(K)
        ]


class PackedExamples(Dataset[list[PackedBatch]]):
    """Chunks of packed batches, without end: ``examples[i]`` is a list of ``batches_per_chunk`` batches.

    It depends on the arguments and i alone. Of the chunks of an epoch, each passage is in one.

    Args:
        corpus: prepared text.
        split_name: "train" or "heldout".
        shape: of every batch; `BatchShape.fit` finds it.
        seed: not negative; decides order, pairs and masks.
        nsp: sentence pairs with labels (half IsNext, half NotNext), or full sentences without.
        mlm_probability: share of the tokens to predict.
        whole_word: mask words, not single tokens.

    Attributes:
        shape: as given.
        batches_per_chunk: K, constant.
        chunks_per_epoch: ``chunks_per_epoch * batches_per_chunk`` batches are an epoch.

    Raises:
        ValueError: an argument is not allowed, the split is empty, or pairs are asked of a single document.
    """

    def __init__(
        self,
        corpus: Corpus,
        split_name: str,
        shape: BatchShape,
        *,
        seed: int,
        nsp: bool = True,
        mlm_probability: float = 0.15,
        whole_word: bool = False,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative; got {seed}")
        self.shape = shape
        self._maker = BatchMaker(
            corpus, split_name, shape, nsp=nsp, mlm_probability=mlm_probability, whole_word=whole_word
        )
        passages = self._maker.passages
        if nsp and passages.num_documents < 2:
            raise ValueError(
                f"the split {split_name!r} has one document, and next-sentence pairs need another for their wrong "
                "second sentences: prepare more documents, or turn pairs off (nsp=False, --no-nsp)"
            )
        self._seed = seed

        # Batches that an epoch's text fills, then chunks of about CHUNK_TOKENS that leave the least of them over.
        needed = (1 + SPARE) * passages.num_tokens / self._text_per_batch()
        least, most = CHUNK_BATCHES
        most = min(math.ceil(needed), max(least, min(most, CHUNK_TOKENS // shape.tokens)))
        options = [(math.ceil(needed / k), k) for k in range((most + 1) // 2, most + 1)]
        self.chunks_per_epoch, self.batches_per_chunk = min(options, key=lambda option: (math.prod(option), option))
        if self.chunks_per_epoch > len(passages):  # a few very large batches over hardly any text
            self.chunks_per_epoch = 1
            self.batches_per_chunk = math.ceil(needed)
        self._order: tuple[int, np.ndarray, np.ndarray] | None = None

    def _text_per_batch(self) -> float:
        """Tokens of text in a full batch, measured on a sample: without special tokens and slack."""
        rng = np.random.default_rng(0)
        sample = _sample(self._maker.passages, 32 * self.shape.tokens, rng)
        examples = self._maker.examples(sample, rng)
        lengths = examples.lengths
        packed = self._maker.pack(examples, _queue(lengths, 24 * self.shape.tokens, rng), 16)
        per_batch = np.mean([lengths[chosen].sum() for chosen in packed])
        return float(per_batch * self._maker.passages.tokens[sample].sum() / lengths.sum())

    def _chunk_passages(self, chunk: int) -> np.ndarray:
        """The passages of a chunk."""
        count = self.chunks_per_epoch
        epoch, number = divmod(chunk, count)
        if self._order is None or self._order[0] != epoch:
            tokens = self._maker.passages.tokens
            order = np.random.default_rng((self._seed, _PASSAGE_ORDER, epoch)).permutation(len(tokens)).astype(np.int32)
            # Even shares of the tokens, cut at the nearest passage, with one passage at least in each.
            middle = np.cumsum(tokens[order], dtype=np.int64) - tokens[order] / 2
            bounds = np.searchsorted(middle, np.arange(count + 1) * (tokens.sum(dtype=np.int64) / count))
            bounds[0], bounds[-1] = 0, len(order)
            ahead = np.arange(count + 1)
            bounds = np.minimum(np.maximum.accumulate(bounds - ahead) + ahead, len(order) - ahead[::-1])
            self._order = (epoch, order, bounds)
        _, order, bounds = self._order
        return order[bounds[number] : bounds[number + 1]]

    def _pack(self, index: int) -> tuple[Examples, list[np.ndarray], np.random.Generator]:
        if index < 0:
            raise IndexError(f"chunks are numbered from 0; got {index}")
        rng = np.random.default_rng((self._seed, _CHUNK, index))
        examples = self._maker.examples(self._chunk_passages(index), rng)
        lengths = examples.lengths
        queue = _queue(lengths, (self.batches_per_chunk + 2) * self.shape.tokens + WINDOW * self.shape.seqlen, rng)
        return examples, self._maker.pack(examples, queue, self.batches_per_chunk), rng

    def __getitem__(self, index: int) -> list[PackedBatch]:
        examples, packed, rng = self._pack(index)
        return self._maker.batches(examples, packed, rng)

    def lost_tokens(self, index: int) -> tuple[int, int]:
        """(tokens of chunk ``index``'s text that are in none of its batches, tokens of its text).

        Lost are the trimmed ends of B (see `examples`), and whole examples if a chunk's text is more than its batches
        hold, which SPARE makes rare.
        """
        examples, packed, _ = self._pack(index)
        left = np.ones(len(examples), dtype=bool)
        left[np.concatenate(packed)] = False
        text = examples.a_length + examples.b_length
        return examples.trimmed + int(text[left].sum()), examples.trimmed + int(text.sum())


__all__ = ["BatchMaker", "BatchShape", "PackedExamples", "pack"]
