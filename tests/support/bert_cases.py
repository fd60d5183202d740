"""Small BERTs and batches for the model's tests."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fusebert.model import IGNORE, BertConfig, BertForPreTraining, PackedBatch

# Hidden 32 in heads of 16: the narrowest the attention kernels take.
MICRO = BertConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=40,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LENGTHS = (17, 1, 40, 5, 23)


def randomised(model: nn.Module) -> nn.Module:
    """``model`` without special values: biases and LayerNorms are no longer 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.05))
    return model


def bert(config: BertConfig = MICRO, seed: int = 0) -> BertForPreTraining:
    torch.manual_seed(seed)
    model = BertForPreTraining(config)
    randomised(model)
    return model


def padded_examples(
    config: BertConfig, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Random examples in Transformers' form; the padding token is also used as a real token and as a label."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    input_ids, labels = draw(config.vocab_size, *shape), draw(config.vocab_size, *shape)
    input_ids[0, 1] = labels[0, 1] = config.pad_token_id or 0
    labelled = mask & (torch.rand(shape, generator=generator) < 0.3)
    labelled[0, :2] = True  # the padding token, and row 0, to which unused masked slots point
    next_sentence_label = draw(2, len(lengths))
    next_sentence_label[-1] = IGNORE
    examples = {
        "input_ids": input_ids * mask,
        "attention_mask": mask.long(),
        "token_type_ids": draw(config.type_vocab_size, *shape) * mask,
        "labels": torch.where(labelled, labels, IGNORE),
        "next_sentence_label": next_sentence_label,
    }
    return {name: tensor.to(device) for name, tensor in examples.items()}


def with_slack(batch: PackedBatch, tokens: int, segments: int, masked: int, seed: int = 1) -> PackedBatch:
    """``batch`` with a segment of random slack, ``segments`` empty segments and ``masked`` unused masked slots."""
    device, total = batch.input_ids.device, batch.num_tokens + tokens

    def longer(x: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, tail.to(x)])

    generator = torch.Generator().manual_seed(seed)
    empty = [total] * segments
    return dataclasses.replace(
        batch,
        input_ids=longer(batch.input_ids, torch.randint(0, 30, (tokens,), generator=generator)),
        token_type_ids=longer(batch.token_type_ids, torch.randint(0, 2, (tokens,), generator=generator)),
        position_ids=longer(batch.position_ids, torch.arange(tokens)),
        cu_seqlens=longer(batch.cu_seqlens, torch.tensor([total, *empty])),
        masked_positions=longer(batch.masked_positions, torch.zeros(masked)),
        masked_labels=longer(batch.masked_labels, torch.full((masked,), IGNORE)),
        nsp_labels=longer(batch.nsp_labels, torch.full((1 + segments,), IGNORE)),
        max_seqlen=max(batch.max_seqlen, tokens),
    ).to(device)
