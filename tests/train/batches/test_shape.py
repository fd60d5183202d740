"""The constant shape of a run's batches."""

import pytest

from fusebert.train.batches.shape import BatchShape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen": 4}, "seqlen must be at least 5"),
        ({"tokens": 64}, "tokens must be at least seqlen, 128"),
        ({"tokens": 1028}, "tokens must be a multiple of 8"),
        ({"masked": 150}, "masked must be a multiple of 8"),
        ({"masked": 0}, "masked must be a positive integer"),
        ({"segments": 7}, "segments must be at least tokens / seqlen, 8; got 7"),
        ({"tokens": 1024.0}, "tokens must be a positive integer"),
    ],
)
def test_bad_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BatchShape(**{"tokens": 1024, "segments": 20, "masked": 160, "seqlen": 128, **change})
