"""A small model and batches for tests of the training step."""

import torch

from fusebert.model.batch import IGNORE, PackedBatch
from fusebert.model.config import BertConfig
from fusebert.model.pretraining import BertForPreTraining


def small_model(dropout: float = 0.0, layers: int = 2) -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        max_position_embeddings=16,
    )
    return BertForPreTraining(config)


def random_batch(
    generator: torch.Generator,
    lengths: list[int],
    masked: int,
    pairs: int,
    slots: int | None = None,
    max_seqlen: int | None = None,
) -> PackedBatch:
    """A batch without slack: ``masked`` labels in ``slots`` slots (default: two more than labels), NSP labels for the
    first ``pairs`` segments."""
    tokens, spare = sum(lengths), 2 if slots is None else slots - masked
    positions = torch.randperm(tokens, generator=generator)[:masked].sort().values
    labels = torch.randint(0, 50, (masked,), generator=generator)
    nsp = torch.randint(0, 2, (len(lengths),), generator=generator)
    nsp[pairs:] = IGNORE
    return PackedBatch(
        input_ids=torch.randint(0, 50, (tokens,), generator=generator),
        token_type_ids=torch.randint(0, 2, (tokens,), generator=generator),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        masked_positions=torch.cat([positions, torch.zeros(spare, dtype=torch.int64)]),
        masked_labels=torch.cat([labels, torch.full((spare,), IGNORE)]),
        nsp_labels=nsp,
        max_seqlen=max(lengths) if max_seqlen is None else max_seqlen,
        num_tokens=tokens,
        num_masked=masked,
        num_pairs=pairs,
    )
