"""A lookup and a product with one matrix have one gradient, the sum of both."""

import pytest
import torch
import torch.nn.functional as F
from steps import random_batch, small_model

from fusebert.model.tied_embedding import tied_rows

V, H = 23, 5


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("used", ["both", "rows", "whole"])
def test_the_gradient_is_the_sum_of_both_uses(padding_idx: int | None, used: str) -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, g = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (V, 7, 40))
    ids = torch.randint(0, V, (40,), generator=generator)
    ids[3] = 4  # the padding index; other ids occur twice
    found = []
    for tied in (True, False):
        weight = w.clone().requires_grad_()
        rows, whole = tied_rows(weight, ids, padding_idx) if tied else (F.embedding(ids, weight, padding_idx), weight)
        assert torch.equal(rows, w[ids])
        loss = (rows * g).sum() * (used != "whole") + F.linear(x, whole).square().sum() * (used != "rows")
        loss.backward()
        found.append(weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-13)


def test_the_model_makes_one_gradient_of_the_vocabulary() -> None:
    """The decoder's product is the only tensor of shape [V, H] in the backward: no zeros, no sum of two."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = small_model().train()
    shape = model.decoder_weight.shape
    batch = random_batch(torch.Generator().manual_seed(0), [9, 4], masked=7, pairs=2)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            fresh = all(r.alias_info is None for r in func._schema.returns)
            if fresh and isinstance(out, torch.Tensor) and out.shape == shape:
                made.append(func._schema.name)
            return out

    out = model(batch)
    with Made():
        (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert made == ["aten::mm"] or made == ["aten::mm", "aten::detach"], made
