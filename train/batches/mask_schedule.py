"""A share of masked tokens that falls during the run (Yang et al. 2023, arXiv 2305.15096).

Batches are made with the first share. At a later step each masked position stays masked with the probability
p(x) / p(0); the others get their token back and lose their label. So the shape of the batches is constant, a batch is
made without knowing when it will be used, and the clock may decide how far a run is.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ...model.batch import IGNORE, PackedBatch


def mask_share(start: float, end: float, progress: float) -> float:
    """p(x) = p(0) + (p(1) − p(0)) x: the share of tokens to mask at ``progress`` x, 0 … 1, of the run."""
    return start + (end - start) * min(1.0, max(0.0, progress))


def thin_masks(batch: PackedBatch, keep: float, rng: np.random.Generator) -> PackedBatch:
    """``batch``, on the CPU, with each of its masked positions masked with probability ``keep``.

    Raises:
        ValueError: ``keep`` is not in [0, 1].
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep must be in [0, 1]; got {keep}")
    dropped = torch.from_numpy(rng.random(batch.masked_labels.shape[0]) >= keep) & (batch.masked_labels != IGNORE)
    positions, labels = batch.masked_positions[dropped], batch.masked_labels[dropped]
    thinned = dataclasses.replace(
        batch,
        input_ids=batch.input_ids.index_copy(0, positions, labels),
        masked_positions=batch.masked_positions.masked_fill(dropped, 0),
        masked_labels=batch.masked_labels.masked_fill(dropped, IGNORE),
        num_masked=batch.num_masked - len(positions),
    )
    return thinned.map(torch.Tensor.pin_memory) if batch.input_ids.is_pinned() else thinned
