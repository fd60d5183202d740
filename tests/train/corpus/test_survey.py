"""The first pass in parts gives what one machine finds, and a text is cut well for the second pass."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from fusebert.train.corpus import parts as parts_module
from fusebert.train.corpus import survey as survey_module
from fusebert.train.corpus.inputs import Document
from fusebert.train.corpus.parts import batches, batches_of_parts, cut_parts
from fusebert.train.corpus.survey import ANY_RANK, TRAIN, Surveyor, document_digest, survey_part

SAMPLE_CHARS = 6000


def some_texts(rng: random.Random) -> list[str]:
    """Texts of 1 … 300 characters; many are copies, and of one text there are more than the sample can have."""
    distinct = [f"{i} " + "x" * rng.randrange(300) for i in range(200)]
    texts = [rng.choice(distinct) for _ in range(400)] + ["the same text again"] * 400
    rng.shuffle(texts)
    return texts


@pytest.mark.parametrize("most_documents", [30, 1 << 18])
@pytest.mark.parametrize("seed", range(4))
def test_the_sample_is_that_of_its_parts_and_the_smallest_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, most_documents: int
) -> None:
    monkeypatch.setattr(survey_module, "SAMPLE_DOCUMENTS", most_documents)
    rng = random.Random(seed)
    texts = some_texts(rng)
    whole = Surveyor(tmp_path, seed, SAMPLE_CHARS)
    whole.add((text, False) for text in texts)

    cuts = [0, *sorted(rng.sample(range(len(texts)), 12)), len(texts)]
    inparts, known = Surveyor(tmp_path, seed, SAMPLE_CHARS), [ANY_RANK]
    for a, b in itertools.pairwise(cuts):
        # The workers know what was known some results ago.
        part = survey_part(((text, False) for text in texts[a:b]), seed, SAMPLE_CHARS, rng.choice(known))
        assert sum(len(text) for _, _, text in part.sample) <= SAMPLE_CHARS
        inparts.add_part(part)
        known.append(inparts.rank_below)

    found = [(surveyor.finish(0.1), surveyor)[0] for surveyor in (whole, inparts)]
    for name in ("places", "sizes"):
        assert np.array_equal(*(getattr(survey, name) for survey in found))
    assert found[0].copies == found[1].copies
    ranked = sorted(
        (int.from_bytes(document_digest(text.encode(), seed)[8:], "little"), number)
        for number, text in enumerate(texts)
    )
    taken, left = [], SAMPLE_CHARS
    for _, number in ranked:
        left -= len(texts[number])
        if left < 0 or len(taken) == most_documents:
            break
        taken.append(number)
    assert 10 < len(taken) < len(texts)
    wanted = [texts[number] for number in taken if found[0].places[number] == TRAIN]
    assert [survey.sample for survey in found] == [wanted, wanted]


def test_what_is_held_out_is_not_sampled(tmp_path: Path) -> None:
    part = survey_part([("mine", True), ("other", False)], 0, 1000)
    assert [text for _, _, text in part.sample] == ["other"]
    surveyor = Surveyor(tmp_path, 0, 1000)
    surveyor.add_part(part)
    assert surveyor.finish(0.1).sample == ["other"]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 10_000)
    monkeypatch.setattr(parts_module, "LARGEST_PART_BYTES", 20_000)


@pytest.mark.usefixtures("small_parts")
def test_parts_are_the_text_in_order_and_about_as_large() -> None:
    rng = np.random.default_rng(0)
    counts = [3, 0, 20, 40, 1000, 0, 2, 9000, 5, 5]
    sizes = rng.integers(1, 300, sum(counts)).astype(np.uint32)
    parts = cut_parts(counts, sizes)
    starts = np.cumsum([0, *counts])
    documents = [
        starts[piece.file] + piece.first + i for part in parts for piece in part.pieces for i in range(piece.length)
    ]
    assert documents == list(range(sum(counts)))
    costs = sizes.astype(int) + 64
    for part in parts:
        assert part.length == sum(piece.length for piece in part.pieces)
        files = {piece.file for piece in part.pieces}
        cost = costs[part.first : part.first + part.length].sum()
        if files == {7}:  # over 32 · 20,000
            assert part.too_large
            assert part.length == 9000
        else:
            assert not part.too_large
            assert cost <= 10_000 + 364
    assert {file for part in parts if len(part.pieces) > 1 for file in (p.file for p in part.pieces)} >= {0, 8, 9}
    assert sum(part.pieces[0].file == 4 for part in parts) == -(-int(costs[63:1063].sum()) // 10_000)


@pytest.mark.usefixtures("small_parts")
def test_a_file_is_read_in_at_most_32_parts() -> None:
    parts = cut_parts([4000], np.full(4000, 86, np.uint32))  # 600,000 bytes as they count
    assert len(parts) == 32
    assert all(part.length == 125 and not part.too_large for part in parts)


@pytest.mark.usefixtures("small_parts")
def test_batches_end_where_parts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "BATCH_CHARS", 3000)
    texts = ["x" * (i % 200 + 1) for i in range(700)]
    places = np.array([0, 1, 2, 0, 0] * 140, np.uint8)
    parts = cut_parts([300, 400], np.array([len(text) for text in texts], np.uint32))
    documents = [Document(text, False, 2.0) for text in texts]
    more = iter([*documents, Document("of a file that has grown", False, 1.0)])
    together = list(batches_of_parts(more, places, parts))
    assert next(more, None) is None
    alone = []
    for part in parts:
        where = slice(part.first, part.first + part.length)
        alone += batches(iter(documents[where]), places[where])
    assert together == alone
    assert len(together) > len(parts)
    kept = [text for text, place in zip(texts, places, strict=True) if place != 2]
    assert [text.text for batch in together for text in batch] == kept
    assert all(weight == (1.0 if split == "heldout" else 2.0) for batch in together for split, weight, _ in batch)
