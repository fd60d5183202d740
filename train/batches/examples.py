"""Text to examples: sentence pairs for next-sentence prediction, or full sentences.

Sentence pairs (Devlin et al. 2018): [CLS] A [SEP] B [SEP]. A passage is cut into spans of as many whole sentences as
fit (a tenth of the spans have a random shorter target, `short_seq_prob`), and each span is split into A and B at a
random sentence border. Then examples are matched in twos with B of equal length from different documents, and a fair
coin decides whether the two B are exchanged:

    (A₁, B₁), (A₂, B₂)    IsNext, label 0        (A₁, B₂), (A₂, B₁)    NotNext, label 1

So the label cannot be inferred from A alone, B alone or their lengths, each text is used once, and half of the labels
are IsNext however short the documents are. BERT's own recipe has none of these properties: there a chunk of one
sentence is always NotNext, and a random B starts anywhere and adds text of its own.

  - A span of one sentence is split inside it, before a random word; such examples are only matched with each other.
  - A sentence that does not fit is cut before the first word that exceeds the limit; its rest begins the next span.
  - Where the lengths of two matched B differ (by an eighth at most), the end of the longer B is cut off *before* the
    coin is tossed. This is the only text that an epoch omits here, counted in `Examples.trimmed` (about 0.1 %).
  - Examples without a match stay true pairs with label −100: only the masked language model learns from them. So do
    spans of one token, which have no B.

Sentence order (Lan et al. 2020, ALBERT): the same spans and splits, but a fair coin exchanges A and B of one span,
label 1, or leaves them, label 0. Both are from one document, so that its subject does not give the label away. A span
that is split inside a sentence stays as it is, with label −100: its halves do not look like whole sentences.

Full sentences (Liu et al. 2019, FULL-SENTENCES): [CLS] A [SEP]. Sentences are added in order until the next does not
fit, across document borders, each marked by one more [SEP]. No text is omitted.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right

import numpy as np

from ...model.batch import IGNORE
from .passages import Text

IS_NEXT, NOT_NEXT = 0, 1
IN_ORDER, EXCHANGED = 0, 1
SHORT_SPAN_PROBABILITY = 0.1  # BERT's short_seq_prob: the model also sees short inputs, which packing makes free
MIN_SEQLEN = 5  # [CLS] a [SEP] b [SEP]


@dataclasses.dataclass
class Examples:
    """E examples over the tokens of a `Text`.

    Attributes:
        tokens: uint16 or uint32 [n].
        a_start, a_length: int64 [E], A is tokens[a_start : a_start + a_length].
        b_start, b_length: int64 [E], the same for B; length 0: no B.
        labels: int64 [E], 0 IsNext, 1 NotNext, −100 no label.
        trimmed: tokens cut from the ends of B, which are in no example.
    """

    tokens: np.ndarray
    a_start: np.ndarray
    a_length: np.ndarray
    b_start: np.ndarray
    b_length: np.ndarray
    labels: np.ndarray
    trimmed: int = 0

    def __len__(self) -> int:
        return len(self.a_start)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E]: tokens of each example, [CLS] and [SEP]s included."""
        return self.a_length + self.b_length + 2 + (self.b_length > 0)

    def count(self, counted: np.ndarray) -> np.ndarray:
        """int64 [E]: tokens of A and B for which ``counted``, bool [vocab_size], is True."""
        running = np.concatenate(([0], np.cumsum(counted[self.tokens])))
        a = running[self.a_start + self.a_length] - running[self.a_start]
        return a + running[self.b_start + self.b_length] - running[self.b_start]


def sentence_pairs(
    text: Text, seqlen: int, rng: np.random.Generator, continues_word: np.ndarray, *, sop: bool = False
) -> Examples:
    """Pairs of at most ``seqlen`` tokens from every passage of ``text``, in the order of the passages.

    Args:
        text: read without separators.
        seqlen: at least MIN_SEQLEN.
        rng: decides the cuts, the matches and the labels.
        continues_word: bool [vocab_size], True for "##" pieces: no cut before them unless the word exceeds the limit.
        sop: labels of sentence order, not of next sentences.
    """
    budget = seqlen - 3
    heads = _last_head(text.tokens, continues_word)
    targets = np.full(1024, budget)
    short = rng.random(1024) < SHORT_SPAN_PROBABILITY
    targets[short] = rng.integers(min(2, budget), budget + 1, size=int(short.sum()))
    start, end, passage = _cut(text.borders, text.starts, text.ends, budget, targets, heads, int(rng.integers(1024)))

    # Split at a sentence border inside the span; if there is none, before a word.
    first = np.searchsorted(text.borders, start, side="right")
    inner = np.searchsorted(text.borders, end, side="left") - first
    chance = rng.random(len(start))
    at_border = inner > 0
    border = text.borders[np.minimum(first + (chance * inner).astype(np.int64), len(text.borders) - 1)]
    inside = start + 1 + (chance * (end - start - 1)).astype(np.int64)
    word = heads[np.minimum(inside, len(heads) - 1)]
    split = np.where(at_border, border, np.where(word > start, word, inside))
    split = np.where(end - start > 1, split, end)

    examples = Examples(
        tokens=text.tokens,
        a_start=start,
        a_length=split - start,
        b_start=split,
        b_length=end - split,
        labels=np.full(len(start), IGNORE, dtype=np.int64),
    )
    if sop:
        _exchange(examples, at_border, rng)
    else:
        _draw_labels(examples, at_border, text.documents[passage], rng)
    return examples


