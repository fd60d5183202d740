"""The losses are sentence-transformers', duplicates are no negatives, and blocks of rows change nothing."""

import math

import pytest
import torch
from torch import Tensor

from fusebert.model import contrastive
from fusebert.model.contrastive import Candidates, compare_rows, compare_scores


def numbered(anchors: list[int], candidates: list[int]) -> Candidates:
    return Candidates(torch.tensor(anchors), torch.tensor(candidates[: len(anchors)]), torch.tensor(candidates))


def vectors(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("block", [1, 10, 1 << 22])
@pytest.mark.parametrize("negatives", [0, 5])
def test_info_nce_is_sentence_transformers(negatives: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    monkeypatch.setattr(contrastive, "ELEMENTS", block)
    count = 5
    parts = [vectors(count, seed).requires_grad_() for seed in range(2 + negatives // count)]
    theirs = losses.MultipleNegativesRankingLoss(torch.nn.Identity(), scale=20.0)
    expected = theirs.compute_loss_from_embeddings(parts, None)
    expected.backward()
    numbers = numbered(list(range(count)), list(range(count, 2 * count + negatives)))
    found = compare_rows(parts[0], torch.cat(parts[1:]), numbers, 0.05)
    torch.testing.assert_close(found.loss_sum / count, expected.detach())
    torch.testing.assert_close(found.gradient / count, torch.cat([each.grad for each in parts]))
    similarity = torch.nn.functional.normalize(parts[0]) @ torch.nn.functional.normalize(torch.cat(parts[1:])).T
    assert int(found.first) == int((similarity.argmax(1) == torch.arange(count)).sum())


def test_duplicates_are_no_negatives() -> None:
    """Rows (a, p) (a, q) (b, p) (p, r), and the hard negatives n of the first and q of the third row."""
    a, b, p, q, r, n = range(6)
    numbers = numbered([a, a, b, p], [p, q, p, r, n, q])
    expected = [
        # p  q  p  r  n  q
        [1, 1, 1, 0, 0, 1],  # p and q are positives of a
        [1, 1, 1, 0, 0, 1],
        [1, 0, 1, 0, 0, 0],  # b has only p
        [1, 0, 1, 1, 0, 0],  # p is the anchor itself
    ]
    assert numbers.not_negative(slice(0, 4)).int().tolist() == expected
    x = vectors(6)
    found = compare_rows(x[[a, a, b, p]], x[[p, q, p, r, n, q]], numbers, 0.5)
    loss = 0.0
    for i, (anchor, positive) in enumerate([(a, p), (a, q), (b, p), (p, r)]):
        candidates = [positive, *(c for c, out in zip([p, q, p, r, n, q], expected[i], strict=True) if not out)]
        cosines = torch.nn.functional.cosine_similarity(x[anchor], x[candidates]) / 0.5
        loss += float(cosines.logsumexp(0) - cosines[0])
    assert float(found.loss_sum) == pytest.approx(loss)


def test_a_row_without_a_negative_has_no_loss() -> None:
    found = compare_rows(vectors(1), vectors(1, 1), numbered([0], [1]), 0.05)
    assert float(found.loss_sum) == 0.0
    assert int(found.first) == 1
    assert torch.all(found.gradient == 0.0)


def test_the_squared_error_of_the_cosine_is_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    parts, scores = [vectors(5, seed).requires_grad_() for seed in range(2)], torch.rand(5, dtype=torch.float64)
    expected = losses.CosineSimilarityLoss(torch.nn.Identity()).compute_loss_from_embeddings(parts, scores)
    expected.backward()
    found = compare_scores(*parts, scores)
    torch.testing.assert_close(found.loss_sum / 5, expected.detach())
    torch.testing.assert_close(found.gradient / 5, torch.cat([each.grad for each in parts]))
    one = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert float(compare_scores(*one, torch.tensor([0.5])).loss_sum) == pytest.approx((math.sqrt(0.5) - 0.5) ** 2)
