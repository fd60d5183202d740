"""A training step of Transformers' BertForPreTraining, the peer of `train.step.step`: same loss, clip, optimiser.

It gets examples as its users pass them: padded to the longest, [B, N], with an attention mask. Without padding there is
no mask, which saves it work. On request its MLM head runs on the masked rows only, as ours does: this separates the
kernels' share of a speed-up from the share of computing fewer rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.batch import IGNORE, PackedBatch, to_padded
from ...model.config import BertConfig
from ...train.errors import UserError
from ...train.step.optim import make_optimizer
from ...train.step.step import autocast
from ..measure.memory import release_memory

if TYPE_CHECKING:
    from transformers import BertForPreTraining as TransformersBert

Examples = dict[str, Tensor]
MOST_MICRO_BATCHES = 16


def transformers_bert(config: BertConfig, device: torch.device) -> TransformersBert:
    """A randomly initialised BertForPreTraining of Transformers with our config's shape and SDPA, in training mode.

    Raises:
        UserError: Transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("this comparison needs Transformers: pip install transformers") from error
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    theirs = transformers.BertConfig(**fields)
    theirs._attn_implementation = "sdpa"
    model: Any = transformers.BertForPreTraining(theirs).train()
    return model.to(device)


def padded_examples(batch: PackedBatch) -> Examples:
    """The batch as Transformers takes it, without an attention mask if nothing is padded."""
    examples = to_padded(batch)
    if bool(examples["attention_mask"].all()):
        del examples["attention_mask"]
    return examples


def split_examples(examples: Examples, parts: int, *, gather: bool) -> list[Examples]:
    """``parts`` micro-batches; ``gather`` replaces the labels by the masked rows of [B · N] and their labels."""
    split = {name: x.chunk(parts) for name, x in examples.items()}
    micros = [dict(zip(split, xs, strict=True)) for xs in zip(*split.values(), strict=True)]
    if gather:
        for micro in micros:
            labels = micro.pop("labels").flatten()
            micro["rows"] = torch.nonzero(labels != IGNORE).squeeze(1)
            micro["targets"] = labels[micro["rows"]]
    return micros


class MaskedRowsOnly(nn.Module):
    """Transformers' BERT with its MLM head on the masked rows only: the same loss for a seventh of the head's work."""

    def __init__(self, bert: TransformersBert) -> None:
        super().__init__()
        self.model = bert

    def forward(self, rows: Tensor, targets: Tensor, next_sentence_label: Tensor, **inputs: Tensor) -> tuple[Tensor]:
        """rows, targets: int64 [M], into [B · N]; the rest as Transformers' forward → (loss,)."""
        hidden, pooled = self.model.bert(**inputs, return_dict=False)[:2]  # [B, N, H], [B, H]
        logits = self.model.cls.predictions(hidden.flatten(0, 1).index_select(0, rows))  # [M, V]
        nsp_logits = self.model.cls.seq_relationship(pooled)  # [B, 2]
        return (F.cross_entropy(logits.float(), targets) + F.cross_entropy(nsp_logits.float(), next_sentence_label),)


def transformers_loss(model: nn.Module, micro: Examples, compute_dtype: torch.dtype) -> Tensor:
    """Mean over the masked tokens plus mean over the pairs, of Transformers' BERT or `MaskedRowsOnly`."""
    with autocast(micro["input_ids"].device, compute_dtype):
        # Only Transformers' BERT takes return_dict; both return the loss first.
        out: Any = model(**micro, return_dict=False) if "labels" in micro else model(**micro)
    return out[0]


class TransformersStep:
    """Forward, backward, clip and AdamW.

    Args:
        model: Transformers' BERT.
        compute_dtype: of autocast; float32 switches autocast off. bf16 weights need no autocast.
        gather: run the MLM head on the masked rows only.
        compiled: run the model under torch.compile.

    Attributes:
        parts: micro-batches of a step, see `train`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        clip: float,
        compute_dtype: torch.dtype,
        gather: bool = False,
        compiled: bool = False,
    ) -> None:
        self.gather, self.clip, self.compute_dtype = gather, clip, compute_dtype
        called: Any = MaskedRowsOnly(model) if gather else model  # type: ignore[arg-type]
        self.model: nn.Module = torch.compile(called) if compiled else called  # type: ignore[assignment]
        self.optimizer = make_optimizer(self.model, lr, weight_decay)
        self.device = next(model.parameters()).device
        self.parts = 1

    def split(self, examples: Examples) -> list[Examples]:
        """The micro-batches of a step."""
        return split_examples(examples, self.parts, gather=self.gather)

    def __call__(self, micros: list[Examples]) -> Tensor:
        """One step on these micro-batches; its loss, on the device."""
        total = torch.zeros((), device=self.device)
        for micro in micros:
            loss = transformers_loss(self.model, micro, self.compute_dtype) / len(micros)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def train(self, examples: Examples, lr: float | None = None) -> Tensor:
        """One step, in twice as many micro-batches each time that the memory does not suffice.

        A batch that fits our step may not fit Transformers', which holds the logits of all rows.
        """
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        while True:
            try:
                return self(self.split(examples))
            except torch.OutOfMemoryError:
                if 2 * self.parts > min(MOST_MICRO_BATCHES, len(examples["input_ids"])):
                    raise
            self.parts *= 2
            self.optimizer.zero_grad(set_to_none=True)
            release_memory(self.device)