def full_sentences(text: Text, seqlen: int, continues_word: np.ndarray) -> Examples:
    """Single segments of at most ``seqlen`` tokens, without labels.

    Args:
        text: read with separators.
        seqlen: at least MIN_SEQLEN.
        continues_word: as in `sentence_pairs`.
    """
    heads = _last_head(text.tokens, continues_word)
    budget = seqlen - 2
    start, end, _ = _cut(text.borders, [0], [int(text.ends[-1])], budget, np.array([budget]), heads, 0)
    # Drop a separator at the start of an example. (One that follows an example's end starts the next.)
    at_separator = np.isin(start, text.ends)
    start = start + at_separator
    kept = start < end
    start, end = start[kept], end[kept]
    none = np.zeros(len(start), dtype=np.int64)
    return Examples(text.tokens, start, end - start, none, none, np.full(len(start), IGNORE, dtype=np.int64))


def _last_head(tokens: np.ndarray, continues_word: np.ndarray) -> np.ndarray:
    """int64 [n]: the offset of the first piece of each token's word."""
    return np.maximum.accumulate(np.where(continues_word[tokens], 0, np.arange(len(tokens))))


def _cut(
    borders: np.ndarray,
    starts: np.ndarray | list[int],
    ends: np.ndarray | list[int],
    budget: int,
    targets: np.ndarray,
    heads: np.ndarray,
    turn: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts each range [start, end) into spans of whole sentences of at most ``budget`` tokens.

    Span number i has the target length targets[(turn + i) mod len(targets)]. Greedy cutting is sequential, so this is a
    loop, which takes about a microsecond per span.

    Returns:
        The start, the end and the number of the range of each span, int64.
    """
    sentence_ends, wanted = borders.tolist(), targets.tolist()
    span_start: list[int] = []
    span_end: list[int] = []
    spans: list[int] = []
    for start, stop in zip(np.asarray(starts).tolist(), np.asarray(ends).tolist(), strict=True):
        before = len(span_start)
        while start < stop:
            end = stop
            target = wanted[turn % len(wanted)]
            turn += 1
            if stop - start > target:
                k = bisect_right(sentence_ends, start + target)
                end = sentence_ends[k - 1]
                if end <= start:  # no sentence fits the target; the first may fit the budget
                    end = sentence_ends[k]
                    if end - start > budget:
                        end = int(heads[start + budget])
                        if end <= start:  # a word longer than the budget
                            end = start + budget
            span_start.append(start)
            span_end.append(end)
            start = end
        spans.append(len(span_start) - before)
    as_array = [np.array(x, dtype=np.int64) for x in (span_start, span_end)]
    return as_array[0], as_array[1], np.repeat(np.arange(len(spans)), spans)


def _exchange(examples: Examples, at_border: np.ndarray, rng: np.random.Generator) -> None:
    """Exchanges A and B of a fair half of the examples that are split ``at_border``, and labels those; in place."""
    labelled = at_border & (examples.b_length > 0)
    swap = labelled & (rng.random(len(examples)) < 0.5)
    examples.labels[labelled] = IN_ORDER
    examples.labels[swap] = EXCHANGED
    for a, b in ((examples.a_start, examples.b_start), (examples.a_length, examples.b_length)):
        a[swap], b[swap] = b[swap], a[swap]


def _draw_labels(examples: Examples, at_border: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> None:
    """Matches examples in twos and draws their labels; changes ``examples`` in place."""
    # Order examples of equal length by document in a random order, so that the unmatched ones vary.
    _, documents = np.unique(documents, return_inverse=True)
    documents = rng.permutation(documents.max(initial=0) + 1)[documents]
    waiting = np.flatnonzero(examples.b_length > 0)
    ones, others = [], []
    for shift in range(5):  # B of equal length first, then with lengths in the same bin of 2, 4, 8, 16
        key = (examples.b_length[waiting] >> shift) * 2 + at_border[waiting]
        order = np.lexsort((documents[waiting], key))
        waiting, key = waiting[order], key[order]
        # Match number i of a group of g with number i + g/2: another document, unless one has half of the group.
        size = np.bincount(key)[key] if len(key) else key
        number = np.arange(len(key)) - np.searchsorted(key, key)
        one = np.flatnonzero(number < size // 2)
        other = one + size[one] // 2
        i, j = waiting[one], waiting[other]
        longer = np.maximum(examples.b_length[i], examples.b_length[j])
        apart = np.abs(examples.b_length[i] - examples.b_length[j])
        match = (documents[i] != documents[j]) & (8 * apart <= longer)
        ones.append(i[match])
        others.append(j[match])
        unmatched = np.ones(len(waiting), dtype=bool)
        unmatched[one[match]] = unmatched[other[match]] = False
        waiting = waiting[unmatched]

    i, j = np.concatenate(ones), np.concatenate(others)
    before = int(examples.b_length.sum())
    examples.b_length[i] = examples.b_length[j] = np.minimum(examples.b_length[i], examples.b_length[j])
    examples.trimmed = before - int(examples.b_length.sum())
    examples.labels[i] = examples.labels[j] = IS_NEXT
    swap = rng.random(len(i)) < 0.5
    i, j = i[swap], j[swap]
    examples.b_start[i], examples.b_start[j] = examples.b_start[j], examples.b_start[i]
    examples.labels[i] = examples.labels[j] = NOT_NEXT
